"""Adapters: receipts, versions, pins, shares, merges and checks."""

from typing import Literal, NotRequired, TypedDict

from server.http.objects.models import StopToken
from server.messages.protocol import Drift


class AdapterReceipt(TypedDict):
    """`scaling` is the most common among modules; `rows` are row units on the device by module kind."""

    object: Literal["adapter"]
    name: str
    digest: str
    created_at: int
    pinned: bool
    rank: int
    scaling: float
    modules_matched: int
    variants: list[str]
    parameters: int
    bytes: int
    dtype: str
    rows: dict[str, int]
    base_model_name_or_path: str | None
    warnings: list[str]
    task: NotRequired[Literal["SEQ_CLS"]]
    num_labels: NotRequired[int]
    new_tokens: NotRequired[int]
    tokenizer_tokens: NotRequired[int]
    chat_template: NotRequired[bool]
    stop_token_ids: NotRequired[list[int]]
    trained_tool_format: NotRequired[str]
    trained_reasoning_format: NotRequired[str]


class ListedAdapter(AdapterReceipt):
    """`tier` is the nearest that holds it. Since the server started: requests, tokens, Unix time of the last use."""

    tier: Literal["merged", "device", "host", "disk"]
    requests: int
    tokens: int
    last_used: float | None


class ModuleObject(TypedDict):
    rank: int
    scaling: float


class DecodeSpeed(TypedDict):
    requests: int
    adapter: float
    merged: float
    gain: float


class ResidentMerge(TypedDict):
    dtype: str
    bytes: int
    build_seconds: float
    drift: Drift
    decode_tokens_per_second: list[DecodeSpeed]
    prompts: NotRequired[list[str]]


class AdapterObject(ListedAdapter):
    """`file_metadata` is the safetensors file's; `bytes_on_device` is null while the engine starts."""

    modules: dict[str, ModuleObject]
    file_metadata: dict[str, str]
    bytes_on_disk: int
    bytes_on_device: int | None
    versions: list[str]
    split: dict[str, float] | None
    shared_with: list[str] | Literal["all"]
    merged: ResidentMerge | None
    stop_tokens: list[StopToken]
    tool_format: str | None
    reasoning_format: str | None


class DeletedAdapter(TypedDict):
    object: Literal["adapter"]
    name: str
    digest: str
    deleted: Literal[True]


class VersionObject(AdapterReceipt):
    current: bool
    staged: bool
    share: float


class Versions(TypedDict):
    object: Literal["list"]
    name: str
    split: dict[str, float] | None
    data: list[VersionObject]


class ShareObject(TypedDict):
    """The tenants that may use the adapter as OWNER/NAME."""

    object: Literal["adapter.share"]
    name: str
    tenants: list[str] | Literal["all"]


class PinObject(TypedDict):
    object: Literal["adapter.pin"]
    name: str
    pinned: bool
    digests: list[str]
    bytes_on_device: int


class Residency(TypedDict):
    object: Literal["adapter.residency"]
    name: str
    digests: list[str]
    seconds: float


class MeanLogprobs(TypedDict):
    adapter: float
    base: float


class Difference(TypedDict):
    mean: float
    max: float


class Verification(TypedDict):
    object: Literal["adapter.verification"]
    name: str
    digest: str
    prompt_tokens: int
    changes_anything: bool
    mean_logprob: MeanLogprobs
    logprob_difference: Difference
    difference_from_peft: Difference | None


class CheckpointFile(TypedDict):
    name: str
    bytes: int


class MergedCheckpoint(TypedDict):
    dtype: str
    bytes: int
    files: list[CheckpointFile]


class MergeObject(TypedDict):
    object: Literal["merge"]
    name: str
    digest: str
    checkpoint: NotRequired[MergedCheckpoint | None]
    resident: NotRequired[ResidentMerge | None]


class DeletedMerge(TypedDict):
    object: Literal["merge"]
    name: str
    digest: str
    deleted: list[Literal["checkpoint", "resident"]]
