"""Every setting of the server, once: its name, type, default, range and explanation.

The command line's flags, the `LORAKEET_*` variables and the table of docs/reference/settings.md are made from this one
definition.
Precedence: flag, then environment, then default. Aliases are flags only.
"""

# ruff: noqa: RUF009  # `_setting` is `dataclasses.field` with our metadata

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from adapters.background import PRIORITIES, Priority
from server.model_source import DEFAULT, default_cache_dir, default_data_dir
from server.text.reasoning import REASONING_FORMATS
from server.text.reasoning import VLLM_NAMES as REASONING_NAMES
from server.text.tools.table import FORMATS
from server.text.tools.table import VLLM_NAMES as TOOL_NAMES

log = logging.getLogger(__name__)

ENV_PREFIX = "LORAKEET_"
MAX_SPECULATIVE_TOKENS = 32
GIB = 1024**3
MIB = 1024**2

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://.*")  # what Kubernetes sets LORAKEET_PORT to beside a Service `lorakeet`
# Variables of others: clients, kernels, deploy/ray, and those that Kubernetes makes of Services.
_NO_SETTING = re.compile(r"URL|NATIVE|TRITON|RAY_\w+|\w*SERVICE_\w+|\w*PORT(_\w+)?")
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # as Python has such bytes of the system; no JSON can have them
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class SettingError(ValueError):
    """A setting has a value it cannot have. The message names the flag or the variable."""


def parse_size(text: str) -> int:
    """Bytes from `1048576`, `512MiB`, `2GiB`, `1.5 GB`. `KiB` counts in 1024, `KB` in 1000, `K` in 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a size such as 512MiB or 2GiB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    decimal = bool(prefix) and not binary and text.strip().lower().endswith("b")
    return int(float(number) * (1000 if decimal else 1024) ** power)


def parse_bool(text: str) -> bool:
    """A yes or a no as people write it in the environment."""
    if (word := text.strip().lower()) in _TRUE | _FALSE:
        return word in _TRUE
    raise ValueError("expected true or false")


def _integer(text: str) -> int:
    if re.fullmatch(r"[+-]?\d{1,18}", text.strip()):
        return int(text)
    raise ValueError("expected a whole number")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def _path(text: str) -> Path:
    if not text:
        raise ValueError("expected a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text} begins with nobody's home directory") from None


def _device(text: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", text):
        raise ValueError("expected auto, cpu, cuda or cuda:N")
    return text


def _origin(text: str) -> str:
    """As browsers write them, letter by letter."""
    if not re.fullmatch(r"(?i)\*|null|[a-z][a-z0-9+.-]*://[^/?#@]+", text):
        raise ValueError(f"{text!r} is neither * nor an origin such as https://example.com, without a slash at its end")
    return text.lower()


def _metrics_prefix(text: str) -> str:
    if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", text):
        raise ValueError("expected letters, digits and underscores, no digit first")
    return text


def _text(text: str) -> str:
    if not text:
        raise ValueError("expected a value")
    return text


def _renamed(names: Mapping[str, str]) -> Callable[[str], str]:
    return lambda text: names.get(text, _text(text))


@dataclass(frozen=True)
class Setting:
    """One row of the table: how a setting is called, read, checked and explained."""

    name: str
    help: str
    default: Any
    shown_default: str
    parse: Callable[[str], Any]
    choices: tuple[str, ...] | None
    minimum: float | None
    maximum: float | None
    repeatable: bool
    aliases: tuple[str, ...]

    @property
    def flag(self) -> str:
        """The command line's flag. A boolean also has `--no-...`."""
        return "--" + self.name.replace("_", "-")

    @property
    def declarations(self) -> list[str]:
        """The flag and its aliases, as typer declares options."""
        return [f"{flag}/--no-{flag[2:]}" if self.is_bool else flag for flag in (self.flag, *self.aliases)]

    @property
    def env(self) -> str:
        """The environment variable. A repeatable setting takes comma-separated values there."""
        return ENV_PREFIX + self.name.upper()

    @property
    def is_bool(self) -> bool:
        """Whether the flag takes no value."""
        return self.parse is parse_bool

    def read(self, given: Any, source: str) -> Any:
        """The typed value of `given`: text, several texts, or a value that is typed already."""
        try:
            if self.repeatable:
                values = [v for v in given.split(",") if v] or [""] if isinstance(given, str) else given
                return tuple(self._check(self.parse(v.strip()) if isinstance(v, str) else v) for v in values)
            return self._check(self.parse(given) if isinstance(given, str) else given)
        except ValueError as exc:
            raise SettingError(f"{source}: {exc}") from None

    def _check(self, value: Any) -> Any:
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(self.choices)}")
        if isinstance(value, str | Path) and _NOT_UTF8.search(str(value)):
            raise ValueError(f"{str(value)!r} is not UTF-8")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not (self.minimum is None or value >= self.minimum):
                raise ValueError(f"{value} is less than {self.minimum}")
            if not (self.maximum is None or value <= self.maximum):
                raise ValueError(f"{value} is more than {self.maximum}")
        return value


