"""Descriptions of a load as TOML files: arrivals, lengths, adapters, limits.

`workload` draws the requests, `drive` sends them.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Range = tuple[Count, Count]


class ScenarioError(Exception):
    """An invalid scenario; the message names the field or file."""


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TOML table; an unknown key is an error."""


class Closed(_Table, frozen=True, tag_field="kind", tag="closed"):
    """`concurrency` clients, each sending its next request when the previous one has ended."""

    concurrency: Count
    requests: Count


class Open(_Table, frozen=True, tag_field="kind", tag="open"):
    """Requests at `rate` per second, even if the server does not keep up.

    Gaps are gamma distributed with shape `burstiness` and mean 1 / rate, as in vLLM's benchmark:
    1 is a Poisson process, less is burstier, more is steadier.
    """

    rate: Positive
    requests: Count
    burstiness: Positive = 1.0


class Fixed(_Table, frozen=True, tag_field="kind", tag="fixed"):
    """The same lengths (tokens) for all requests."""

    prompt: Count
    output: Count


class Uniform(_Table, frozen=True, tag_field="kind", tag="uniform"):
    """Lengths drawn uniformly from `[low, high]`, both included (S-LoRA: 8 to 512)."""

    prompt: Range
    output: Range


class TraceFile(_Table, frozen=True, tag_field="kind", tag="trace"):
    """Lengths from a CSV file with columns `prompt` and `output`, in its order, repeated if it is too short.

    A relative path is relative to the scenario file's folder.
    """

    file: str


class Identical(_Table, frozen=True, tag_field="kind", tag="identical"):
    """The first adapter for all requests."""


class Distinct(_Table, frozen=True, tag_field="kind", tag="distinct"):
    """The adapters in turn, so that successive requests differ."""


class UniformChoice(_Table, frozen=True, tag_field="kind", tag="uniform"):
    """All adapters with equal probability."""


class Zipf(_Table, frozen=True, tag_field="kind", tag="zipf"):
    """Zipf's law: the k-th adapter has a probability proportional to k ** -a."""

    a: Positive


class Power(_Table, frozen=True, tag_field="kind", tag="power"):
    """S-LoRA's power law: adapter floor(n * x), x with density a * x ** (a - 1). 1 is uniform, less is more skewed."""

    a: Positive


class Adapters(_Table, frozen=True):
    """The adapters of requests.

    `names`: existing adapters of the server. Otherwise `count` random PEFT adapters are made and uploaded before the
    run and deleted after it. Neither: requests go to the base model.
    """

    names: list[str] = []
    count: Annotated[int, Meta(ge=0)] = 0
    rank: Count = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    popularity: Identical | Distinct | UniformChoice | Zipf | Power = msgspec.field(default_factory=Distinct)


class Slo(_Table, frozen=True):
    """Limits, in seconds, all of which a request must meet to count for goodput."""

    ttft: Positive | None = None
    tpot: Positive | None = None
    e2e: Positive | None = None


class Sweep(_Table, frozen=True):
    """Values of one quantity, with one run of the scenario for each."""

    rate: list[Positive] = []
    adapters: list[Count] = []


class Scenario(_Table, frozen=True):
    """One load test."""

    name: str
    load: Closed | Open
    lengths: Fixed | Uniform | TraceFile
    adapters: Adapters = Adapters()
    slo: Slo = Slo()
    sweep: Sweep = Sweep()
    seed: Annotated[int, Meta(ge=0)] = 0
    # Range of the prompts' random token ids: in every vocabulary, without special tokens.
    token_ids: Range = (100, 10_000)
    ignore_eos: bool = True
    timeout: Positive = 600.0

    def points(self) -> list["Scenario"]:
        """Return the runs of the sweep: this scenario with one value changed, or itself alone.

        Each has a seed of its own, so that no run finds the prompts of the previous one in a prefix cache.
        """
        replace = msgspec.structs.replace
        if self.sweep.rate:
            assert isinstance(self.load, Open)  # checked by `load_scenario`
            points = [replace(self, load=replace(self.load, rate=rate)) for rate in self.sweep.rate]
        elif self.sweep.adapters:
            points = [replace(self, adapters=replace(self.adapters, count=count)) for count in self.sweep.adapters]
        else:
            points = [self]
        return [replace(point, seed=self.seed + index) for index, point in enumerate(points)]


def load_scenario(path: Path) -> Scenario:
    """Read and check a scenario file. Raises `ScenarioError` with the field's name."""
    try:
        scenario = msgspec.convert(tomllib.loads(path.read_text("utf-8")), Scenario)
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ScenarioError(f"{path}: {error}") from error
    _check(scenario, path)
    if isinstance(scenario.lengths, TraceFile):
        absolute = str((path.parent / scenario.lengths.file).resolve())
        scenario = msgspec.structs.replace(scenario, lengths=TraceFile(file=absolute))
    return scenario


def _check(scenario: Scenario, path: Path) -> None:
    lengths, sweep, adapters = scenario.lengths, scenario.sweep, scenario.adapters
    ranges = {"token_ids": scenario.token_ids}
    if isinstance(lengths, Uniform):
        ranges |= {"lengths.prompt": lengths.prompt, "lengths.output": lengths.output}
    for name, (low, high) in ranges.items():
        if low > high:
            raise ScenarioError(f"{path}: `{name}`: {low} is more than {high}")
    if adapters.names and (adapters.count or sweep.adapters):
        raise ScenarioError(f"{path}: `adapters.names` excludes `adapters.count` and `sweep.adapters`")
    if sweep.rate and sweep.adapters:
        raise ScenarioError(f"{path}: `sweep` takes one of `rate` and `adapters`")
    if sweep.rate and not isinstance(scenario.load, Open):
        raise ScenarioError(f'{path}: `sweep.rate` needs `load.kind = "open"`')
