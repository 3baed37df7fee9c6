"""The messages between the API process and the engine process.

Small msgspec structs, MessagePack on the wire, over one ZeroMQ PAIR socket per engine process.
Weights are never sent: an adapter is named by its digest and the directory that holds it.
"""

from array import array
from functools import cached_property
from typing import Literal

import msgspec

from adapters.background import Priority
from adapters.offline.recipe import MergedDtype
from adapters.peft_format.sizes import ExpertsSize, LinearSize
from server.messages.training import JobReply, JobRequest, MemoryPlan

FinishReason = Literal["stop", "length", "abort"]

# The `code` of an `Output` or `Done` with an error.
TOO_LONG = "context_length_exceeded"
LOAD_FAILED = "adapter_load_failed"
NON_FINITE = "non_finite_logits"
INVALID_GRAMMAR = "invalid_grammar"


class _Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; the struct's name is its tag."""


# --- the engine's configuration -----------------------------------------------------------------------


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """An engine process's configuration, as JSON on its command line. None: a default chosen by device."""

    address: str  # ZeroMQ address of the API process
    model: str  # a directory in Hugging Face layout
    cache_dir: str
    quantization: str = "nf4"
    dtype: str = "auto"
    device: str = "auto"
    activations: Literal["exact", "int8"] = "exact"  # inputs of 4-bit linears, on a CPU
    sketch_head: bool = True  # greedy sampling by the screening copy of the head, on a CPU
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    state_cache_bytes: int | None = None
    adapter_bytes: int | None = None
    adapter_host_bytes: int = 4 << 30
    merged_bytes: int | None = None
    max_batch_tokens: int | None = None
    max_batch_requests: int = 32
    prefix_caching: bool = True
    deterministic: bool = False  # results do not depend on other requests in the batch; on a CPU they never do
    threads: int | None = None
    finetune_max_stall_ms: float = 20.0  # most training time between two inference steps
    finetune_share: float = 0.3  # most of the device's time while requests run
    merge_share: float = 0.3  # likewise, of building merges
    grammar_bytes: int = 256 << 20  # of cached compiled grammars
    batch_wait_seconds: float = 60.0  # after which background requests, one at a time, run as ordinary ones
    background_priority: Priority = "low"  # of the threads that load adapters, and compile grammars


# --- parts of a request ----------------------------------------------------------------------


class AdapterRef(msgspec.Struct, frozen=True):
    """One adapter version: content digest, directory, and weight in this request."""

    digest: str
    path: str
    weight: float = 1.0
    tokens: bool = False  # it adds tokens of its own
    owner: tuple[str, int] | None = None  # the requesting tenant and its limit of rows on the device, if any


class Grammar(msgspec.Struct, frozen=True):
    """Constraint on an answer's text.

    kind: notation of `text`. "json": a JSON Schema, as JSON. "json_object": any JSON object; `text` is empty. "regex".
        "choice": a JSON array of texts. "lark": llguidance's dialect of Lark, or GBNF. "structural_tag": free text with
        tags in it, in vLLM's JSON form.
    thought: Lark of a thought before that text, in which `@answer` is the text; empty: no thought.
    size: bytes that compiling it took, measured by the check before admission.
    """

    kind: Literal["json", "json_object", "regex", "choice", "lark", "structural_tag"]
    text: str
    thought: str = ""
    size: int = 0


class ThoughtBudget(msgspec.Struct, frozen=True):
    """Limit on the tokens of an answer's thought. It needs a grammar."""

    most: int
    begin: str  # empty: the thought begins in the prompt
    end: str
    close: list[int]  # tokens that end a thought, forced at the limit


