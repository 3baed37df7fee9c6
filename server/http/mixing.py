"""The JSON body of `POST /v1/adapters` for a mix: a new adapter made of others, like PEFT's `add_weighted_adapter`."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Literal, Self

from pydantic import Field, model_validator

from adapters.offline.recipe import Method, Recipe
from adapters.peft_format.text import AdapterText
from adapters.storage.receipt import trained_text
from adapters.storage.versions import Version
from server.children.helper import HelperLimit, ask_once
from server.errors import InvalidRequest, disk_faults
from server.openai.body import Body, Items
from server.services import Services, check_bound
from server.tenants.caller import Caller

MAX_SOURCES = 16
MAX_RANK = 1024
_PRUNING = ("ties", "dare", "magnitude")


class Source(Body):
    """One adapter of the mix."""

    adapter: str = Field(min_length=1)
    weight: float = Field(1.0, ge=-100, le=100)


class MixBody(Body):
    """The sources of a mix, and the method."""

    name: str
    mix: Items[Source] = Field(min_length=1, max_length=MAX_SOURCES)
    method: Method = "svd"
    density: float | None = Field(None, gt=0, le=1)
    majority_sign_method: Literal["total", "frequency"] = "total"
    rank: int | None = Field(None, ge=1, le=MAX_RANK)
    seed: int = Field(0, ge=0, le=2**63 - 1)
    promote: bool = True

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method.startswith(_PRUNING) != (self.density is not None):
            verb = "has no" if self.density is not None else "needs a"
            raise InvalidRequest(f"The method `{self.method}` {verb} `density`.", param="density")
        if self.rank is not None and not self.method.endswith("svd"):
            raise InvalidRequest(f"The method `{self.method}` has no `rank`.", param="rank")
        return self

    @property
    def recipe(self) -> Recipe:
        """The mixer's recipe."""
        return Recipe(
            method=self.method,
            weights=tuple(source.weight for source in self.mix),
            density=1.0 if self.density is None else self.density,
            majority_sign=self.majority_sign_method,
            rank=self.rank,
            seed=self.seed,
        )


def _combined_text(versions: Sequence[Version]) -> AdapterText:
    """Return the stop tokens and formats of a mix: all stop tokens taught to its sources, and a format taught to some
    if these agree."""
    texts = [trained_text(version.receipt) for version in versions]
    tools = {text.tool_format for text in texts} - {None}
    thoughts = {text.reasoning_format for text in texts} - {None}
    return AdapterText(
        stop_tokens=tuple(sorted({token for text in texts for token in text.stop_tokens})),
        tool_format=tools.pop() if len(tools) == 1 else None,
        reasoning_format=thoughts.pop() if len(thoughts) == 1 else None,
    )


async def mix(services: Services, caller: Caller, body: MixBody) -> tuple[Version, bool]:
    """Mix the adapter and publish it; return the version and whether the name changed.

    Raises the errors of admitting an upload, and `ModelNotFound` for an unknown source.
    """
    registry, publisher = services.registry, services.registry.publisher
    publisher.check_name(body.name)
    check_bound(caller, body.name)
    async with AsyncExitStack() as held:
        versions = [
            await held.enter_async_context(registry.open(caller, source.adapter, param=f"mix.{i}.adapter", verify=True))
            for i, source in enumerate(body.mix)
        ]
        combined = _combined_text(versions)
        async with publisher.staging_directory() as staging:
            order = {
                "sources": [str(version.path) for version in versions],
                "recipe": asdict(body.recipe),
                "target": str(staging),
                "base": services.settings.base_name,
                "experts": {name: size._asdict() for name, size in services.engine_info.experts.items()},
            }
            try:
                with disk_faults():
                    await ask_once("adapters.offline.mix.carry_out", order, services.settings.mix_seconds)
            except HelperLimit as limit:
                message = f"Mixing {limit} (--mix-seconds); mix fewer adapters, or by `cat`."
                raise InvalidRequest(message, param="mix", code="mix_too_slow") from None
            return await publisher.publish(
                caller.tenant, body.name, staging, promote=body.promote, from_training=combined
            )
