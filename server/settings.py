"""All settings of the server: name, type, default, range and help.

The command line's flags, the `LORAKEET_*` variables and the table of docs/reference/settings.md are made from this one
definition (`server.setting_table`).
Precedence: flag, then environment, then default. Aliases exist for flags only.
"""

# ruff: noqa: RUF009  # the functions of `setting_kinds` are `dataclasses.field` with our metadata

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from adapters.background import PRIORITIES, Priority
from adapters.storage.silence import RequestLimits
from server.hub import SCHEME, Reference, parse_allowed
from server.model_source import DEFAULT, default_cache_dir, default_data_dir
from server.setting_kinds import (
    SERVICE_LINK,
    Setting,
    choice,
    integer,
    number,
    parse_device,
    parse_metrics_prefix,
    parse_origin,
    parse_path,
    path,
    settings_of,
    size,
    switch,
    text,
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
    """The operator's settings. Made by `Settings.load`; also checked when made directly."""

    # --- the base model
    model: str = text(
        DEFAULT, "The base: a directory in Hugging Face layout, a .gguf file, a hub id, or a built-in name."
    )
    served_model_name: str | None = text(
        None, "The base's name in the API.", default_text="the last part of the model's name"
    )
    quantization: str = choice("nf4", "Quantisation of the base in memory.", ("nf4", "fp4", "int8", "none"))
    dtype: str = choice(
        "auto",
        "Arithmetic of activations: auto is bfloat16 on CUDA and float32 on a CPU.",
        ("auto", "float32", "bfloat16", "float16"),
    )
    device: str = text("auto", "The base's device: auto, cpu, cuda or cuda:N.", parse=parse_device)
    activations: Literal["exact", "int8"] = choice(
        "exact",
        "Inputs of the base's 4-bit linears on a CPU: exact, or rounded to 8 bits, which is faster. The difference is "
        "measured at start, logged, and shown by `GET /ready`.",
        ("exact", "int8"),
    )
    sketch_head: bool = switch(
        True,
        "On a CPU, keep an int8 screening copy of the head: greedy sampling reads half as much for the same tokens.",
    )
    threads: int | None = integer(None, "Compute threads of the engine.", bounds=(1, 1024), default_text="one per core")
    max_model_len: int | None = integer(
        None,
        "Longest prompt and completion together, in tokens.",
        bounds=(16, 2**24),
        default_text="the model's own, or the KV cache's tokens",
    )
    generation_config: str = text(
        "auto",
        "Source of default sampling values: the model's generation_config.json (auto), another directory's, or none.",
    )

    # --- directories and databases
    data_dir: Path = path(
        default_data_dir, "Adapters, files and jobs: durable data.", default_text="~/.local/share/lorakeet"
    )
    cache_dir: Path = path(
        default_cache_dir,
        "Fetched models and quantised weights: data that can be made again.",
        default_text="~/.cache/lorakeet",
    )
    database_seconds: float = number(
        5.0,
        "Longest wait of a change for a database under --data-dir that another process has locked; beyond it, 503.",
        bounds=(0.1, 60),
    )

    # --- the listener
    host: str = text("127.0.0.1", "Address to listen on.")
    port: int = integer(8000, "Port to listen on; 0 takes a free one.", bounds=(0, 65535))
    api_key: tuple[str, ...] = text(
        (),
        "An API key, which clients send as a bearer token. Without any key, all requests are served.",
        repeatable=True,
        secret=True,
    )
    allowed_origins: tuple[str, ...] = text(
        (), "An allowed origin of browsers' requests, or *.", parse=parse_origin, repeatable=True
    )
    max_head_bytes: int = size(64 * 1024, "Largest request line and headers, together.", bounds=(1024, 16 * MIB))
    head_seconds: float = number(30.0, "Longest time for request line and headers to arrive.", bounds=(0.1, 3600))
    max_body_bytes: int = size(8 * MIB, "Largest JSON body.", bounds=(1024, GIB))
    max_body_items: int = integer(
        2**18,
        "Most list elements, object keys and object values in one JSON body, in total.",
        bounds=(1024, 2**32),
    )
    max_body_depth: int = integer(
        64, "Deepest nesting of lists and objects in a JSON body, schemas included.", bounds=(16, 120)
    )
    max_response_bytes: int = size(
        32 * MIB,
        "Largest JSON response of a generation, such as one with many log-probabilities; a stream has no limit.",
        bounds=(1024, GIB),
    )
    stream_ping_seconds: float = number(
        15.0,
        "Longest silence of a stream; then it gets a comment, so that proxies do not close it as idle. 0 sends none.",
        bounds=(0, 3600),
    )
    keep_alive_seconds: int = integer(
        75, "How long an idle connection stays open; should exceed that of a load balancer.", bounds=(1, 86400)
    )
    body_idle_seconds: float = number(60.0, "Longest wait for the next bytes of a body.", bounds=(0.1, 3600))
    min_body_rate: int = size(
        4096,
        "Lowest rate of a body or an upload, after ten seconds, in bytes per second; 0 allows any.",
        bounds=(0, GIB),
    )
    max_upload_bytes: int = size(2 * GIB, "Largest upload of one adapter or file.", bounds=(1024, 2**50))
    max_uploads: int = integer(4, "Uploads received at once.", bounds=(1, 1024))
    background_priority: Priority = choice(
        "low",
        "Priority of threads that load adapters and receive uploads: low, a tenth of a serving thread's share; idle, "
        "only while serving leaves the processor free, which may be hardly ever; normal, an equal share.",
        PRIORITIES,
    )
    drain_seconds: float = number(30.0, "On SIGTERM, how long requests in flight may continue.", bounds=(0, 86400))

    # --- the engine's memory and batches
    kv_cache_bytes: int | None = size(
        None,
        "Memory for the KV cache.",
        bounds=(MIB, 2**50),
        default_text="a share of free memory",
        vllm="--kv-cache-memory-bytes",
    )
    kv_cache_dtype: str = choice(
        "auto",
        "Data type of the KV cache: auto is the model's on a GPU and float32 on a CPU. Fewer bits hold more tokens; "
        "the difference is measured at start, logged, and shown by `GET /ready`.",
        ("auto", "float32", "bfloat16", "float16", "fp8", "int8"),
    )
    state_cache_bytes: int | None = size(
        None,
        "Memory for states of models with linear attention or short convolutions: those of running requests, and in "
        "the rest snapshots for the prefix cache.",
        bounds=(MIB, 2**50),
        default_text="a share of free memory",
    )
    adapter_bytes: int | None = size(
        None, "Device memory for resident adapters.", bounds=(MIB, 2**50), default_text="a share of free memory"
    )
    adapter_host_bytes: int = size(
        4 * GIB, "Host memory for adapters evicted from the device; 0 reads them from disk again.", bounds=(0, 2**50)
    )
    merged_bytes: int | None = size(
        None,
        "Device memory for merged weights (adapters merged into the base); 0 merges none.",
        bounds=(0, 2**50),
        default_text="a share of free memory",
    )
    adapter_pinned_bytes: int | None = size(
        None, "Largest part of --adapter-bytes for pinned adapters.", bounds=(0, 2**50), default_text="half of it"
    )
    max_batch_tokens: int | None = integer(
        None,
        "Most tokens in one step: decodes first, then chunks of prompts.",
        bounds=(16, 2**20),
        default_text="256 on a CPU, 2048 on CUDA",
        vllm="--max-num-batched-tokens",
    )
    max_batch_requests: int = integer(32, "Most sequences in one step.", bounds=(1, 4096), vllm="--max-num-seqs")
    prefix_caching: bool = switch(
        True, "Reuse the KV of prompts with the same beginning.", vllm="--enable-prefix-caching"
    )
    deterministic: bool = switch(
        False,
        "On a GPU, fix all tiles and splits: a request's results are the same to the bit for any other requests in the "
        "batch, at a lower speed. On a CPU in fp32 they always are.",
    )
    speculative_tokens: int = integer(
        0,
        "Most draft tokens of a request in a step, when its text repeats itself; 0 is off. Requests may override it.",
        bounds=(0, MAX_SPECULATIVE_TOKENS),
    )
    engine_start_seconds: float = number(
        3600.0,
        "How long an engine may take to load the model, and to quantise it the first time, before it is killed and "
        "started again; at most three times in a row.",
        bounds=(5, 7 * 86400),
    )
    engine_stall_seconds: float = number(
        300.0,
        "How long a loaded engine may be silent before it is killed and started again; requests waiting for it get a "
        "503. It reports at least after every step and every piece of training.",
        bounds=(5, 86400),
    )

    # --- the queue
    max_queued_requests: int = integer(
        1024, "Sequences that may wait for their first token; beyond it, 429.", bounds=(1, 10**6)
    )
    max_queued_tokens: int = integer(2**20, "Prompt tokens that may wait; beyond it, 429.", bounds=(1, 2**31))

    # --- adapters
    adapter: tuple[str, ...] = text(
        (),
        "An adapter to serve from the start, as NAME=DIR or NAME=hf://OWNER/REPOSITORY[@REVISION][/FOLDER].",
        repeatable=True,
        vllm="--lora-modules",
    )
    adapter_dir: Path | None = path(
        None,
        "Each subdirectory is an adapter; read at start and when an unknown name is requested. "
        "Versions uploaded over HTTP since then stay current until the files change.",
        default_text="none",
    )
    lora_dir: Path | None = path(
        None,
        "Enables vLLM's load_lora_adapter and unload_lora_adapter, for paths under this directory.",
        default_text="off",
    )
    adapter_hub: tuple[str, ...] = text(
        (),
        "An allowed repository of adapters on the Hugging Face Hub, as OWNER/NAME or OWNER/*; references have the form "
        "hf://OWNER/NAME@REVISION/FOLDER. OWNER/NAME is also fetched when it is first requested as a model. Endpoint "
        "and token are HF_ENDPOINT and HF_TOKEN.",
        parse=parse_allowed,
        repeatable=True,
    )
    adapter_hub_seconds: float = number(600.0, "How long fetching an adapter from the hub may take.", bounds=(1, 86400))
    adapter_hub_retry_seconds: float = number(
        60.0, "Time after which a failed fetch from the hub may be repeated.", bounds=(0, 86400)
    )
    keep_versions: int = integer(
        5,
        "Versions of a name that are kept, the current one included; older ones are requested as name@digest.",
        bounds=(1, 1000),
    )
    adapter_store: str | None = text(
        None,
        "Object store of adapters: s3://BUCKET/PREFIX, gs://, az:// or file:///DIR. Credentials and "
        "endpoint are read from its provider's variables (AWS_ENDPOINT_URL, ...).",
        default_text="none: they are stored under --data-dir",
    )
    adapter_disk_bytes: int = size(
        16 * GIB,
        "With --adapter-store, disk space for the adapters used last; those in use and pinned ones stay beyond it.",
        bounds=(0, 2**50),
    )
    adapter_store_seconds: float = number(
        60.0,
        "Longest wait of a request for its adapter's files from --adapter-store; beyond it, 503.",
        bounds=(0.1, 3600),
    )
    store_poll_seconds: float = number(
        2.0,
        "Time within which this server sees other servers' changes in --adapter-store, which it lists twice in it.",
        bounds=(0.1, 3600),
    )
    store_send_seconds: float = number(
        10.0,
        "With --adapter-store, interval at which this server sends its usage and its audit log there, for other "
        "servers to show.",
        bounds=(0.1, 3600),
    )
    store_answer_seconds: float = number(
        15.0,
        "Longest silence of --adapter-store while it answers a request; then it fails. A directory has no such limit.",
        bounds=(0.5, 3600),
    )
    store_silent_seconds: float = number(
        5.0,
        "Time without any answer after which --adapter-store counts as down: requests that need it fail at once, until "
        "it answers again.",
        bounds=(0.1, 3600),
    )
    store_requests: int = integer(
        48, "Limit of concurrent small requests to --adapter-store, each in one of 64 threads.", bounds=(1, 60)
    )
    job_lease_seconds: float = number(
        15.0,
        "With --adapter-store, a server's lease on a fine-tuning job, an evaluation, a batch or a background response, "
        "renewed three times in that time; without a renewal for so long, other servers take it over.",
        bounds=(0.5, 3600),
    )
    adapter_orphan_hours: float = number(
        24.0,
        "Age at which unneeded objects in --adapter-store (without a name, file, job or batch) are removed, at start "
        "and at that interval; 0 leaves them. Must exceed the duration of any upload.",
        bounds=(0, 24 * 365),
    )
    adapter_check_seconds: float = number(600.0, "How long checking an uploaded adapter may take.", bounds=(1, 86400))
    adapter_check_bytes: int = size(
        2 * GIB, "Memory of a process that checks uploaded adapters.", bounds=(256 * MIB, 2**50)
    )
    mix_seconds: float = number(600.0, "How long mixing adapters may take.", bounds=(1, 86400))
    merge_seconds: float = number(3600.0, "How long writing a merged checkpoint may take.", bounds=(1, 7 * 86400))
    verify_seconds: float = number(
        600.0, "How long PEFT may take for the results with which `verify` compares ours.", bounds=(1, 86400)
    )
    ignore_vision_adapters: bool = switch(
        False, "Serve adapters that also change a base's image or audio encoders, and ignore that part."
    )
    allow_adapter_chat_templates: bool = switch(
        False, "Use adapters' own chat templates, each rendering in a process of its own."
    )
    adapter_template_seconds: float = number(
        2.0, "How long rendering an adapter's chat template may take.", bounds=(0.1, 60)
    )
    adapter_template_cpu_seconds: int = integer(
        2, "Processor time for rendering an adapter's chat template, in whole seconds.", bounds=(1, 60)
    )
    adapter_template_bytes: int = size(
        256 * MIB, "Memory for rendering an adapter's chat template.", bounds=(16 * MIB, 2**40)
    )
    tool_parser: str | None = choice(
        None,
        "Format of tool calls in answers, for chat templates that know tools; vLLM's names are accepted.",
        tuple(sorted(FORMATS)),
        synonyms=TOOL_NAMES,
        default_text="recognised from the template",
        vllm="--tool-call-parser",
    )
    enable_auto_tool_choice: bool = switch(True, "No effect: vLLM's flag for a behaviour that is always on.")
    reasoning_parser: str = choice(
        "auto",
        "Format of thoughts in answers; `auto`: recognised from the chat template; vLLM's names are accepted.",
        ("auto", "none", *sorted(REASONING_FORMATS)),
        synonyms=REASONING_NAMES,
    )
    grammar_seconds: float = number(
        5.0,
        "Processor time that a grammar (`response_format`, `structured_outputs`, `tools`) may take to compile.",
        bounds=(0.1, 600),
    )
    grammar_bytes: int = size(
        256 * MIB, "Memory for compiled grammars; a single one beyond it is refused.", bounds=(16 * MIB, 2**40)
    )
    response_days: float = number(
        30.0, "How long responses of /v1/responses are kept, in days; 0 keeps none.", bounds=(0, 3650)
    )
    response_bytes: int = size(
        GIB,
        "Space for kept responses of /v1/responses, on this disk or in --adapter-store for all its servers; the oldest "
        "are removed first.",
        bounds=(MIB, 2**50),
    )
    response_sweep_seconds: float = number(
        300.0,
        "With --adapter-store, interval at which this server lists the kept responses there, to count tenants' bytes "
        "and to remove old ones and those beyond the space.",
        bounds=(1, 86_400),
    )
    audit_bytes: int = size(
        16 * MIB,
        "Size of the audit log, audit.jsonl under --data-dir, at which a new one is started; four older ones stay.",
        bounds=(4096, 2**40),
    )

    # --- batches
    batch_requests: int = integer(
        8,
        "Concurrent requests of `/v1/batches`, which run in steps without clients' requests.",
        bounds=(1, 4096),
    )
    batch_wait_seconds: float = number(
        60.0,
        "Longest wait of a batch's request for such steps; then it runs beside clients' requests, one at a time.",
        bounds=(0.0, 86_400.0),
    )
    batch_file_requests: int = integer(50_000, "Most requests in a batch's file.", bounds=(1, 10_000_000))

    # --- fine-tuning
    evaluation_requests: int = integer(
        8,
        "Concurrent requests of evaluations in the engine; with --adapter-store also the evaluations that this server "
        "runs at once.",
        bounds=(1, 4096),
    )
    max_training_jobs: int = integer(
        2,
        "Fine-tuning jobs that train at once; the rest are queued, or with --adapter-store taken by other servers; 0 "
        "leaves all to these.",
        bounds=(0, 1024),
    )
    finetune_max_stall_ms: float = number(
        20.0, "Longest training, or merging, between two inference steps.", bounds=(1, 60_000)
    )
    finetune_share: float = number(
        0.3, "Share of the device's time that training may take while requests run.", bounds=(0, 0.9)
    )
    merge_share: float = number(
        0.3, "Share of the device's time that building a merge may take while requests run.", bounds=(0, 0.9)
    )

    # --- metrics, console and logs
    metrics_adapters: int = integer(
        50, "Adapters with metric series of their own; the rest share one.", bounds=(0, 10_000)
    )
    metrics_tenants: int = integer(
        50, "Tenants with metric series of their own; the rest share one.", bounds=(0, 10_000)
    )
    metrics_prefix: str = text(
        "lorakeet",
        "Prefix of metric names, before a colon: vllm where dashboards, alerts or gateways expect vLLM's names.",
        parse=parse_metrics_prefix,
    )
    guard_metrics: bool = switch(
        False, "Require an API key on /metrics and /ready, too; /health and /version stay open."
    )
    ui: bool = switch(True, "Serve the console, a page for people, at /ui.")
    log_level: Literal["debug", "info", "warning", "error"] = choice(
        "info", "Lowest level of logged records.", ("debug", "info", "warning", "error")
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
            raise SettingError("--max-training-jobs: 0 needs --adapter-store, where other servers take the jobs")
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
        """Make settings from flags by field name (text or typed; None: not given), the environment, and defaults.

        Raises `SettingError` for an invalid value, naming the flag or the variable.
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
        """All names of the base in requests."""
        return frozenset({self.base_name, self.model})

    @property
    def orphan_seconds(self) -> float:
        """`adapter_orphan_hours` in seconds; 0 without an object store, too."""
        return 0.0 if self.adapter_store is None else self.adapter_orphan_hours * 3600

    @property
    def store_request_limits(self) -> RequestLimits:
        """The timeouts and the number of concurrent requests for `adapter_store`."""
        return RequestLimits(self.store_answer_seconds, self.store_silent_seconds, self.store_requests)

    @property
    def adapter_sources(self) -> dict[str, Path | Reference]:
        """`adapter` as name -> directory or reference to the hub."""
        pairs = (entry.partition("=") for entry in self.adapter)
        return {name: _parse_source(source) for name, _, source in pairs}


def _parse_source(written: str) -> Path | Reference:
    """Parse the source of an adapter. Raises ValueError."""
    return Reference.parse(written) if written.startswith(SCHEME) else parse_path(written)


def settings_fields() -> list[Setting]:
    """Return all settings, in the order of the fields."""
    return settings_of(Settings)
