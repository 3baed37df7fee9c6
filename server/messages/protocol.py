"""The messages between the API process and the engine process.

Small msgspec structs, MessagePack on the wire, over one ZeroMQ PAIR socket per engine incarnation.
Weights never travel: an adapter is named by its digest and the directory that holds it.
This file knows the shape of the conversation and nothing of either side.
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
    """Base of everything that crosses the wire; the struct's name is its tag."""


# --- what an engine is started with -------------------------------------------------------------------


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine process is told at birth, as JSON on its command line. None means: decide by the device."""

    address: str  # where its API process listens
    model: str  # a directory in Hugging Face layout
    cache_dir: str
    quantization: str = "nf4"
    dtype: str = "auto"
    device: str = "auto"
    activations: Literal["exact", "int8"] = "exact"  # what 4-bit linears multiply, on a CPU
    sketch_head: bool = True  # greedy tokens are found without reading all of the head, on a CPU
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
    deterministic: bool = False  # a request's bits never depend on its neighbours; a CPU's never do
    threads: int | None = None
    finetune_max_stall_ms: float = 20.0  # training between two inference steps, at most
    finetune_share: float = 0.3  # of the device's time while requests run, at most
    merge_share: float = 0.3  # likewise, for building merges
    grammar_bytes: int = 256 << 20  # of compiled grammars that are kept
    batch_wait_seconds: float = 60.0  # after which one in the background at a time is as others are
    background_priority: Priority = "low"  # of the threads that load adapters, and compile grammars


# --- what a request is -----------------------------------------------------------------------


class AdapterRef(msgspec.Struct, frozen=True):
    """One adapter version: content digest, the directory it lies in, and its weight in this request."""

    digest: str
    path: str
    weight: float = 1.0
    tokens: bool = False  # it brings tokens of its own
    owner: tuple[str, int] | None = None  # the tenant that asks, if it may have only so many rows on the device


class Grammar(msgspec.Struct, frozen=True):
    """What an answer's text must be.

    kind: how `text` says it. "json": a JSON Schema, as JSON. "json_object": any JSON object; `text` is empty. "regex".
        "choice": a JSON array of texts. "lark": llguidance's dialect of Lark, or GBNF. "structural_tag": free text with
        tags in it, as vLLM writes these in JSON.
    thought: Lark of a thought before that text, which is its `@answer`; empty: there is none.
    size: bytes that compiling it took, as the check before found.
    """

    kind: Literal["json", "json_object", "regex", "choice", "lark", "structural_tag"]
    text: str
    thought: str = ""
    size: int = 0


class ThoughtBudget(msgspec.Struct, frozen=True):
    """How many tokens an answer may think for. It needs a grammar."""

    most: int
    begin: str  # empty: the prompt has begun the thought
    end: str
    close: list[int]  # tokens that end a thought, forced where it has had its tokens


class Sampling(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """How to draw tokens. Validated by the API process; the engine trusts the ranges."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0  # always set: the API process draws one when the client gave none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside the sampled token; None: no logprobs
    prompt_logprobs: int | None = None  # the same for every prompt token
    classify: bool = False  # its adapter's classification head scores the prompt, and nothing is drawn
    speculative_tokens: int = 0  # most tokens drafted ahead in a step; 0: no speculation
    grammar: Grammar | None = None  # of the answer's text
    thought: ThoughtBudget | None = None

    # Made once, for every step needs them and there may be as many as tokens in the vocabulary.

    @cached_property
    def biases(self) -> "tuple[array[int], array[float]]":
        """`logit_bias` as ids and their biases."""
        return array("q", self.logit_bias), array("f", self.logit_bias.values())

    @cached_property
    def stops(self) -> "tuple[frozenset[int], array[int]]":
        """`stop_token_ids` to look a token up in, and to go through."""
        known = frozenset(self.stop_token_ids)
        return known, array("q", known)


