"""`transformers serve`, Hugging Face's own server, in an environment of its own: the base alone.

It serves no adapters per request, so it takes part in cases without adapters only. Its completions take text, not token
ids: it gets the decoded prompt, which it may split into a few tokens more or fewer.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer

from loadtest.client import OPENAI, Dialect, Timeline
from loadtest.peers import base

VERSION = "5.23.0"
TORCH = "2.13.0"
_PEER = "transformers"
# Without these its cache takes all free memory, and it attends over all of it, many times slower.
_BATCHING = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-block-size", "32", "--cb-max-batch-tokens", "256")


def install() -> None:
    """Install into its own environment (about 1 GB). Raises `SideError`."""
    python = str(base.make_venv(_PEER))
    base.run([python, "-m", "pip", "install", f"torch=={TORCH}", f"transformers[serving]=={VERSION}"])


def _body(model: str, prompt: list[int], output_tokens: int, *, text: str) -> dict[str, Any]:
    return {"model": model, "prompt": text, "max_tokens": output_tokens, "temperature": 0, "stream": True}


def _read(timeline: Timeline, events: list[tuple[float, bytes]]) -> None:
    """Read events as OpenAI's, without `[DONE]`: the last event has the finish reason and the usage."""
    if events and json.loads(events[-1][1]).get("usage"):
        events = [*events, (events[-1][0], b"[DONE]")]
    OPENAI.read(timeline, events)


class TransformersServe(base.ServerSide):
    """`transformers serve` with continuous batching, without which it runs one request after the other."""

    name = "transformers-serve"
    per_request_adapters = False
    dialect = Dialect("/v1/completions", _body, _read)
    _dtype: ClassVar[str] = "float32"

    def __init__(self) -> None:
        super().__init__()
        self._model = Path()

    def missing_reason(self) -> str | None:
        if base.package_version(base.venv_python(_PEER), "transformers") is None:
            return f"not installed: python -m loadtest peers install {_PEER}"
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "version": base.package_version(base.venv_python(_PEER), "transformers"),
            "base": f"{self._dtype}, not quantised",
            "adapters": "none: it has no LoRA per request",
            "settings": f"{' '.join(_BATCHING)}; prompts as text",
        }

    def command(self, kit: base.Kit, port: int) -> tuple[list[str], dict[str, str]]:
        self._model = _endless(kit.model, kit.folder / f"{self.name}-model")
        command = [
            *(str(base.venv_python(_PEER).with_name("transformers")), "serve", str(self._model)),
            *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", self._dtype),
            *_BATCHING,
        ]
        return command, {"OMP_NUM_THREADS": str(kit.threads), "HF_HUB_OFFLINE": "1"}

    def request(self, work: base.Work) -> tuple[str, dict[str, Any]]:
        return str(self._model), {"text": _tokenizer(self._model).decode(work.prompt, skip_special_tokens=False)}


class TransformersServeBf16(TransformersServe):
    """The same in bfloat16: half the bytes to read, fast on CPUs with instructions for it."""

    name = "transformers-serve-bf16"
    _dtype = "bfloat16"


def _endless(model: Path, folder: Path) -> Path:
    """Make a folder of links to the model, without an EOS token, since requests have no parameter to ignore it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name in ("config.json", "generation_config.json"):
            settings = json.loads(file.read_text("utf-8")) | {"eos_token_id": None}
            (folder / file.name).write_text(json.dumps(settings), "utf-8")
        else:
            (folder / file.name).symlink_to(file.resolve())
    return folder


@cache
def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))