def _setting(
    default: Any,
    help: str,  # noqa: A002  # argparse's and typer's own word for it
    *,
    parse: Callable[[str], Any] = _text,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    repeatable: bool = False,
    shown: str | None = None,
    secret: bool = False,
    vllm: str | None = None,
) -> Any:
    metadata = {
        "help": help,
        "parse": parse,
        "choices": tuple(choices) if choices else None,
        "minimum": minimum,
        "maximum": maximum,
        "repeatable": repeatable,
        "shown": shown,
        "aliases": (vllm,) if vllm else (),  # flags by which vLLM's users look for it
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The operator's choices. Made by `Settings.load`; checked also when built directly."""

    # --- the base model
    model: str = _setting(
        DEFAULT,
        "The base: a directory in Hugging Face layout, a .gguf file, a hub id, or a built-in name.",
    )
    served_model_name: str | None = _setting(
        None, "The base's name in the API.", shown="the last part of the model's name"
    )
    quantization: str = _setting("nf4", "How the base is held in memory.", choices=("nf4", "fp4", "int8", "none"))
    dtype: str = _setting(
        "auto",
        "Arithmetic of activations: auto is bfloat16 on CUDA and float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _setting("auto", "Where the base lives: auto, cpu, cuda or cuda:N.", parse=_device)
    activations: Literal["exact", "int8"] = _setting(
        "exact",
        "Inputs of the base's 4-bit linears on a CPU: exact, or rounded to 8 bits, which is faster. The difference is "
        "measured at start, logged, and shown by `GET /ready`.",
        choices=("exact", "int8"),
    )
    sketch_head: bool = _setting(
        True,
        "On a CPU, keep the head once more, rounded to 8 bits: greedy tokens are found reading half as much, and are "
        "the same ones.",
        parse=parse_bool,
    )
    threads: int | None = _setting(
        None, "Compute threads of the engine.", parse=_integer, minimum=1, maximum=1024, shown="one per core"
    )
    max_model_len: int | None = _setting(
        None,
        "Longest prompt and completion together, in tokens.",
        parse=_integer,
        minimum=16,
        maximum=2**24,
        shown="the model's own, or what the KV cache holds",
    )

    generation_config: str = _setting(
        "auto",
        "Where default sampling values come from: the model's own generation_config.json (auto), another directory's, "
        "or none.",
    )

    # --- where things are kept
    data_dir: Path = _setting(
        default_data_dir,
        "Adapters, files and jobs: durable data.",
        parse=_path,
        shown="~/.local/share/lorakeet",
    )
    cache_dir: Path = _setting(
        default_cache_dir,
        "Fetched models and quantised weights: data that can be made again.",
        parse=_path,
        shown="~/.cache/lorakeet",
    )
    database_seconds: float = _setting(
        5.0,
        "How long a change waits for a database under --data-dir that another process holds; beyond it, 503.",
        parse=_number,
        minimum=0.1,
        maximum=60,
    )

    # --- the listener
    host: str = _setting("127.0.0.1", "Address to listen on.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.", parse=_integer, minimum=0, maximum=65535)
    api_key: tuple[str, ...] = _setting(
        (), "A key that clients must send as a bearer token. Without any, everybody is served.", repeatable=True,
        shown="none", secret=True,
    )  # fmt: skip
    allowed_origins: tuple[str, ...] = _setting(
        (), "An origin that browsers may call from, or *.", parse=_origin, repeatable=True, shown="none"
    )
    max_body_bytes: int = _setting(
        8 * MIB, "Largest JSON body.", parse=parse_size, minimum=1024, maximum=GIB, shown="8MiB"
    )
    max_body_items: int = _setting(
        2**18,
        "Most elements of lists, keys and values of objects in one JSON body, all together.",
        parse=_integer,
        minimum=1024,
        maximum=2**32,
    )
    max_response_bytes: int = _setting(
        32 * MIB,
        "Largest JSON answer of a generation, where log-probabilities add up; a stream has no limit.",
        parse=parse_size,
        minimum=1024,
        maximum=GIB,
        shown="32MiB",
    )
    min_body_rate: int = _setting(
        4096,
        "Slowest that a body or an upload may arrive, after ten seconds, in bytes per second; 0 allows any.",
        parse=parse_size,
        minimum=0,
        maximum=GIB,
        shown="4KiB",
    )
    max_upload_bytes: int = _setting(
        2 * GIB, "Largest upload of one adapter or file.", parse=parse_size, minimum=1024, maximum=2**50, shown="2GiB"
    )
    max_uploads: int = _setting(4, "Uploads received at once.", parse=_integer, minimum=1, maximum=1024)
    background_priority: Priority = _setting(
        "low",
        "Priority of threads that load adapters and receive uploads: low, a tenth of a serving thread's share; idle, "
        "only while serving leaves the processor free, which may be next to never; normal, an equal share.",
        choices=PRIORITIES,
    )
    drain_seconds: float = _setting(
        30.0, "On SIGTERM, how long requests in flight may go on.", parse=_number, minimum=0, maximum=86400
    )

    # --- the engine's memory and batches
    kv_cache_bytes: int | None = _setting(
        None,
        "Memory for the KV cache.",
        parse=parse_size,
        minimum=MIB,
        maximum=2**50,
        shown="a share of what is free",
        vllm="--kv-cache-memory-bytes",
    )
    kv_cache_dtype: str = _setting(
        "auto",
        "Numbers of the KV cache: auto is the model's on a GPU and float32 on a CPU. Fewer bits hold more tokens; the "
        "difference is measured at start, logged, and shown by `GET /ready`.",
        choices=("auto", "float32", "bfloat16", "float16", "fp8", "int8"),
    )
    state_cache_bytes: int | None = _setting(
        None,
        "Memory for states of models with linear attention or short convolutions: those of running requests, and "
        "snapshots for the prefix cache in what is left.",
        parse=parse_size,
        minimum=MIB,
        maximum=2**50,
        shown="a share of what is free",
    )
    adapter_bytes: int | None = _setting(
        None,
        "Device memory for resident adapters.",
        parse=parse_size,
        minimum=MIB,
        maximum=2**50,
        shown="a share of what is free",
    )
    adapter_host_bytes: int = _setting(
        4 * GIB,
        "Host memory for adapters that left the device; 0 reads them from disk again.",
        parse=parse_size,
        minimum=0,
        maximum=2**50,
        shown="4GiB",
    )
    merged_bytes: int | None = _setting(
        None,
        "Device memory for merged weights (adapters merged into the base); 0 merges none.",
        parse=parse_size,
        minimum=0,
        maximum=2**50,
        shown="a share of what is free",
    )
    adapter_pinned_bytes: int | None = _setting(
        None,
        "How much of --adapter-bytes pinned adapters may take.",
        parse=parse_size,
        minimum=0,
        maximum=2**50,
        shown="half of it",
    )
    max_batch_tokens: int | None = _setting(
        None,
        "Most tokens in one step: decodes first, then pieces of prompts.",
        parse=_integer,
        minimum=16,
        maximum=2**20,
        shown="256 on a CPU, 2048 on CUDA",
        vllm="--max-num-batched-tokens",
    )
    max_batch_requests: int = _setting(
        32, "Most sequences in one step.", parse=_integer, minimum=1, maximum=4096, vllm="--max-num-seqs"
    )
    prefix_caching: bool = _setting(
        True, "Reuse the KV of prompts that begin alike.", parse=parse_bool, vllm="--enable-prefix-caching"
    )
    deterministic: bool = _setting(
        False,
        "On a GPU, fix all tiles and splits: a request's tokens are the same to the bit whatever runs beside it, at a "
        "lower speed. On a CPU in fp32 they always are.",
        parse=parse_bool,
    )

    speculative_tokens: int = _setting(
        0,
        "Tokens that a request drafts ahead in a step, at most, when its text repeats itself; 0 is off. "
        "Requests may say otherwise.",
        parse=_integer,
        minimum=0,
        maximum=MAX_SPECULATIVE_TOKENS,
    )

    engine_start_seconds: float = _setting(
        3600.0,
        "How long an engine may take to load the model, quantising it the first time, before it is killed and started "
        "again; three times in a row at most.",
        parse=_number,
        minimum=5,
        maximum=7 * 86400,
    )
    engine_stall_seconds: float = _setting(
        300.0,
        "How long a loaded engine may say nothing before it is killed and started again; what waits for it gets a 503. "
        "It reports at least after every step and every piece of training.",
        parse=_number,
        minimum=5,
        maximum=86400,
    )

    # --- the queue
    max_queued_requests: int = _setting(
        1024, "Sequences that may wait for their first token; beyond it, 429.", parse=_integer, minimum=1, maximum=10**6
    )
    max_queued_tokens: int = _setting(
        2**20, "Prompt tokens that may wait; beyond it, 429.", parse=_integer, minimum=1, maximum=2**31
    )

    # --- adapters
    adapter: tuple[str, ...] = _setting(
        (), "An adapter to serve from the start, as NAME=DIR.", repeatable=True, shown="none", vllm="--lora-modules"
    )
    adapter_dir: Path | None = _setting(
        None,
        "Each subdirectory is an adapter; read at start and when an unknown name is asked for. "
        "Versions uploaded over HTTP since then stay current until the files change.",
        parse=_path,
        shown="none",
    )
    lora_dir: Path | None = _setting(
        None,
        "Switches vLLM's load_lora_adapter and unload_lora_adapter on, for paths under this directory.",
        parse=_path,
        shown="off",
    )
    keep_versions: int = _setting(
        5,
        "Contents of a name that are kept, the current one included; older ones answer as name@digest.",
        parse=_integer,
        minimum=1,
        maximum=1000,
    )

    adapter_store: str | None = _setting(
        None,
        "Object store that keeps the adapters: s3://BUCKET/PREFIX, gs://, az:// or file:///DIR. Credentials and "
        "endpoint are read from its provider's variables (AWS_ENDPOINT_URL, ...).",
        shown="none: they are kept under --data-dir",
    )
    adapter_disk_bytes: int = _setting(
        16 * GIB,
        "With --adapter-store, disk for adapters that are used; those in use and pinned ones stay beyond it.",
        parse=parse_size,
        minimum=0,
        maximum=2**50,
        shown="16GiB",
    )
    adapter_store_seconds: float = _setting(
        60.0,
        "How long a request waits for its adapter to come from --adapter-store; beyond it, 503.",
        parse=_number,
        minimum=0.1,
        maximum=3600,
    )

    store_poll_seconds: float = _setting(
        2.0,
        "Within how long this server sees what others change in --adapter-store, which it lists twice in that time.",
        parse=_number,
        minimum=0.1,
        maximum=3600,
    )

    job_lease_seconds: float = _setting(
        15.0,
        "With --adapter-store, how long other servers leave a fine-tuning job, an evaluation, a batch or a response in "
        "the background to the one that works on it and is not heard of, as it would be three times in that time.",
        parse=_number,
        minimum=0.5,
        maximum=3600,
    )

    adapter_orphan_hours: float = _setting(
        24.0,
        "Age at which files in --adapter-store that no name has are removed, at start and at that interval; 0 leaves "
        "them. Longer than any upload takes.",
        parse=_number,
        minimum=0,
        maximum=24 * 365,
    )
    adapter_check_seconds: float = _setting(
        600.0, "How long checking an uploaded adapter may take.", parse=_number, minimum=1, maximum=86400
    )
    adapter_check_bytes: int = _setting(
        2 * GIB,
        "Memory of a process that checks uploaded adapters.",
        parse=parse_size,
        minimum=256 * MIB,
        maximum=2**50,
        shown="2GiB",
    )
    ignore_vision_adapters: bool = _setting(
        False,
        "Serve adapters that also change a base's encoders of images or sound, without that part.",
        parse=parse_bool,
    )
    allow_adapter_chat_templates: bool = _setting(
        False, "Use the chat templates that adapters bring, each rendered in a process of its own.", parse=parse_bool
    )
    adapter_template_seconds: float = _setting(
        2.0, "How long rendering an adapter's chat template may take.", parse=_number, minimum=0.1, maximum=60
    )
    adapter_template_cpu_seconds: int = _setting(
        2,
        "Processor time for rendering an adapter's chat template, in whole seconds.",
        parse=_integer,
        minimum=1,
        maximum=60,
    )
    adapter_template_bytes: int = _setting(
        256 * MIB,
        "Memory for rendering an adapter's chat template.",
        parse=parse_size,
        minimum=16 * MIB,
        maximum=2**40,
        shown="256MiB",
    )

    tool_parser: str | None = _setting(
        None,
        "The format in which answers call tools, for chat templates that know tools; vLLM's names will do.",
        parse=_renamed(TOOL_NAMES),
        choices=tuple(sorted(FORMATS)),
        shown="recognised from the template",
        vllm="--tool-call-parser",
    )
    enable_auto_tool_choice: bool = _setting(
        True, "Changes nothing: vLLM's flag for what is always so here.", parse=parse_bool
    )
    reasoning_parser: str = _setting(
        "auto",
        "How answers tell a thought from what follows it; `auto`: by the chat template; vLLM's names will do.",
        parse=_renamed(REASONING_NAMES),
        choices=("auto", "none", *sorted(REASONING_FORMATS)),
    )
    grammar_seconds: float = _setting(
        5.0,
        "Processor time that a grammar (`response_format`, `structured_outputs`, `tools`) may take to compile.",
        parse=_number,
        minimum=0.1,
        maximum=600,
    )
    grammar_bytes: int = _setting(
        256 * MIB,
        "Memory for compiled grammars; one that takes more by itself is refused.",
        parse=parse_size,
        minimum=16 * MIB,
        maximum=2**40,
        shown="256MiB",
    )

    response_days: float = _setting(
        30.0,
        "How long answers of /v1/responses are kept, in days; 0: none is.",
        parse=_number,
        minimum=0,
        maximum=3650,
    )
    response_bytes: int = _setting(
        GIB,
        "Room for answers of /v1/responses that are kept, on this disk or in --adapter-store for all its servers; the "
        "oldest go first.",
        parse=parse_size,
        minimum=MIB,
        maximum=2**50,
        shown="1GiB",
    )
    response_sweep_seconds: float = _setting(
        300.0,
        "With --adapter-store, how often this server lists the answers that are kept there, to count tenants' bytes "
        "and to remove those that are too old or too many.",
        parse=_number,
        minimum=1,
        maximum=86_400,
    )

    audit_bytes: int = _setting(
        16 * MIB,
        "Size of audit.jsonl under --data-dir, the log of changes, at which the next is begun; four older ones stay.",
        parse=parse_size,
        minimum=4096,
        maximum=2**40,
        shown="16MiB",
    )

    # --- batches
    batch_requests: int = _setting(
        8,
        "Requests of `/v1/batches` that are under way at once, in steps that no client's request can use.",
        parse=_integer,
        minimum=1,
        maximum=4096,
    )
    batch_wait_seconds: float = _setting(
        60.0,
        "After so long a request of a batch no longer waits for steps that clients leave free, one at a time.",
        parse=_number,
        minimum=0.0,
        maximum=86_400.0,
    )
    batch_file_requests: int = _setting(
        50_000, "Most requests in a batch's file.", parse=_integer, minimum=1, maximum=10_000_000
    )

    # --- fine-tuning
    evaluation_requests: int = _setting(
        8,
        "Requests of evaluations that are in the engine at once; with --adapter-store also how many evaluations this "
        "server takes at once.",
        parse=_integer,
        minimum=1,
        maximum=4096,
    )
    max_training_jobs: int = _setting(
        2,
        "Fine-tuning jobs that train at once; the rest are queued, or with --adapter-store taken by other servers, to "
        "which 0 leaves all.",
        parse=_integer,
        minimum=0,
        maximum=1024,
    )
    finetune_max_stall_ms: float = _setting(
        20.0, "Training, or merging, between two inference steps, at most.", parse=_number, minimum=1, maximum=60_000
    )
    finetune_share: float = _setting(
        0.3,
        "Share of the device's time that training may take while requests run.",
        parse=_number,
        minimum=0,
        maximum=0.9,
    )
    merge_share: float = _setting(
        0.3,
        "Share of the device's time that building a merge may take while requests run.",
        parse=_number,
        minimum=0,
        maximum=0.9,
    )

    # --- watching it
    metrics_adapters: int = _setting(
        50, "Adapters with metric series of their own; the rest share one.", parse=_integer, minimum=0, maximum=10_000
    )
    metrics_tenants: int = _setting(
        50, "Tenants with metric series of their own; the rest share one.", parse=_integer, minimum=0, maximum=10_000
    )
    metrics_prefix: str = _setting(
        "lorakeet",
        "What metric names begin with, before a colon: vllm where dashboards, alerts or gateways expect vLLM's names.",
        parse=_metrics_prefix,
    )
    guard_metrics: bool = _setting(
        False, "Ask for an API key on /metrics and /ready, too; /health and /version stay open.", parse=parse_bool
    )
    ui: bool = _setting(True, "Serve the console, a page for people, at /ui.", parse=parse_bool)
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "How much is logged.", choices=("debug", "info", "warning", "error")
    )
    log_json: bool = _setting(False, "Log one JSON object per line.", parse=parse_bool)

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
            name, separator, directory = entry.partition("=")
            if not (name and separator and directory):
                raise SettingError(f"--adapter: {entry!r} is not NAME=DIR")
            try:
                _path(directory)
            except ValueError as exc:
                raise SettingError(f"--adapter: {exc}") from None
        if len(self.adapter_directories) < len(self.adapter):
            raise SettingError("--adapter: a name is given twice")

    @classmethod
    def load(cls, flags: Mapping[str, Any], environ: Mapping[str, str]) -> "Settings":
        """Settings from flags by field name (text or typed; None means not given), the environment, and defaults.

        Raises `SettingError` for a value that cannot be, naming the flag or the variable.
        """
        rows = {row.name: row for row in settings_fields()}
        values = {}
        for name, row in rows.items():
            given = flags.get(name)
            if given is not None and given != ():
                values[name] = row.read(given, row.flag)
            elif (text := environ.get(row.env)) and not _SERVICE_LINK.fullmatch(text):
                values[name] = row.read(text, row.env)
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
    def adapter_directories(self) -> dict[str, Path]:
        """`adapter` as name -> directory."""
        pairs = (entry.partition("=") for entry in self.adapter)
        return {name: Path(directory).expanduser() for name, _, directory in pairs}


def tell_of_unknown(environ: Mapping[str, str]) -> None:
    """Log the variables that look like settings and are none: misspelt ones."""
    known = {row.env for row in settings_fields()}
    for name in sorted(environ.keys() - known):
        if name.startswith(ENV_PREFIX) and not _NO_SETTING.fullmatch(name.removeprefix(ENV_PREFIX)):
            log.warning("%s is no setting", name)


def settings_fields() -> list[Setting]:
    """The table, in the order of the fields."""
    rows = []
    for item in fields(Settings):
        metadata = cast("Mapping[str, Any]", item.metadata)
        default = item.default
        shown = metadata["shown"] or (str(default).lower() if isinstance(default, bool) else f"{default}")
        rows.append(
            Setting(
                name=item.name,
                help=metadata["help"],
                default=default,
                shown_default=shown,
                parse=metadata["parse"],
                choices=metadata["choices"],
                minimum=metadata["minimum"],
                maximum=metadata["maximum"],
                repeatable=metadata["repeatable"],
                aliases=metadata["aliases"],
            )
        )
    return rows


def settings_table() -> str:
    """The table of docs/reference/settings.md, in Markdown."""
    lines = ["| Flag | Alias | Variable | Default | Meaning |", "|---|---|---|---|---|"]
    for row in settings_fields():
        flag, *aliases = (
            f"`{declared.replace('/', '`, `')}`" if row.default else f"`{declared.partition('/')[0]}`"
            for declared in row.declarations
        )
        meaning = row.help
        if row.choices:
            meaning += " One of " + ", ".join(f"`{choice}`" for choice in row.choices) + "."
        if row.repeatable:
            meaning += " Repeatable; comma-separated in the variable."
        lines.append(f"| {flag} | {', '.join(aliases)} | `{row.env}` | {row.shown_default} | {meaning} |")
    return "\n".join(lines) + "\n"