# --- API process -> engine ------------------------------------------------------------------------


class Generate(_Message):
    """Start one sequence. The engine answers with `Output`s until one carries a `finish_reason` or `error`."""

    id: str
    prompt: list[int]
    sampling: Sampling
    adapters: list[AdapterRef] = []
    tenant: str = ""
    weight: float = 1.0  # of the tenant's share beside other tenants
    priority: int = 0  # among the tenant's sequences; the lowest comes first
    cache_salt: str = ""
    background: bool = False  # only in steps that nothing else can use


class Abort(_Message):
    """Forget this sequence now; no further `Output` follows. Unknown ids are ignored."""

    id: str


class Warm(_Message):
    """Make an adapter resident on the device without a request; answered by `Done`."""

    id: str
    adapter: AdapterRef


class Pin(_Message):
    """These adapters, and no others, stay on the device from now on."""

    adapters: list[AdapterRef]


class Forget(_Message):
    """The adapter's name is gone: drop its rows and host copy once no sequence uses it; answered by `Done`."""

    id: str
    digest: str


class Merge(_Message):
    """Build merged weights for an adapter's requests to run on; answered by `MergeReport`, or `Done` with an error."""

    id: str
    adapter: AdapterRef
    dtype: MergedDtype
    prompts: list[list[int]]  # to measure the drift on


class Unmerge(_Message):
    """Undo a merge, or give one up; answered by `Done`, with code "merge_not_found" when there is none."""

    id: str
    digest: str


class Inspect(_Message):
    """Ask for an `Inspection` (a fresh hash of the base, accounting of blocks and rows)."""

    id: str


class Drain(_Message):
    """Exit once nothing is running or waiting."""


# --- engine -> API process ------------------------------------------------------------------------