class Sampling(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Sampling parameters. Validated by the API process; the engine trusts the ranges."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0  # always set: the API process draws one when the client gave none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives beside the sampled token; None: no logprobs
    prompt_logprobs: int | None = None  # the same for every prompt token
    classify: bool = False  # the adapter's classification head scores the prompt, and no token is drawn
    speculative_tokens: int = 0  # most tokens drafted ahead in a step; 0: no speculation
    grammar: Grammar | None = None  # of the answer's text
    thought: ThoughtBudget | None = None

    # Cached: every step needs them, and they can have an entry for each token of the vocabulary.

    @cached_property
    def biases(self) -> "tuple[array[int], array[float]]":
        """`logit_bias` as ids and their biases."""
        return array("q", self.logit_bias), array("f", self.logit_bias.values())

    @cached_property
    def stops(self) -> "tuple[frozenset[int], array[int]]":
        """`stop_token_ids` as a set for lookups, and as an array."""
        known = frozenset(self.stop_token_ids)
        return known, array("q", known)


# --- API process -> engine ------------------------------------------------------------------------


class Generate(_Message):
    """Start one sequence. Answered by `Output`s until one has a `finish_reason` or an `error`."""

    id: str
    prompt: list[int]
    sampling: Sampling
    adapters: list[AdapterRef] = []
    tenant: str = ""
    weight: float = 1.0  # of the tenant in fair sharing
    priority: int = 0  # among the tenant's sequences; the lowest runs first
    cache_salt: str = ""
    background: bool = False  # runs only in steps without ordinary requests


class Abort(_Message):
    """Abort a sequence at once; no further `Output` follows. Unknown ids are ignored."""

    id: str


class Warm(_Message):
    """Make an adapter resident on the device without a request; answered by `Done`."""

    id: str
    adapter: AdapterRef


class Pin(_Message):
    """Replace the set of pinned adapters, which stay on the device."""

    adapters: list[AdapterRef]


class Forget(_Message):
    """Drop a deleted adapter's rows and host copy once no sequence uses it; answered by `Done`."""

    id: str
    digest: str


class Merge(_Message):
    """Build merged weights for an adapter's requests to run on; answered by `MergeReport`, or `Done` with an error."""

    id: str
    adapter: AdapterRef
    dtype: MergedDtype
    prompts: list[list[int]]  # for measuring drift and speed


class Unmerge(_Message):
    """Undo a merge, or cancel one in progress; answered by `Done`, with code "merge_not_found" when there is none."""

    id: str
    digest: str


class Inspect(_Message):
    """Ask for an `Inspection` (a fresh hash of the base, accounting of blocks and rows)."""

    id: str


class Drain(_Message):
    """Exit once nothing is running or waiting."""


# --- engine -> API process ------------------------------------------------------------------------


class Drift(msgspec.Struct, frozen=True):
    """Difference between two ways of computing logits, over `positions` of a text."""

    positions: int
    mean_kl: float  # of the next token's distribution, nats
    greedy_agreement: float  # share of positions with the same most likely token


class KVGroup(msgspec.Struct, frozen=True):
    """The KV cache of layers that need the same keys: blocks, and bytes per token over all of these layers."""

    window: int  # number of latest keys that a token sees; 0: all
    blocks: int
    bytes_per_token: int


class StateSlotsInfo(msgspec.Struct, frozen=True):
    """Slots of layers that keep a state, for running sequences and snapshots."""

    slots: int
    bytes_per_slot: int


class KVInfo(msgspec.Struct, frozen=True):
    """The KV cache."""

    dtype: str
    bytes: int
    groups: list[KVGroup]
    drift: Drift | None = None  # from a cache that does not round; None: this one does not round
    states: StateSlotsInfo | None = None  # None: no layer keeps a state


class Ready(_Message, kw_only=True):
    """First message of an engine: its base and its capacity."""

    pid: int
    base_digest: str  # "sha256:..." over the base's weights, quantisation state, biases and norms
    architecture: str  # e.g. "LlamaForCausalLM"
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    linears: dict[str, LinearSize]  # by full module name
    block_size: int
    num_blocks: int
    pool_rows: dict[str, int]  # module kind -> capacity in row units
    device: str
    dtype: str
    tied: bool = False  # head and input embedding are one matrix
    embedding: str = ""  # full name of the input embedding, and of the head
    head: str = ""
    aside: list[str] = []  # full names of modules unused for text, such as an image encoder
    renamed: dict[str, str] = {}  # parameter's name in the base's files -> in the model, where they differ
    experts: dict[str, ExpertsSize] = {}  # by full name of the parameter that holds a layer's experts
    norms: list[str] = []  # full names of norms that adapters may replace, and of routers to experts
    routers: list[str] = []
    by_token: list[str] = []  # full names of tables with a row for each token, besides the input embedding
    opaque_embedding: bool = False  # the input embedding does more than look up and scale rows
    transposed: bool = False  # the base's files hold weights of linears as [in, out]
    kernels: str = ""  # in use: native with its instruction set, triton, or plain torch
    int8_drift: Drift | None = None  # from exact activations; None: activations are exact
    kv_cache: KVInfo | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The model's log-probability, before sampling parameters, of one token and its most likely alternatives."""

    token: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: list[tuple[int, float]] = []  # best first


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step's result for one sequence, and its cost."""

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []  # one per token, when asked for
    prompt_logprobs: list[TokenLogprob | None] = []  # of the prompt tokens scored by the step; the first is null
    scores: list[float] = []  # one per label, from a classification head
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token or EOS that ended the sequence (also the last of `tokens`)
    cached_tokens: int = 0  # prompt tokens served from the prefix cache (on the first output)
    queue_seconds: float = 0.0  # arrival -> first scheduled (on the first output)
    drafted_tokens: int = 0  # drafts computed in this step
    accepted_tokens: int = 0  # drafts that are part of `tokens`
    device_seconds: float = 0.0  # its share, by tokens, of the steps since the last output
    error: str | None = None  # this sequence failed alone, for the reason in `code`
    code: str | None = None


class AdapterUse(msgspec.Struct, frozen=True, array_like=True):
    """One adapter version in one memory tier. Not `present`: it has left that tier."""

    digest: str
    tier: Literal["device", "host", "merged"]
    rank: int = 0
    running: int = 0  # sequences
    waiting: int = 0
    present: bool = True


class MergeSpeed(msgspec.Struct, frozen=True):
    """Decode speed with `requests` in the batch, in tokens/s of all of them."""

    requests: int
    adapter: float  # unmerged
    merged: float


class MergeReport(_Message, kw_only=True):
    """Answer to `Merge`: the weights' format, their difference from the unmerged adapter, and the speed-up."""

    id: str
    digest: str
    dtype: MergedDtype
    bytes: int
    positions: int  # of the prompts, for the next two fields
    mean_kl: float  # KL(unmerged || merged) of the next token's distribution, nats
    agreement: float  # share of positions with the same most likely token
    speeds: list[MergeSpeed]
    seconds: float  # of building and measuring


class Stats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Gauges, and increments since the last report, at one step."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    step_requests: int = 0
    step_adapters: int = 0
    step_seconds: float = 0.0
    kv_usage: float = 0.0  # 0..1
    state_usage: float = 0.0  # likewise, of the state slots
    prefix_queries: int = 0  # prompt tokens looked up since the last report
    prefix_hits: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0  # drafts computed since the last report
    accepted_tokens: int = 0  # drafts accepted since the last report
    evictions: list[str] = []  # digests that left the device since the last report
    loads: list[tuple[str, float]] = []  # (digest, seconds) of loads to the device since the last report
    adapters: list[AdapterUse] = []  # changes since the last report
    merges: list[MergeReport] | None = None  # all merges in force; None: unchanged


class Step(_Message):
    """One engine step: every sequence's output, and the gauges. Also sent (without outputs) as a heartbeat."""

    outputs: list[Output]
    stats: Stats


class Done(_Message):
    """Answer to `Warm`, `Forget` and `Unmerge`, and to a `Merge` or `PlanMemory` that failed."""

    id: str
    error: str | None = None
    code: str | None = None
    seconds: float = 0.0


class Inspection(_Message):
    """Answer to `Inspect`. When idle: free + cached blocks = num_blocks, free + resident rows = pool_rows.

    State slots likewise, where layers keep states.
    """

    id: str
    base_digest: str
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    state_slots: int
    free_slots: int
    cached_slots: int
    free_rows: dict[str, int]
    resident_rows: dict[str, int]


class Fatal(_Message):
    """Report that the engine cannot start or continue; it then exits. `retry` is False for configuration faults."""

    message: str
    retry: bool = True


Request = Generate | Abort | Warm | Pin | Forget | Merge | Unmerge | Inspect | Drain | JobRequest
Reply = Ready | Step | Done | MergeReport | Inspection | Fatal | JobReply | MemoryPlan

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
encode_config = msgspec.json.Encoder().encode
decode_config = msgspec.json.Decoder(EngineConfig).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
