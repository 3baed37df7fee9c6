"""PEFT + transformers + bitsandbytes NF4 from this environment, the way its users run many adapters.

Either one mixed batch (`generate(adapter_names=[...])`) or adapter switching (a batch for each adapter in turn).
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from loadtest.client import Timeline
from loadtest.peers import base
from loadtest.peers.lorakeet import adapter_name


class Peft(base.Side):
    """A worker process (`peft_worker`) that holds the model; no HTTP is between, which favours this side a little."""

    name = "peft"
    switching = False

    def __init__(self, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        self._dtype = dtype
        self._child: subprocess.Popen[str] | None = None

    def missing(self) -> str | None:
        if importlib.util.find_spec("peft") is None:
            return "not installed: pip install 'lorakeet[peers]'"
        return None

    def describe(self) -> dict[str, Any]:
        packages = ("peft", "transformers", "bitsandbytes", "torch")
        return {
            "version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
            "base": f"bitsandbytes NF4, double quantisation, {self._dtype} arithmetic",
            "adapters": "set_adapter, one batch for each adapter"
            if self.switching
            else "adapter_names, one mixed batch",
        }

    async def start(self, kit: base.Kit) -> None:
        log = kit.folder / f"{self.name}.log"
        with log.open("wb") as stderr:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "loadtest.peers.peft_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(kit.threads), "TOKENIZERS_PARALLELISM": "false"},
            )
        settings = {
            "model": str(kit.model),
            "dtype": self._dtype,
            "threads": kit.threads,
            "switching": self.switching,
            "adapters": {adapter_name(a): str(path) for a, path in kit.adapters.items() if a[0] == "float32"},
        }
        try:
            await self._ask(settings)
        except base.SideError as error:
            raise base.SideError(f"{error}\n{log.read_bytes()[-2000:].decode('utf-8', 'replace')}") from error

    async def burst(self, works: Sequence[base.Work]) -> list[Timeline]:
        [tokens] = {work.output_tokens for work in works}
        # An adapter's file type makes no difference here: PEFT converts adapters to fp32 when it loads them.
        names = [None if w.adapter is None else adapter_name(("float32", w.adapter[1])) for w in works]
        sent = time.perf_counter()
        answers = await self._ask({"prompts": [w.prompt for w in works], "tokens": tokens, "adapters": names})
        return [self._timeline(sent, work, answer) for work, answer in zip(works, answers, strict=True)]

    @staticmethod
    def _timeline(sent: float, work: base.Work, answer: dict[str, Any]) -> Timeline:
        count = len(answer["tokens"])
        return Timeline(
            scheduled=sent,
            sent=sent,
            expected_tokens=work.output_tokens,
            tokens=[(moment, i + 1) for i, moment in enumerate(answer["times"])],
            prompt_tokens=len(work.prompt),
            output_tokens=count,
            finished=answer["times"][-1],
            error=None if count == work.output_tokens else f"{count} of {work.output_tokens} tokens returned",
        )

    async def _ask(self, message: dict[str, Any]) -> Any:
        child = self._child
        assert child is not None, "start() comes first"
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(message) + "\n")
        child.stdin.flush()
        answer = await asyncio.to_thread(child.stdout.readline)
        if not answer:
            raise base.SideError(f"{self.name}: the worker ended")
        return json.loads(answer)

    async def stop(self) -> None:
        if self._child is not None:
            self._child.terminate()
            await asyncio.to_thread(self._child.wait)
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None


class PeftSwitching(Peft):
    """PEFT with one active adapter at a time."""

    name = "peft-switching"
    switching = True