class Drift(msgspec.Struct, frozen=True):
    """How far one way of computing logits is from another, over so many positions of a text."""

    positions: int
    mean_kl: float  # of the next token's distribution, nats
    greedy_agreement: float  # share of positions with the same most likely token


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose sequences need the same keys: blocks, and bytes that a token takes over all of them."""

    window: int  # a token sees so many of the last keys; 0 for all
    blocks: int
    bytes_per_token: int


class StateSlotsInfo(msgspec.Struct, frozen=True):
    """Slots of the layers that keep a state: of running sequences, and snapshots."""

    slots: int
    bytes_per_slot: int


class KVInfo(msgspec.Struct, frozen=True):
    """The KV cache."""

    dtype: str
    bytes: int
    groups: list[KVGroup]
    drift: Drift | None = None  # from a cache that does not round; None: this one does not
    states: StateSlotsInfo | None = None  # beside it; None: no layer keeps a state


class Ready(_Message, kw_only=True):
    """First message of an engine: what it serves and how much it holds."""

    pid: int
    base_digest: str  # "sha256:..." over the base's weights, quantisation state, biases and norms
    architecture: str  # e.g. "LlamaForCausalLM"
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    linears: dict[str, LinearSize]  # by full module name
    block_size: int
    num_blocks: int
    pool_rows: dict[str, int]  # kind -> capacity in row units
    device: str
    dtype: str
    tied: bool = False  # head and input embedding are one matrix
    embedding: str = ""  # full name of the input embedding, and of the head
    head: str = ""
    aside: list[str] = []  # full names of modules that text does not pass, such as an image encoder
    renamed: dict[str, str] = {}  # parameter in the base's files -> in the model, where these differ
    experts: dict[str, ExpertsSize] = {}  # by full name of the parameter that holds a layer's
    norms: list[str] = []  # full names of those that adapters may replace, and of routers to experts
    routers: list[str] = []
    by_token: list[str] = []  # of tables with a row for each token, besides the input embedding
    opaque_embedding: bool = False  # the input embedding does more than to look up rows and scale them
    transposed: bool = False  # the base's files hold weights of linears as [in, out]
    kernels: str = ""  # which compute a step: native with its instruction set, triton, or plain torch
    int8_drift: Drift | None = None  # from exact activations; None: they are exact
    kv_cache: KVInfo | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The raw model's log-probability of one token and of its most likely alternatives (best first)."""

    token: int
    logprob: float
    rank: int  # 1 = the most likely token
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step gave one sequence, and what it took."""

    id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []  # one per token, when asked for
    prompt_logprobs: list[TokenLogprob | None] = []  # of the prompt tokens that the step scored; the first is null
    scores: list[float] = []  # of each label, from a classification head
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop token or EOS that ended it (also the last of `tokens`)
    cached_tokens: int = 0  # prompt tokens served from the prefix cache (on the first output)
    queue_seconds: float = 0.0  # arrival -> first scheduled (on the first output)
    drafted_tokens: int = 0  # computed on speculation in this step
    accepted_tokens: int = 0  # those among them that are part of `tokens`
    device_seconds: float = 0.0  # its part, by tokens, of the steps since the last output
    error: str | None = None  # this sequence failed alone; `code` says how
    code: str | None = None


class AdapterUse(msgspec.Struct, frozen=True, array_like=True):
    """One adapter digest in one tier of memory. Not `present`: it has left that tier."""

    digest: str
    tier: Literal["device", "host", "merged"]
    rank: int = 0
    running: int = 0  # sequences
    waiting: int = 0
    present: bool = True


class MergeSpeed(msgspec.Struct, frozen=True):
    """Decode speed with so many requests at once, in tokens/s of all of them."""

    requests: int
    adapter: float  # as base and delta
    merged: float


class MergeReport(_Message, kw_only=True):
    """Answer to `Merge`: what was made, how far it is from the unmerged adapter, and what it gains."""

    id: str
    digest: str
    dtype: MergedDtype
    bytes: int
    positions: int  # of the prompts, over which the next two are
    mean_kl: float  # KL(unmerged || merged) of the next token's distribution, nats
    agreement: float  # share of positions with the same most likely token
    speeds: list[MergeSpeed]
    seconds: float  # it took


class Stats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Gauges and increments as of one step."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    step_requests: int = 0
    step_adapters: int = 0
    step_seconds: float = 0.0
    kv_usage: float = 0.0  # 0..1
    state_usage: float = 0.0  # likewise, of slots of states
    prefix_queries: int = 0  # prompt tokens looked up since the last report
    prefix_hits: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0  # computed on speculation since the last report
    accepted_tokens: int = 0  # those among them that were right and used
    evictions: list[str] = []  # digests that left the device since the last report
    loads: list[tuple[str, float]] = []  # (digest, seconds) that arrived on the device since the last report
    adapters: list[AdapterUse] = []  # those that changed since the last report
    merges: list[MergeReport] | None = None  # those in force; present when it changed


class Step(_Message):
    """One engine step: every sequence's output, and the gauges. Also sent (without outputs) as a heartbeat."""

    outputs: list[Output]
    stats: Stats


class Done(_Message):
    """Answer to `Warm`, `Forget` and `Unmerge`, and to a `Merge` or a `PlanMemory` that cannot be."""

    id: str
    error: str | None = None
    code: str | None = None
    seconds: float = 0.0


class Inspection(_Message):
    """Answer to `Inspect`. When idle: free + cached blocks = num_blocks, free + resident rows = pool_rows.

    Slots of states likewise, where layers keep some.
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
    """The engine cannot start or go on; it exits after sending this. `retry` is False for configuration faults."""

    message: str
    retry: bool = True


Request = Generate | Abort | Warm | Pin | Forget | Merge | Unmerge | Inspect | Drain | JobRequest
Reply = Ready | Step | Done | MergeReport | Inspection | Fatal | JobReply | MemoryPlan

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
encode_config = msgspec.json.Encoder().encode
decode_config = msgspec.json.Decoder(EngineConfig).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
