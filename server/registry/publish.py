"""Changes of what names mean: publish (checked against the base, sure to fit), promote, split, roll back, pin, delete.

Uploads, directories of the command line, vLLM's load endpoint and finished fine-tunes all come through here, so
whatever the store holds can be served.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar, get_type_hints

from adapters.background import run_in, thread_pool
from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME, AdapterSpec
from adapters.peft_format.fields import AdapterError, shorten
from adapters.peft_format.inspection import Check, inspect_adapter
from adapters.peft_format.outline import Outline
from adapters.peft_format.text import (
    NO_TEXT,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    AdapterText,
    check_template,
    find_new_tokens,
    read_added_tokens,
)
from adapters.storage.copying import copy_files
from adapters.storage.mending import check_recorded
from adapters.storage.receipt import trained_text
from adapters.storage.store import AdapterStore, Change
from adapters.storage.versions import Pointer, UnknownAdapter, Version, check_name
from server.children.helper import HelperLimit, Helpers
from server.client.engine import EngineClient, served_base
from server.errors import InvalidRequest, disk_faults
from server.logs import FIELDS
from server.messages.protocol import Ready
from server.metrics import Metrics
from server.registry.capacity import check_fit
from server.registry.pins import Pins
from server.settings import Settings
from server.text.processor import TextProcessor

FILES = (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, TEMPLATE_NAME)  # of a directory that is brought in
_CHANGES = 8  # that are checked, or wait for a disk or a network, at once

A = TypeVar("A")
T = TypeVar("T")

log = logging.getLogger(__name__)
audit_log = logging.getLogger("server.audit")  # one line per change of what a name means


class Publisher:
    """The one door through which stored adapters change.

    Args:
        settings: the base's names and the threads' priority are read.
        pins: renewed whenever a name means something else.
        outline: the base's parameters beside its linears; without, adapters may touch nothing but linears.
        text: the base's, to which an adapter's own is added; without, no adapter brings any.
        checker: the processes to check adapters in; without, a thread does.
    """

    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        store: AdapterStore,
        metrics: Metrics,
        pins: Pins,
        outline: Outline | None = None,
        text: TextProcessor | None = None,
        checker: Helpers | None = None,
    ) -> None:
        self.pins = pins
        self._settings = settings
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._outline = outline
        self._text = text
        self._checker = checker
        self._forgetting: set[asyncio.Task[None]] = set()
        self._workers = thread_pool(_CHANGES, "publisher", settings.background_priority)

    async def close(self) -> None:
        """End the processes that check."""
        if self._checker is not None:
            await self._checker.close()

    def check_name(self, name: str, *, fine_tuned: bool = False) -> None:
        """Raises AdapterError when an adapter may not be called so."""
        check_name(name, fine_tuned=fine_tuned)
        if name.casefold() in {alias.casefold() for alias in self._settings.base_aliases}:
            raise AdapterError(f"'{name}' is the base model's name.", "name")

    @contextlib.asynccontextmanager
    async def stage(self) -> AsyncIterator[Path]:
        """A private directory for incoming files, removed afterwards unless `admit` took them. Raises StorageFull."""
        clean_up = contextlib.ExitStack()
        with disk_faults():
            staging = clean_up.enter_context(self._store.stage())
        try:
            yield staging
        finally:
            await run_in(self._workers, clean_up.close)  # removing gigabytes takes a while

    async def admit(
        self,
        tenant: str,
        name: str,
        staging: Path,
        *,
        fine_tuned: bool = False,
        promote: bool = True,
        again: bool = True,
        strict_text: bool = True,
        learned: AdapterText = NO_TEXT,
    ) -> tuple[Version, bool]:
        """Validate what lies in `staging` and make it the current content of `name`, or with `promote=False` a version
        of it that waits; with `again=False` leave a name that has this version already as it is. A tokenizer or chat
        template that cannot be used is refused, or with `strict_text=False` left out with a warning. `learned`
        is what the rows of a fine-tune taught it: stop tokens beside the base's, formats of calls and thoughts.

        Returns the version and whether the name changed. Raises AdapterError (its fault), StorageFull,
        EngineUnavailable.
        """
        base = served_base(self._engine)
        self.check_name(name, fine_tuned=fine_tuned)
        self._store.check_case(tenant, name)
        text, warnings = await self._text_beside(name, staging, strict=strict_text)
        text = dataclasses.replace(learned, tokens=text.tokens, chat_template=text.chat_template)
        with disk_faults():
            spec = await self._inspect(name, staging, base, text)
        check_fit(spec, base)
        self._check_vocabulary(spec, base)
        spec = self._with_warnings(dataclasses.replace(spec, warnings=(*spec.warnings, *warnings)))
        before = self._shares(tenant, name)
        if before and not again and spec.digest in {known.digest for known in self._store.versions(tenant, name)}:
            return self._store.get(tenant, name), False
        publish = partial(self._store.publish, tenant, name, staging, spec, fine_tuned=fine_tuned, promote=promote)
        version, changed = await self._change(publish)
        if changed:
            _audit(name, "upload" if promote or not before else "stage", before, version.digest)
            self.pins.renew()
            self._forget_unused(before)
        return version, changed

    async def _inspect(self, name: str, directory: Path, base: Ready, text: AdapterText) -> AdapterSpec:
        outline = outline_of(self._outline, base) if self._outline else None
        ignore_vision = self._settings.ignore_vision_adapters
        check = Check(directory, base.linears, base.architecture, outline, text, ignore_vision)
        return await self._run(name, inspect_adapter, check, "weights")

    async def _run(self, name: str, function: Callable[[A], T], order: A, param: str) -> T:
        """What `function(order)` returns, in the name's turn. Raises AdapterError of `param` when it takes too much."""
        if self._checker is None:
            return await run_in(self._workers, partial(function, order))
        named = {"function": f"{function.__module__}.{function.__qualname__}", "order": order}
        seconds, kind = self._settings.adapter_check_seconds, get_type_hints(function)["return"]
        try:
            result: T = await self._checker.ask(name, named, seconds, kind)
        except HelperLimit as limit:
            message = f"checking it {limit} (--adapter-check-seconds, --adapter-check-bytes)"
            raise AdapterError(message, param, "adapter_too_large") from None
        return result

    def _check_vocabulary(self, spec: AdapterSpec, base: Ready) -> None:
        """Raises AdapterError for an adapter that lacks tokens which the tokenizer makes of text."""
        have, size = base.vocab_size + spec.variants.new_tokens, 0
        if self._text is not None and spec.variants.new_tokens < 0:
            size = max(self._text.tokenizer.get_vocab().values(), default=-1) + 1
        if have < size:
            raise AdapterError(f"the weights have {have} tokens, fewer than the {size} of the tokenizer", "weights")

    async def remake(self, version: Version) -> None:
        """Find anew, from a leased version's own config and weights, what its damaged files said of it.

        Raises AdapterError or DamagedAdapter when these are damaged, too, EngineUnavailable, StorageFull.
        """
        base = served_base(self._engine)
        await run_in(self._workers, partial(check_recorded, version.path, CONFIG_NAME))
        async with self.stage() as staging:
            with disk_faults():
                files = (CONFIG_NAME, WEIGHTS_NAME)
                await run_in(self._workers, partial(copy_files, files, version.path, staging, version.path))
                spec = await self._inspect(version.name, staging, base, trained_text(version.receipt))
                if spec.digest != version.digest:
                    raise AdapterError(f"its config and weights are those of {spec.digest}", "weights")
                await run_in(self._workers, partial(self._store.replace_damaged, staging, spec))

    async def import_directory(
        self, tenant: str, name: str, directory: Path, *, root: Path = Path("/"), again: bool = True
    ) -> tuple[Version, bool]:
        """Copy a PEFT directory of this machine and admit the copy.

        Args:
            root: files outside of it are refused, whatever links lead to them.
        """
        self.check_name(name)
        async with self.stage() as staging:
            with disk_faults():
                await run_in(self._workers, partial(copy_files, FILES, directory, staging, root))
            # Whatever trained it may have saved its tokenizer there, adapted to its own needs.
            return await self.admit(tenant, name, staging, again=again, strict_text=False)

    async def _text_beside(self, name: str, directory: Path, *, strict: bool) -> tuple[AdapterText, list[str]]:
        """The tokens and the template in a staged directory, whose files are then removed; and warnings."""
        tokenizer, template = directory / TOKENIZER_NAME, directory / TEMPLATE_NAME
        made: AdapterText = NO_TEXT
        warnings: list[str] = []
        base = self._text
        if base is None:
            return made, warnings
        try:
            if tokenizer.exists():
                added = await self._run(name, read_added_tokens, tokenizer, "tokenizer")
                size = base.tokenizer.get_vocab_size()
                made = AdapterText(
                    await run_in(self._workers, partial(find_new_tokens, added, base.tokenizer.token_to_id, size))
                )
            if template.exists():
                source = check_template(template)
                if base.chat_template is not None and source == base.chat_template.source:
                    pass  # many who train save the base's own
                elif base.renderer is None:
                    warnings.append("its chat template is not used: the operator has not allowed any")
                else:
                    await base.renderer.check(source)
                    made = dataclasses.replace(made, chat_template=source)
        except (AdapterError, InvalidRequest) as fault:
            if strict:
                raise
            warnings.append(f"what was saved beside it is not used: {fault}")
        finally:
            tokenizer.unlink(missing_ok=True)
            template.unlink(missing_ok=True)
        return made, warnings

    async def promote(self, tenant: str, name: str, digest: str, expected: Collection[str] | None) -> Pointer:
        """Let the name mean one of its versions. Raises what `AdapterStore.promote` does, and StorageFull."""
        return await self._repoint(
            "promote", tenant, name, partial(self._store.promote, tenant, name, digest, expected)
        )

    async def divide(
        self, tenant: str, name: str, shares: Mapping[str, float], expected: Collection[str] | None
    ) -> Pointer:
        """Split the name's requests between its versions. Raises what `AdapterStore.split` does, and StorageFull."""
        return await self._repoint("split", tenant, name, partial(self._store.split, tenant, name, shares, expected))

    async def roll_back(self, tenant: str, name: str, expected: Collection[str] | None) -> Pointer:
        """Undo the last change of the name. Raises what `AdapterStore.roll_back` does, and StorageFull."""
        return await self._repoint("rollback", tenant, name, partial(self._store.roll_back, tenant, name, expected))

    async def pin(self, tenant: str, name: str, pinned: bool) -> Pointer:
        """Keep whatever the name means on the device, now and later, or no longer.

        Raises UnknownAdapter, StorageFull; Conflict when more would be pinned than may be.
        """
        before = self._store.is_pinned(tenant, name)
        pointer = await self._change(partial(self._store.pin, tenant, name, pinned))
        if before != pinned:
            _audit(name, "pin" if pinned else "unpin", pointer.shares, pointer.etag)
            self.pins.renew()
        return pointer

    async def share(self, tenant: str, name: str, readers: Collection[str]) -> Pointer:
        """Let these tenants use the name, and no others. Raises UnknownAdapter, StorageFull."""
        return await self._change(partial(self._store.share, tenant, name, readers))

    async def _repoint(self, action: str, tenant: str, name: str, change: Callable[[], Pointer]) -> Pointer:
        before = self._shares(tenant, name)
        pointer = await self._change(change)
        if before != pointer.shares:
            _audit(name, action, before, pointer.etag, split=dict(pointer.split) or None)
            self.pins.renew()
            self._forget_unused(before)
        return pointer

    async def _change(self, change: Callable[[], T]) -> T:
        with disk_faults():
            return await run_in(self._workers, change)

    async def delete(self, tenant: str, name: str) -> Version:
        """Take the name away; requests that run keep their version. Raises UnknownAdapter."""
        before = self._shares(tenant, name)
        version = await self._change(partial(self._store.delete, tenant, name))
        self._metrics.adapter_deleted(version.label)
        _audit(name, "delete", before, None)
        self.pins.renew()
        self._forget_unused(before)
        return version

    def follow(self, changes: Iterable[Change]) -> None:
        """Do here what follows from changes that other servers made."""
        for before, after in changes:
            if before is not None and after is None:
                self._metrics.adapter_deleted(before.current.label)
            self._forget_unused(before.shares if before is not None else ())
            self.pins.renew()

    def _with_warnings(self, spec: AdapterSpec) -> AdapterSpec:
        """Tell the owner when the config names another base than the one that serves."""
        named = spec.config["base_model_name_or_path"]
        ours = {Path(name).name.lower() for name in self._settings.base_aliases}
        if not isinstance(named, str) or not named or Path(named).name.lower() in ours:
            return spec
        warning = f"the config names the base '{shorten(named)}'; this server serves '{self._settings.base_name}'"
        return dataclasses.replace(spec, warnings=(*spec.warnings, warning))

    def _shares(self, tenant: str, name: str) -> dict[str, float]:
        try:
            return self._store.pointer(tenant, name).shares
        except UnknownAdapter:
            return {}

    def _forget_unused(self, digests: Iterable[str]) -> None:
        """Let the engine drop versions that answer for no name any more; it does so once their last request ends.

        A digest that slips through when one name changes twice at once, or is wanted again, costs a little memory or
        time: the engine evicts and loads by itself.
        """
        for digest in digests:
            if not self._store.is_answering(digest):
                task = asyncio.create_task(self._engine.forget(digest))
                self._forgetting.add(task)
                task.add_done_callback(self._forgetting.discard)


def outline_of(files: Outline, base: Ready) -> Outline:
    """The outline of a base as its engine loaded it, out of that of its files."""
    return files.as_loaded(
        tied=base.tied,
        embedding=base.embedding,
        head=base.head,
        non_text_modules=base.aside,
        renamed=base.renamed,
        experts=base.experts,
        norms=base.norms,
        routers=base.routers,
        per_token_tables=base.by_token,
        opaque_embedding=base.opaque_embedding,
    )


def _audit(name: str, action: str, before: Mapping[str, float], after: str | None, **more: object) -> None:
    """Who asked is in the access log's line of the same moment."""
    was = ", ".join(before) or "nothing"
    fields = {"action": action, "adapter": name, "before": dict(before), "after": after, **more}
    audit_log.info("%s %s: %s -> %s", action, name, was, after or "nothing", extra={FIELDS: fields})
