"""The engine without a server around it: bursts as JSON lines in, tokens and their times as JSON lines out.

For measuring what HTTP and the second process cost. Started as `python -m server.engine.offline`; the first line is
`{"model", "cache_dir", "adapters": {name: directory}}`, every further one a burst
`{"prompts": [[id]], "tokens": n, "adapters": [name or null]}` of greedy requests that run to their full length. Its
answer holds, for each request, `{"times": [perf_counter seconds], "tokens": [id]}`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from adapters import format as adapter_format
from server.engine.engine import Engine
from server.engine.protocol import AdapterRef, EngineConfig, Generate, Sampling


def accept(engine: Engine, directory: Path) -> AdapterRef:
    """Validate an adapter against the base, as an upload is; leaves the spec in its directory."""
    ready = engine.ready()
    spec = adapter_format.inspect(directory, ready.linears, ready.architecture)
    spec.save(directory)
    return AdapterRef(spec.digest, str(directory))


def run(engine: Engine, burst: dict[str, Any], adapters: dict[str, AdapterRef]) -> list[dict[str, Any]]:
    """Run one burst to its end. Raises RuntimeError when a request fails."""
    sampling = Sampling(max_tokens=burst["tokens"], temperature=0.0, ignore_eos=True)
    answers: dict[str, dict[str, Any]] = {}
    for index, (prompt, name) in enumerate(zip(burst["prompts"], burst["adapters"], strict=True)):
        chosen = [adapters[name]] if name is not None else []
        engine.add(Generate(id=str(index), prompt=prompt, sampling=sampling, adapters=chosen))
        answers[str(index)] = {"times": [], "tokens": []}
    while not engine.idle:
        outputs, _ = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            answers[output.id]["tokens"] += output.tokens
            answers[output.id]["times"] += [now] * len(output.tokens)
    return list(answers.values())


def main() -> None:
    """Serve bursts until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    engine = Engine.load(EngineConfig(address="", model=settings["model"], cache_dir=settings["cache_dir"]))
    adapters = {name: accept(engine, Path(path)) for name, path in settings["adapters"].items()}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line), adapters)), flush=True)


if __name__ == "__main__":
    main()
