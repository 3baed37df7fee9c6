"""The target of a request: the base, or versions of adapters, leased while in use.

`model` names either; with `adapter_id` (LoRAX) or `adapters` (several, weighted) `model` is the base. A name resolves
to its current version, or to one of the versions of a split; `name@digest prefix` requests a given version.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from adapters.peft_format.directory import AdapterSpec
from adapters.storage.versions import Version
from server.errors import InvalidRequest, printable
from server.messages.protocol import AdapterRef
from server.openai.schema import WeightedAdapter
from server.registry.capacity import row_units
from server.services import Services
from server.tenants.caller import Caller
from server.text.processor import TextProcessor

Task = Literal["generate", "classify", "any"]


@dataclass(frozen=True)
class Target:
    """The base or the adapter versions that serve a request."""

    caller: Caller
    requested_name: str  # the name in the client's request
    digest: str  # of the adapter or the base; of several adapters: each digest with its weight
    text: TextProcessor
    vocab_size: int
    adapters: list[Version]  # empty: the base
    refs: list[AdapterRef]
    num_labels: int = 0  # of a classifier


@asynccontextmanager
async def open_target(
    services: Services,
    caller: Caller,
    model: str,
    adapter_id: str | None = None,
    *,
    adapters: Sequence[WeightedAdapter] = (),
    user: str | None = None,
    task: Task = "generate",
) -> AsyncIterator[Target]:
    """Resolve and lease the target: its files stay until the end, even if the name changes meanwhile.

    Args:
        adapters: several adapters applied to the same tokens, in place of one.
        user: the user; a split name resolves to the same version for one user.
        task: the task that the target must support.

    Raises `ModelNotFound` (404), `Conflict` (409, an ambiguous digest prefix), `InvalidRequest`, `EngineUnavailable`.
    """
    base = services.settings.base_aliases
    async with AsyncExitStack() as held:

        async def open_version(name: str, param: str) -> Version:
            return await held.enter_async_context(services.registry.open(caller, name, user=user, param=param))

        if adapters:
            if adapter_id is not None:
                raise InvalidRequest("Give either `adapter_id` or `adapters`.", param="adapters")
            if model not in base:
                await open_version(model, "model")  # an unknown model is reported first
                raise InvalidRequest("With `adapters`, `model` is the base.", param="adapters")
            yield _for_task(await _weighted_target(services, caller, model, adapters, open_version), task, "adapters")
            return
        name, param = model, "model"
        if adapter_id is not None and adapter_id != model:
            if model not in base:
                await open_version(model, "model")
                raise InvalidRequest(
                    "`model` and `adapter_id` name two adapters; give one of them.", param="adapter_id"
                )
            name, param = adapter_id, "adapter_id"
        if name in base:
            yield _for_task(_base_target(services, caller, name), task, param)
            return
        version = await open_version(name, param)
        yield _for_task(await _adapter_target(services, caller, name, version), task, param)


def _for_task(target: Target, task: Task, param: str) -> Target:
    """Return the target. Raises InvalidRequest when it does not support the task."""
    if task == "any" or bool(target.num_labels) == (task == "classify"):
        return target
    name = printable(target.adapters[0].name_for(target.caller.tenant) if target.adapters else target.requested_name)
    if task == "generate":
        message = f"`{name}` is a classifier and generates no text; use /v1/classify."
    else:
        message = f"`{name}` generates text; /v1/classify is for adapters with a classification head (SEQ_CLS)."
    raise InvalidRequest(message, param=param, code="unsupported_task")


def _base_target(services: Services, caller: Caller, requested_name: str) -> Target:
    info = services.engine_info
    return Target(caller, requested_name, info.base_digest, services.text, info.vocab_size, [], [])


async def _adapter_target(services: Services, caller: Caller, requested_name: str, version: Version) -> Target:
    text = await text_of(services, version)
    vocab_size = services.engine_info.vocab_size + version.receipt.get("new_tokens", 0)
    labels = version.receipt.get("num_labels", 0)
    return Target(
        caller, requested_name, version.digest, text, vocab_size, [version], [adapter_ref(version, caller)], labels
    )


async def _weighted_target(
    services: Services,
    caller: Caller,
    model: str,
    adapters: Sequence[WeightedAdapter],
    open_version: Callable[[str, str], Awaitable[Version]],
) -> Target:
    """Return the target of several adapters, in a normal order, so that equal mixtures share their cached KV."""
    weights: dict[str, float] = {}
    versions: dict[str, Version] = {}
    for i, adapter in enumerate(adapters):
        version = await open_version(adapter.id, f"adapters.{i}.id")
        _check_mixable(version, f"adapters.{i}", unweighted=len(adapters) == 1 and adapter.weight == 1)
        if version.digest in versions:
            message = (
                f"`adapters` has the content of `{version.name}` twice; give it once, with the sum of the weights."
            )
            raise InvalidRequest(message, param=f"adapters.{i}.id")
        versions[version.digest] = version
        weights[version.digest] = adapter.weight
    _check_fit(services, list(versions.values()))
    used = [versions[digest] for digest in sorted(versions) if weights[digest]]
    if not used:
        return _base_target(services, caller, model)
    if len(versions) == 1 and weights[used[0].digest] == 1:
        alone = await _adapter_target(services, caller, model, used[0])
        return replace(alone, digest=f"{alone.digest}*1.0")
    stop_ids = sorted({token for version in used for token in stop_tokens(version)})
    return Target(
        caller,
        model,
        "+".join(f"{version.digest}*{weights[version.digest]!r}" for version in used),
        services.text.with_stops(stop_ids, "fine-tune"),
        services.engine_info.vocab_size,
        used,
        [adapter_ref(version, caller, weights[version.digest]) for version in used],
    )


def _check_mixable(version: Version, param: str, *, unweighted: bool) -> None:
    """Check that an adapter can be weighted and summed. Raises InvalidRequest for one with replaced parameters."""
    replacing = set(version.receipt.get("variants", ())) - {"alora", "experts"}
    if replacing and not unweighted:
        raise InvalidRequest(
            f"`{version.name}` is more than plain LoRA ({', '.join(sorted(replacing))}): it runs alone, with weight 1.",
            param=param,
            code="unsupported_adapter_feature",
        )


def _check_fit(services: Services, versions: Sequence[Version]) -> None:
    """Check that the adapters fit on the device together. Raises InvalidRequest."""
    needed = row_units(versions)
    for kind, capacity in services.engine_info.pool_rows.items():
        if needed[kind] > capacity:
            raise InvalidRequest(
                f"`adapters` need {needed[kind]} rows of {kind} together; the device has {capacity} (--adapter-bytes).",
                param="adapters",
                code="adapter_too_large",
            )


async def text_of(services: Services, version: Version) -> TextProcessor:
    """Return the text processor of a version, with its tokenizer, chat template, stop tokens and formats."""
    text = services.text
    if has_own_text(services, version):
        text = await text.with_adapter_text(version.digest, lambda: AdapterSpec.read(version.path).text)
    text = text.with_stops(stop_tokens(version), "fine-tune")
    receipt = version.receipt
    return text.with_formats(receipt.get("trained_tool_format"), receipt.get("trained_reasoning_format"))


def stop_tokens(version: Version) -> Sequence[int]:
    """Return the stop tokens learned by a fine-tuned version."""
    stop_ids: Sequence[int] = version.receipt.get("stop_token_ids", ())
    return stop_ids


def has_own_text(services: Services, version: Version) -> bool:
    """Whether a version has tokens of its own, or a chat template and templates are allowed."""
    templates = services.text.renderer is not None
    return bool(version.receipt.get("tokenizer_tokens") or (templates and version.receipt.get("chat_template")))


def adapter_ref(version: Version, caller: Caller | None = None, weight: float = 1.0) -> AdapterRef:
    """Return the engine's reference to a version, with the caller's limit of device rows."""
    tokens = bool(version.receipt.get("tokenizer_tokens"))
    max_rows = None if caller is None else caller.allowance.limits.device_rows
    owner = None if caller is None or max_rows is None else (caller.tenant, max_rows)
    return AdapterRef(digest=version.digest, path=str(version.path), weight=weight, tokens=tokens, owner=owner)
