"""Drive an `Engine` without processes or sockets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapters.kernels.triton import is_interpreted
from adapters.peft_format.inspection import inspect
from adapters.peft_format.outline import Outline
from server.engine import boot
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, EngineConfig, Generate, Output, Sampling, TokenLogprob
from server.registry.publish import outline_of


def load_engine(
    model: Path, cache: Path, *, depth: Literal[0, 1] | None = None, planned: bool = True, **overrides: Any
) -> Engine:
    """An engine over the model in `model`, small enough that several fit in memory."""
    settings: dict[str, Any] = {
        "kv_cache_bytes": 4 << 20,
        "adapter_bytes": 8 << 20,
        "max_batch_tokens": 64,
        "max_batch_requests": 16,
        # Loads of adapters should not depend on other load on the machine.
        "background_priority": "normal",
        # Tests assume a CPU's batch invariance of every engine; its interpreted kernels need the setting.
        "deterministic": is_interpreted(),
    }
    config = EngineConfig(address="", model=str(model), cache_dir=str(cache), **(settings | overrides))
    return boot.load(config, depth=depth, planned=planned)


def tight_engine(like: Engine, model: Path, cache: Path, blocks: int, longest: int) -> Engine:
    """An engine over the same model with so few KV blocks that requests are preempted, and with small chunks."""
    block = 2 * like.base.num_layers * 2 * 16 * 16 * 4  # k and v, layers, kv heads, head size, tokens, bytes
    return load_engine(
        model,
        cache,
        kv_cache_bytes=blocks * block,
        max_batch_tokens=23,
        max_model_len=longest,
        prefix_caching=False,
    )


def publish(engine: Engine, directory: Path) -> AdapterRef:
    """Check an adapter's directory as an upload would; return the reference for requests."""
    ready = engine.ready()
    outline = outline_of(Outline.read(Path(str(engine.base.model.name_or_path))), ready)
    spec = inspect(directory, ready.linears, ready.architecture, outline, ignore_vision=True)
    spec.save(directory)
    return AdapterRef(spec.digest, str(directory))


@dataclass
class Answer:
    """All outputs of one sequence, joined."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    code: str | None = None
    cached_tokens: int = 0
    device_seconds: float = field(default=0.0, compare=False)  # measured by a clock

    def take(self, output: Output) -> None:
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.scores += output.scores
        self.finish_reason = output.finish_reason
        self.error, self.code = output.error, output.code
        self.cached_tokens += output.cached_tokens
        self.device_seconds += output.device_seconds


def request(id: str, prompt: Sequence[int], adapter: AdapterRef | None = None, **sampling: Any) -> Generate:  # noqa: A002
    """A greedy request with logprobs, unless `sampling` says otherwise."""
    settings: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
    return Generate(
        id=id,
        prompt=list(prompt),
        sampling=Sampling(**(settings | sampling)),
        adapters=[] if adapter is None else [adapter],
    )


def run(engine: Engine, requests: Iterable[Generate], every: int = 0) -> dict[str, Answer]:
    """Run requests to their end; each further one joins after `every` steps (0: all at once)."""
    queue = list(requests)
    answers = {request.id: Answer() for request in queue}
    steps = 0
    while queue or not engine.idle:
        while queue and (not every or steps % every == 0):
            engine.add(queue.pop(0))
            if every:
                break
        for output in engine.step()[0]:
            answers[output.id].take(output)
        steps += 1
    return answers


def make_resident(engine: Engine, adapters: Iterable[AdapterRef]) -> None:
    """Load adapters onto the device, so that the timing of loads does not separate their requests."""
    answers = run(engine, [request(adapter.digest, [3, 4, 5], adapter, max_tokens=1) for adapter in adapters])
    assert all(answer.error is None for answer in answers.values())


def solo(engine: Engine, requests: Iterable[Generate]) -> dict[str, Answer]:
    """Run each request to its end alone, with an empty cache."""
    answers: dict[str, Answer] = {}
    for single in requests:
        engine.blocks.reset_cache()
        answers |= run(engine, [single])
    return answers
