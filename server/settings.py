"""Every setting of the server, once: its name, type, default, range and explanation.

The command line's flags, the `LORAKEET_*` variables and the table of docs/reference/settings.md are made from this one
definition (`server.setting_table`).
Precedence: flag, then environment, then default. Aliases are flags only.
"""

# ruff: noqa: RUF009  # the functions of `setting_kinds` are `dataclasses.field` with our metadata

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from adapters.background import PRIORITIES, Priority
from adapters.storage.silence import Patience
from server.hub import SCHEME, Reference, parse_allowed
from server.model_source import DEFAULT, default_cache_dir, default_data_dir
from server.setting_kinds import (
    SERVICE_LINK,
    Setting,
    choice,
    number,
    parse_device,
    parse_metrics_prefix,
    parse_origin,
    parse_path,
    path,
    rows,
    size,
    switch,
    text,
    whole,
)
from server.setting_kinds import SettingError as SettingError
from server.text.reasoning import REASONING_FORMATS
from server.text.reasoning import VLLM_NAMES as REASONING_NAMES
from server.text.tools.table import FORMATS
from server.text.tools.table import VLLM_NAMES as TOOL_NAMES

MAX_SPECULATIVE_TOKENS = 32
GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The operator's choices. Made by `Settings.load`; checked also when built directly."""

    # --- the base model
    model: str = text(
        DEFAULT, "The base: a directory in Hugging Face layout, a .gguf file, a hub id, or a built-in name."
    )
    served_model_name: str | None = text(None, "The base's name in the API.", shown="the last part of the model's name")
    quantization: str = choice("nf4", "How the base is held in memory.", ("nf4", "fp4", "int8", "none"))
    dtype: str = choice(
        "auto",
        "Arithmetic of activations: auto is bfloat16 on CUDA and float32 on a CPU.",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = text("auto", "Where the base lives: auto, cpu, cuda or cuda:N.", parse=parse_device)
    activations: Literal["exact", "int8"] = choice(
        "exact",
        "Inputs of the base's 4-bit linears on a CPU: exact, or rounded to 8 bits, which is faster. The difference is "
        "measured at start, logged, and shown by `GET /ready`.",
        ("exact", "int8"),
    )
    sketch_head: bool = switch(
        True,
        "On a CPU, keep the head once more, rounded to 8 bits: greedy tokens are found reading half as much, and are "
        "the same ones.",
    )
    threads: int | None = whole(None, "Compute threads of the engine.", within=(1, 1024), shown="one per core")
    max_model_len: int | None = whole(
        None,
        "Longest prompt and completion together, in tokens.",
        within=(16, 2**24),
        shown="the model's own, or what the KV cache holds",
    )
    generation_config: str = text(
        "auto",
        "Where default sampling values come from: the model's own generation_config.json (auto), another directory's, "
        "or none.",
    )

    # --- where things are kept
    data_dir: Path = path(default_data_dir, "Adapters, files and jobs: durable data.", shown="~/.local/share/lorakeet")
    cache_dir: Path = path(
        default_cache_dir,
        "Fetched models and quantised weights: data that can be made again.",
        shown="~/.cache/lorakeet",
    )
    database_seconds: float = number(
        5.0,
        "How long a change waits for a database under --data-dir that another process holds; beyond it, 503.",
        within=(0.1, 60),
    )

    # --- the listener
    host: str = text("127.0.0.1", "Address to listen on.")
    port: int = whole(8000, "Port to listen on; 0 takes a free one.", within=(0, 65535))
    api_key: tuple[str, ...] = text(
        (),
        "A key that clients must send as a bearer token. Without any, everybody is served.",
        repeatable=True,
        secret=True,
    )
    allowed_origins: tuple[str, ...] = text(
        (), "An origin that browsers may call from, or *.", parse=parse_origin, repeatable=True
    )
    max_head_bytes: int = size(64 * 1024, "Largest request line and headers, together.", within=(1024, 16 * MIB))
    head_seconds: float = number(30.0, "How long they may take to arrive.", within=(0.1, 3600))
    max_body_bytes: int = size(8 * MIB, "Largest JSON body.", within=(1024, GIB))
    max_body_items: int = whole(
        2**18,
        "Most elements of lists, keys and values of objects in one JSON body, all together.",
        within=(1024, 2**32),
    )
    max_body_depth: int = whole(
        64, "Most lists and objects that may lie in one another in a JSON body, as schemas do.", within=(16, 120)
    )
    max_response_bytes: int = size(
        32 * MIB,
        "Largest JSON answer of a generation, where log-probabilities add up; a stream has no limit.",
        within=(1024, GIB),
    )
    stream_ping_seconds: float = number(
        15.0,
        "Longest silence of a stream; then it gets a comment, so that no proxy takes it for idle. 0 sends none.",
        within=(0, 3600),
    )
    keep_alive_seconds: int = whole(
        75, "How long an idle connection stays open: longer than a balancer's in front.", within=(1, 86400)
    )
    body_idle_seconds: float = number(60.0, "Longest wait for the next bytes of a body.", within=(0.1, 3600))
    min_body_rate: int = size(
        4096,
        "Slowest that a body or an upload may arrive, after ten seconds, in bytes per second; 0 allows any.",
        within=(0, GIB),
    )
    max_upload_bytes: int = size(2 * GIB, "Largest upload of one adapter or file.", within=(1024, 2**50))
    max_uploads: int = whole(4, "Uploads received at once.", within=(1, 1024))
    background_priority: Priority = choice(
        "low",
        "Priority of threads that load adapters and receive uploads: low, a tenth of a serving thread's share; idle, "
        "only while serving leaves the processor free, which may be next to never; normal, an equal share.",
        PRIORITIES,
    )
    drain_seconds: float = number(30.0, "On SIGTERM, how long requests in flight may go on.", within=(0, 86400))

    # --- the engine's memory and batches
    kv_cache_bytes: int | None = size(
        None,
        "Memory for the KV cache.",
        within=(MIB, 2**50),
        shown="a share of what is free",
        vllm="--kv-cache-memory-bytes",
    )
    kv_cache_dtype: str = choice(
        "auto",
        "Numbers of the KV cache: auto is the model's on a GPU and float32 on a CPU. Fewer bits hold more tokens; the "
        "difference is measured at start, logged, and shown by `GET /ready`.",
        ("auto", "float32", "bfloat16", "float16", "fp8", "int8"),
    )
    state_cache_bytes: int | None = size(
        None,
        "Memory for states of models with linear attention or short convolutions: those of running requests, and "
        "snapshots for the prefix cache in what is left.",
        within=(MIB, 2**50),
        shown="a share of what is free",
    )
    adapter_bytes: int | None = size(
        None, "Device memory for resident adapters.", within=(MIB, 2**50), shown="a share of what is free"
    )
    adapter_host_bytes: int = size(
        4 * GIB, "Host memory for adapters that left the device; 0 reads them from disk again.", within=(0, 2**50)
    )
    merged_bytes: int | None = size(
        None,
        "Device memory for merged weights (adapters merged into the base); 0 merges none.",
        within=(0, 2**50),
        shown="a share of what is free",
    )
    adapter_pinned_bytes: int | None = size(
        None, "How much of --adapter-bytes pinned adapters may take.", within=(0, 2**50), shown="half of it"
    )
    max_batch_tokens: int | None = whole(
        None,
        "Most tokens in one step: decodes first, then pieces of prompts.",
        within=(16, 2**20),
        shown="256 on a CPU, 2048 on CUDA",
        vllm="--max-num-batched-tokens",
    )
    max_batch_requests: int = whole(32, "Most sequences in one step.", within=(1, 4096), vllm="--max-num-seqs")
    prefix_caching: bool = switch(True, "Reuse the KV of prompts that begin alike.", vllm="--enable-prefix-caching")
    deterministic: bool = switch(
        False,
        "On a GPU, fix all tiles and splits: a request's tokens are the same to the bit whatever runs beside it, at a "
        "lower speed. On a CPU in fp32 they always are.",
    )
    speculative_tokens: int = whole(
        0,
        "Tokens that a request drafts ahead in a step, at most, when its text repeats itself; 0 is off. "
        "Requests may say otherwise.",
        within=(0, MAX_SPECULATIVE_TOKENS),
    )
    engine_start_seconds: float = number(
        3600.0,
        "How long an engine may take to load the model, quantising it the first time, before it is killed and started "
        "again; three times in a row at most.",
        within=(5, 7 * 86400),
    )
    engine_stall_seconds: float = number(
        300.0,
        "How long a loaded engine may say nothing before it is killed and started again; what waits for it gets a 503. "
        "It reports at least after every step and every piece of training.",
        within=(5, 86400),
    )

    # --- the queue
    max_queued_requests: int = whole(
        1024, "Sequences that may wait for their first token; beyond it, 429.", within=(1, 10**6)
    )
    max_queued_tokens: int = whole(2**20, "Prompt tokens that may wait; beyond it, 429.", within=(1, 2**31))

    # --- adapters
    adapter: tuple[str, ...] = text(
        (),
        "An adapter to serve from the start, as NAME=DIR or NAME=hf://OWNER/REPOSITORY[@REVISION][/FOLDER].",
        repeatable=True,
        vllm="--lora-modules",
    )
    adapter_dir: Path | None = path(
        None,
        "Each subdirectory is an adapter; read at start and when an unknown name is asked for. "
        "Versions uploaded over HTTP since then stay current until the files change.",
        shown="none",
    )
    lora_dir: Path | None = path(
        None,
        "Switches vLLM's load_lora_adapter and unload_lora_adapter on, for paths under this directory.",
        shown="off",
    )
    adapter_hub: tuple[str, ...] = text(
        (),
        "A repository of the Hugging Face Hub, as OWNER/NAME or OWNER/*, that adapters may be fetched from, by "
        "references as hf://OWNER/NAME@REVISION/FOLDER. OWNER/NAME is also fetched when it is first asked for as a "
        "model. Endpoint and token are HF_ENDPOINT and HF_TOKEN.",
        parse=parse_allowed,
        repeatable=True,
    )
    adapter_hub_seconds: float = number(600.0, "How long fetching an adapter from the hub may take.", within=(1, 86400))
    adapter_hub_retry_seconds: float = number(
        60.0, "When it is asked again for one that it could not give.", within=(0, 86400)
    )
    keep_versions: int = whole(
        5,
        "Contents of a name that are kept, the current one included; older ones answer as name@digest.",
        within=(1, 1000),
    )
    adapter_store: str | None = text(
        None,
        "Object store that keeps the adapters: s3://BUCKET/PREFIX, gs://, az:// or file:///DIR. Credentials and "
        "endpoint are read from its provider's variables (AWS_ENDPOINT_URL, ...).",
        shown="none: they are kept under --data-dir",
    )
    adapter_disk_bytes: int = size(
        16 * GIB,
        "With --adapter-store, disk for adapters that are used; those in use and pinned ones stay beyond it.",
        within=(0, 2**50),
    )
    adapter_store_seconds: float = number(
        60.0,
        "How long a request waits for its adapter to come from --adapter-store; beyond it, 503.",
        within=(0.1, 3600),
    )
    store_poll_seconds: float = number(
        2.0,
        "Within how long this server sees what others change in --adapter-store, which it lists twice in that time.",
        within=(0.1, 3600),
    )
    store_send_seconds: float = number(
        10.0,
        "With --adapter-store, how often this server sends it the usage and the changes that it wrote down, for others "
        "to show.",
        within=(0.1, 3600),
    )
    store_answer_seconds: float = number(
        15.0,
        "How long --adapter-store may send nothing in answer to a request before it is given up; a directory has no "
        "such limit.",
        within=(0.5, 3600),
    )
    store_silent_seconds: float = number(
        5.0,
        "After how long without any answer --adapter-store is taken to be down: who needs it is told so at once, until "
        "it answers again.",
        within=(0.1, 3600),
    )
    store_requests: int = whole(
        48, "Small requests to --adapter-store that wait for it at once, each in one of 64 threads.", within=(1, 60)
    )
    job_lease_seconds: float = number(
        15.0,
        "With --adapter-store, how long other servers leave a fine-tuning job, an evaluation, a batch or a response in "
        "the background to the one that works on it and is not heard of, as it would be three times in that time.",
        within=(0.5, 3600),
    )
    adapter_orphan_hours: float = number(
        24.0,
        "Age at which files in --adapter-store that no name has, and no file, job or batch needs, are removed, at "
        "start and at that interval; 0 leaves them. Longer than any upload takes.",
        within=(0, 24 * 365),
    )
    adapter_check_seconds: float = number(600.0, "How long checking an uploaded adapter may take.", within=(1, 86400))
    adapter_check_bytes: int = size(
        2 * GIB, "Memory of a process that checks uploaded adapters.", within=(256 * MIB, 2**50)
    )
    mix_seconds: float = number(600.0, "How long mixing adapters may take.", within=(1, 86400))
    merge_seconds: float = number(3600.0, "How long writing a merged checkpoint may take.", within=(1, 7 * 86400))
    verify_seconds: float = number(
        600.0, "How long PEFT may take, beside whose answers `verify` holds ours.", within=(1, 86400)
    )
    ignore_vision_adapters: bool = switch(
        False, "Serve adapters that also change a base's encoders of images or sound, without that part."
    )
    allow_adapter_chat_templates: bool = switch(
        False, "Use the chat templates that adapters bring, each rendered in a process of its own."
    )
    adapter_template_seconds: float = number(
        2.0, "How long rendering an adapter's chat template may take.", within=(0.1, 60)
    )
    adapter_template_cpu_seconds: int = whole(
        2, "Processor time for rendering an adapter's chat template, in whole seconds.", within=(1, 60)
    )
    adapter_template_bytes: int = size(
        256 * MIB, "Memory for rendering an adapter's chat template.", within=(16 * MIB, 2**40)
    )
    tool_parser: str | None = choice(
        None,
        "The format in which answers call tools, for chat templates that know tools; vLLM's names will do.",
        tuple(sorted(FORMATS)),
        renamed=TOOL_NAMES,
        shown="recognised from the template",
        vllm="--tool-call-parser",
    )
    enable_auto_tool_choice: bool = switch(True, "Changes nothing: vLLM's flag for what is always so here.")
    reasoning_parser: str = choice(
        "auto",
        "How answers tell a thought from what follows it; `auto`: by the chat template; vLLM's names will do.",
        ("auto", "none", *sorted(REASONING_FORMATS)),
        renamed=REASONING_NAMES,
    )
    grammar_seconds: float = number(
        5.0,
        "Processor time that a grammar (`response_format`, `structured_outputs`, `tools`) may take to compile.",
        within=(0.1, 600),
    )
    grammar_bytes: int = size(
        256 * MIB, "Memory for compiled grammars; one that takes more by itself is refused.", within=(16 * MIB, 2**40)
    )
    response_days: float = number(
        30.0, "How long answers of /v1/responses are kept, in days; 0: none is.", within=(0, 3650)
    )
    response_bytes: int = size(
        GIB,
        "Room for answers of /v1/responses that are kept, on this disk or in --adapter-store for all its servers; the "
        "oldest go first.",
        within=(MIB, 2**50),
    )
    response_sweep_seconds: float = number(
        300.0,
        "With --adapter-store, how often this server lists the answers that are kept there, to count tenants' bytes "
        "and to remove those that are too old or too many.",
        within=(1, 86_400),
    )
    audit_bytes: int = size(
        16 * MIB,
        "Size of audit.jsonl under --data-dir, the log of changes, at which the next is begun; four older ones stay.",
        within=(4096, 2**40),
    )

    # --- batches
    batch_requests: int = whole(
        8,
        "Requests of `/v1/batches` that are under way at once, in steps that no client's request can use.",
        within=(1, 4096),
    )
    batch_wait_seconds: float = number(
        60.0,
        "After so long a request of a batch no longer waits for steps that clients leave free, one at a time.",
        within=(0.0, 86_400.0),
    )
    batch_file_requests: int = whole(50_000, "Most requests in a batch's file.", within=(1, 10_000_000))

    # --- fine-tuning
    evaluation_requests: int = whole(
        8,
        "Requests of evaluations that are in the engine at once; with --adapter-store also how many evaluations this "
        "server takes at once.",
        within=(1, 4096),
    )
    max_training_jobs: int = whole(
        2,
        "Fine-tuning jobs that train at once; the rest are queued, or with --adapter-store taken by other servers, to "
        "which 0 leaves all.",
        within=(0, 1024),
    )
    finetune_max_stall_ms: float = number(
        20.0, "Training, or merging, between two inference steps, at most.", within=(1, 60_000)
    )
    finetune_share: float = number(
        0.3, "Share of the device's time that training may take while requests run.", within=(0, 0.9)
    )
    merge_share: float = number(
        0.3, "Share of the device's time that building a merge may take while requests run.", within=(0, 0.9)
    )

    # --- watching it
    metrics_adapters: int = whole(
        50, "Adapters with metric series of their own; the rest share one.", within=(0, 10_000)
    )
    metrics_tenants: int = whole(50, "Tenants with metric series of their own; the rest share one.", within=(0, 10_000))
    metrics_prefix: str = text(
        "lorakeet",
        "What metric names begin with, before a colon: vllm where dashboards, alerts or gateways expect vLLM's names.",
        parse=parse_metrics_prefix,
    )
    guard_metrics: bool = switch(
        False, "Ask for an API key on /metrics and /ready, too; /health and /version stay open."
    )
    ui: bool = switch(True, "Serve the console, a page for people, at /ui.")
    log_level: Literal["debug", "info", "warning", "error"] = choice(
        "info", "How much is logged.", ("debug", "info", "warning", "error")
    )
    log_json: bool = switch(False, "Log one JSON object per line.")

    def __post_init__(self) -> None:
        for row in settings_fields():
            value = getattr(self, row.name)
            if value is not None:
                row.read(value, row.flag)
        if self.max_batch_tokens is not None and self.max_batch_tokens <= self.max_batch_requests:
            raise SettingError(
                f"--max-batch-tokens: {self.max_batch_tokens} leaves no room for prompts beside "
                f"{self.max_batch_requests} sequences (--max-batch-requests)"
            )
        if self.max_training_jobs == 0 and self.adapter_store is None:
            raise SettingError("--max-training-jobs: without --adapter-store there is nobody to whom 0 leaves the jobs")
        for entry in self.adapter:
            name, separator, source = entry.partition("=")
            if not (name and separator and source):
                raise SettingError(f"--adapter: {entry!r} is not NAME=DIR")
            try:
                _parse_source(source)
            except ValueError as exc:
                raise SettingError(f"--adapter: {exc}") from None
        if len(self.adapter_sources) < len(self.adapter):
            raise SettingError("--adapter: a name is given twice")

    @classmethod
    def load(cls, flags: Mapping[str, Any], environ: Mapping[str, str]) -> "Settings":
        """Settings from flags by field name (text or typed; None means not given), the environment, and defaults.

        Raises `SettingError` for a value that cannot be, naming the flag or the variable.
        """
        known = {row.name: row for row in settings_fields()}
        values = {}
        for name, row in known.items():
            given = flags.get(name)
            if given is not None and given != ():
                values[name] = row.read(given, row.flag)
            elif (written := environ.get(row.env)) and not SERVICE_LINK.fullmatch(written):
                values[name] = row.read(written, row.env)
        return cls(**values)

    @cached_property
    def base_name(self) -> str:
        """The base's name in the API."""
        return self.served_model_name or (Path(self.model).name or Path(self.model).resolve().name).removesuffix(
            ".gguf"
        )

    @cached_property
    def base_aliases(self) -> frozenset[str]:
        """Every name that means the base in a request."""
        return frozenset({self.base_name, self.model})

    @property
    def orphan_seconds(self) -> float:
        """0 without an object store, too."""
        return 0.0 if self.adapter_store is None else self.adapter_orphan_hours * 3600

    @property
    def store_patience(self) -> Patience:
        """How long `adapter_store` is waited for."""
        return Patience(self.store_answer_seconds, self.store_silent_seconds, self.store_requests)

    @property
    def adapter_sources(self) -> dict[str, Path | Reference]:
        """`adapter` as name -> where it lies."""
        pairs = (entry.partition("=") for entry in self.adapter)
        return {name: _parse_source(source) for name, _, source in pairs}


def _parse_source(written: str) -> Path | Reference:
    """Raises ValueError."""
    return Reference.parse(written) if written.startswith(SCHEME) else parse_path(written)


def settings_fields() -> list[Setting]:
    """The table, in the order of the fields."""
    return rows(Settings)
