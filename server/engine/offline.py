"""The engine process's loop without a server: JSON lines in, timed results as JSON lines out.

For benchmarks, on machines without a server's dependencies. Started as `python -m server.engine.offline`; its first
line is `{"model", "cache_dir", "adapters": {name: directory}}`, with more of `EngineConfig` under "engine" and
`"check": true` for the self-check. Every further line is one of

- a burst `{"prompts": [[id]], "tokens": n or [n], "adapters": [name or null], "at": [seconds]}` of greedy requests that
  run to their full length, each sent after its seconds in "at" (optional). Answered, when all have ended, by a list of
  results `{"sent": s, "times": [s], "tokens": [id]}`, in `perf_counter` seconds;
- `{"job": {...}}`, which starts an endless fine-tuning job on random tokens (see `training.bench`);
- `{"watch": seconds}`, a time without requests, answered by `{"tokens", "seconds"}` trained since the last watch.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.peft_format.inspection import inspect
from server.engine import boot, selfcheck
from server.engine.engine import Engine
from server.engine.loop import Loop
from server.messages import protocol
from server.messages.protocol import AdapterRef, EngineConfig, Generate, Sampling
from server.messages.training import JobEnded, TrainingStep
from server.training import bench


class ScriptedSocket:
    """A stand-in for the loop's socket: requests arrive at given times, and replies are kept with their times.

    Args:
        due: requests by ascending time; the loop is drained after the last, but not before `until`.
    """

    def __init__(self, due: Sequence[tuple[float, protocol.Request]], until: float = 0.0) -> None:
        self._due = deque([*due, (max([until, *(at for at, _ in due)]), protocol.Drain())])
        self._replies: list[tuple[float, bytes]] = []

    def poll(self, timeout: int) -> int:
        """Wait at most `timeout` milliseconds for a request to be due. Returns 1 if one is."""
        missing = self._due[0][0] - time.perf_counter() if self._due else timeout
        if missing > 0 and timeout:
            time.sleep(min(missing, timeout / 1e3))
        return int(bool(self._due) and self._due[0][0] <= time.perf_counter())

    def recv(self) -> bytes:
        """Return the next request."""
        return protocol.encode(self._due.popleft()[1])

    def send(self, data: bytes) -> None:
        """Keep a message until the end of the run."""
        self._replies.append((time.perf_counter(), data))

    def replies(self) -> list[tuple[float, protocol.Reply]]:
        """Return all of the loop's replies with their times."""
        return [(at, protocol.decode_reply(data)) for at, data in self._replies]


class Bench:
    """An engine, its gap work, and the loop over both."""

    def __init__(self, engine: Engine, config: EngineConfig) -> None:
        self.engine = engine
        self._gaps = boot.gap_work(engine, config)
        self._trained = self._reported = 0  # trained tokens in total, and at the last watch
        self._watched = time.perf_counter()

    def accept(self, directory: Path) -> AdapterRef:
        """Validate an adapter against the base as for an upload, and save its spec in its directory."""
        ready = self.engine.ready()
        spec = inspect(directory, ready.linears, ready.architecture)
        spec.save(directory)
        return AdapterRef(spec.digest, str(directory))

    def run(self, burst: dict[str, Any], adapters: dict[str, AdapterRef]) -> list[dict[str, Any]]:
        """Run a burst until all of its requests have ended. Raises RuntimeError when a request fails."""
        prompts, names, tokens = burst["prompts"], burst["adapters"], burst["tokens"]
        counts = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
        begin = time.perf_counter()
        sent = [begin + delay for delay in burst.get("at", [0.0] * len(prompts))]
        due: list[tuple[float, protocol.Request]] = []
        for index, (prompt, name, count) in enumerate(zip(prompts, names, counts, strict=True)):
            sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
            chosen = [adapters[name]] if name is not None else []
            request = Generate(id=str(index), prompt=prompt, sampling=sampling, adapters=chosen)
            due.append((sent[index], request))
        answers: list[dict[str, Any]] = [{"sent": at, "times": [], "tokens": []} for at in sent]
        for now, reply in self._loop(sorted(due, key=lambda pair: pair[0])):
            for output in reply.outputs if isinstance(reply, protocol.Step) else ():
                if output.error is not None:
                    raise RuntimeError(output.error)
                answers[int(output.id)]["tokens"] += output.tokens
                answers[int(output.id)]["times"] += [now] * len(output.tokens)
        return answers

    def start_job(self, settings: dict[str, Any], directory: Path) -> None:
        """Start an endless training job."""
        bench.random_data(settings, self.engine.base.vocab_size).save(directory / bench.DATA)
        self._gaps.handle(bench.endless_job("0", directory, self.engine.base, settings))

    def watch(self, seconds: float) -> dict[str, float]:
        """Run without requests for `seconds`. Returns the tokens trained, and the time, since the last call."""
        for _ in self._loop([], time.perf_counter() + seconds):
            pass
        now = time.perf_counter()
        answer = {"tokens": self._trained - self._reported, "seconds": now - self._watched}
        self._reported, self._watched = self._trained, now
        return answer

    def _loop(
        self, due: list[tuple[float, protocol.Request]], until: float = 0.0
    ) -> list[tuple[float, protocol.Reply]]:
        """Run the process's loop once, to its end. Raises RuntimeError when the job ends."""
        script = ScriptedSocket(due, until)
        Loop(self.engine, self._gaps, script).run()
        replies = script.replies()
        for _, reply in replies:
            if isinstance(reply, JobEnded):
                raise RuntimeError(f"the job ended: {reply.message}")
            if isinstance(reply, TrainingStep):
                self._trained = reply.trained_tokens
        return replies


def main() -> None:
    """Answer lines until standard input ends."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:  # libraries print

        def answer(value: Any) -> None:
            print(json.dumps(value), file=answers, flush=True)

        settings = json.loads(sys.stdin.readline())
        config = EngineConfig(
            address="", model=settings["model"], cache_dir=settings["cache_dir"], **settings.get("engine", {})
        )
        ready: dict[str, Any] = {"ready": True}

        def check(engine: Engine) -> None:
            if settings.get("check"):
                ready["difference"] = selfcheck.compare(engine)

        engine = boot.boot(config, check)
        runner = Bench(engine, config)
        adapters = {name: runner.accept(Path(path)) for name, path in settings["adapters"].items()}
        answer(ready)
        for line in sys.stdin:
            asked = json.loads(line)
            if "job" in asked:
                runner.start_job(asked["job"], Path(folder))
                answer({"started": True})
            elif "watch" in asked:
                answer(runner.watch(asked["watch"]))
            else:
                answer(runner.run(asked, adapters))


if __name__ == "__main__":
    main()
