"""PEFT + transformers + bitsandbytes NF4 from this environment, in its two usual ways of running many adapters.

Either one mixed batch (`generate(adapter_names=[...])`) or adapter switching (a batch for each adapter in turn).
"""

import importlib.metadata
import importlib.util
import sys
from typing import Any, ClassVar

from loadtest.peers import base
from loadtest.peers.lorakeet import adapter_name
from loadtest.peers.worker import WorkerSide


class Peft(WorkerSide):
    """One mixed batch in fp32."""

    name = "peft"
    _switching: ClassVar[bool] = False
    _dtype: ClassVar[str] = "float32"

    def missing_reason(self) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return "not installed: pip install 'lorakeet[peers]'"
        return None

    def describe(self) -> dict[str, Any]:
        packages = ("peft", "transformers", "bitsandbytes", "torch")
        return {
            "version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
            "base": f"bitsandbytes NF4, double quantisation, {self._dtype} arithmetic",
            "adapters": "set_adapter: a batch for each adapter"
            if self._switching
            else "adapter_names: one mixed batch",
        }

    def command(self) -> list[str]:
        return [sys.executable, "-m", "loadtest.peers.peft_worker"]

    def settings(self, kit: base.Kit) -> dict[str, Any]:
        return {
            "model": str(kit.model),
            "dtype": self._dtype,
            "threads": kit.threads,
            "switching": self._switching,
            "adapters": {adapter_name(a): str(path) for a, path in kit.adapters.items() if a[0] == "float32"},
        }

    def adapter(self, adapter: base.AdapterId) -> str:
        # The file's dtype makes no difference: PEFT converts adapters to fp32 at load.
        return adapter_name(("float32", adapter[1]))


class PeftBf16(Peft):
    """`Peft` in bfloat16, for which bitsandbytes has its own kernels on CPUs with AVX512-BF16."""

    name = "peft-bf16"
    _dtype = "bfloat16"


class PeftSwitching(Peft):
    """PEFT with one active adapter at a time."""

    name = "peft-switching"
    _switching = True
