"""Changes of names: publish (checked against the base and the device's memory), promote, split, roll back, pin, delete.

Uploads, directories of the command line, vLLM's load endpoint and finished fine-tunes all come through here, so every
version in the store can be served.
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
from server.client.engine import EngineClient, engine_info
from server.errors import InvalidRequest, disk_faults
from server.logs import FIELDS
from server.messages.protocol import Ready
from server.metrics import Metrics
from server.registry.capacity import check_fit
from server.registry.pins import Pins
from server.settings import Settings
from server.text.processor import TextProcessor

FILES = (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, TEMPLATE_NAME)  # of an imported directory
_CONCURRENT_CHANGES = 8  # being checked, or waiting for a disk or a network

A = TypeVar("A")
T = TypeVar("T")

log = logging.getLogger(__name__)
audit_log = logging.getLogger("server.audit")  # one line per change of a name


class Publisher:
    """All changes of stored adapters.

    Args:
        settings: read for the base's names and the threads' priority.
        pins: renewed with every change of a name.
        outline: the base's parameters beside its linears; without it, adapters may change linears only.
        text: the base's tokenizer and chat template, to which an adapter adds; without it, adapters' own are ignored.
        checker: processes that check adapters; without it, threads do.
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
        self._forget_tasks: set[asyncio.Task[None]] = set()
        self._workers = thread_pool(_CONCURRENT_CHANGES, "publisher", settings.background_priority)

    async def close(self) -> None:
        """End the checker processes."""
        if self._checker is not None:
            await self._checker.close()

    def check_name(self, name: str, *, fine_tuned: bool = False) -> None:
        """Raise AdapterError for a name that an adapter may not have."""
        check_name(name, fine_tuned=fine_tuned)
        if name.casefold() in {alias.casefold() for alias in self._settings.base_aliases}:
            raise AdapterError(f"'{name}' is the base model's name.", "name")

    @contextlib.asynccontextmanager
    async def staging_directory(self) -> AsyncIterator[Path]:
        """Make a private directory for incoming files, removed afterwards unless published. Raises StorageFull."""
        clean_up = contextlib.ExitStack()
        with disk_faults():
            staging = clean_up.enter_context(self._store.stage())
        try:
            yield staging
        finally:
            await run_in(self._workers, clean_up.close)  # removing gigabytes takes a while

    async def publish(
        self,
        tenant: str,
        name: str,
        staging: Path,
        *,
        fine_tuned: bool = False,
        promote: bool = True,
        republish: bool = True,
        strict_text: bool = True,
        from_training: AdapterText = NO_TEXT,
    ) -> tuple[Version, bool]:
        """Validate the files in `staging` and publish them as the current version of `name`.

        Args:
            promote: False to stage the version only.
            republish: False to leave a name that already has this version as it is.
            strict_text: refuse an unusable tokenizer or chat template; False leaves it out with a warning.
            from_training: stop tokens beside the base's and formats of calls and thoughts, learned from its rows.

        Returns the version and whether the name changed. Raises AdapterError (the adapter's fault), StorageFull,
        EngineUnavailable.
        """
        base = engine_info(self._engine)
        self.check_name(name, fine_tuned=fine_tuned)
        self._store.check_case(tenant, name)
        text, warnings = await self._read_text_files(name, staging, strict=strict_text)
        text = dataclasses.replace(from_training, tokens=text.tokens, chat_template=text.chat_template)
        with disk_faults():
            spec = await self._inspect(name, staging, base, text)
        check_fit(spec, base)
        self._check_vocabulary(spec, base)
        spec = self._with_warnings(dataclasses.replace(spec, warnings=(*spec.warnings, *warnings)))
        before = self._shares(tenant, name)
        if before and not republish and spec.digest in {known.digest for known in self._store.versions(tenant, name)}:
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
        """Return `function(order)`, run in the name's turn. Raises AdapterError of `param` beyond the time or memory
        limit."""
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
        """Raise AdapterError for an adapter with fewer tokens than the tokenizer can produce."""
        rows, vocabulary = base.vocab_size + spec.variants.new_tokens, 0
        if self._text is not None and spec.variants.new_tokens < 0:
            vocabulary = max(self._text.tokenizer.get_vocab().values(), default=-1) + 1
        if rows < vocabulary:
            raise AdapterError(
                f"the weights have {rows} tokens, fewer than the {vocabulary} of the tokenizer", "weights"
            )

    async def rebuild(self, version: Version) -> None:
        """Rebuild a leased version's damaged files from its own config and weights.

        Raises AdapterError or DamagedAdapter when these are damaged, too; EngineUnavailable, StorageFull.
        """
        base = engine_info(self._engine)
        await run_in(self._workers, partial(check_recorded, version.path, CONFIG_NAME))
        async with self.staging_directory() as staging:
            with disk_faults():
                files = (CONFIG_NAME, WEIGHTS_NAME)
                await run_in(self._workers, partial(copy_files, files, version.path, staging, version.path))
                spec = await self._inspect(version.name, staging, base, trained_text(version.receipt))
                if spec.digest != version.digest:
                    raise AdapterError(f"its config and weights are those of {spec.digest}", "weights")
                await run_in(self._workers, partial(self._store.replace_damaged, staging, spec))

    async def import_directory(
        self, tenant: str, name: str, directory: Path, *, root: Path = Path("/"), republish: bool = True
    ) -> tuple[Version, bool]:
        """Copy a PEFT directory of this machine and publish the copy.

        Args:
            root: files outside of it are refused, links to them included.
        """
        self.check_name(name)
        async with self.staging_directory() as staging:
            with disk_faults():
                await run_in(self._workers, partial(copy_files, FILES, directory, staging, root))
            # A trainer may have saved its own modified tokenizer there.
            return await self.publish(tenant, name, staging, republish=republish, strict_text=False)

    async def _read_text_files(self, name: str, directory: Path, *, strict: bool) -> tuple[AdapterText, list[str]]:
        """Read and remove the tokenizer and template files of a staged directory; return their content and warnings."""
        tokenizer, template = directory / TOKENIZER_NAME, directory / TEMPLATE_NAME
        text: AdapterText = NO_TEXT
        warnings: list[str] = []
        base = self._text
        if base is None:
            return text, warnings
        try:
            if tokenizer.exists():
                added = await self._run(name, read_added_tokens, tokenizer, "tokenizer")
                size = base.tokenizer.get_vocab_size()
                text = AdapterText(
                    await run_in(self._workers, partial(find_new_tokens, added, base.tokenizer.token_to_id, size))
                )
            if template.exists():
                source = check_template(template)
                if base.chat_template is not None and source == base.chat_template.source:
                    pass  # many trainers save the base's own
                elif base.renderer is None:
                    warnings.append("its chat template is not used: the operator has not allowed any")
                else:
                    await base.renderer.check(source)
                    text = dataclasses.replace(text, chat_template=source)
        except (AdapterError, InvalidRequest) as fault:
            if strict:
                raise
            warnings.append(f"its tokenizer and chat template are not used: {fault}")
        finally:
            tokenizer.unlink(missing_ok=True)
            template.unlink(missing_ok=True)
        return text, warnings

    async def promote(self, tenant: str, name: str, digest: str, expected: Collection[str] | None) -> Pointer:
        """Point the name at one of its versions. Raises the errors of `AdapterStore.promote`, and StorageFull."""
        return await self._repoint(
            "promote", tenant, name, partial(self._store.promote, tenant, name, digest, expected)
        )

    async def split(
        self, tenant: str, name: str, shares: Mapping[str, float], expected: Collection[str] | None
    ) -> Pointer:
        """Split the name's requests among its versions. Raises the errors of `AdapterStore.split`, and StorageFull."""
        return await self._repoint("split", tenant, name, partial(self._store.split, tenant, name, shares, expected))

    async def roll_back(self, tenant: str, name: str, expected: Collection[str] | None) -> Pointer:
        """Undo the last change of the name. Raises the errors of `AdapterStore.roll_back`, and StorageFull."""
        return await self._repoint("rollback", tenant, name, partial(self._store.roll_back, tenant, name, expected))

    async def pin(self, tenant: str, name: str, pinned: bool) -> Pointer:
        """Pin the name, so that its current and later versions stay on the device, or unpin it.

        Raises UnknownAdapter, StorageFull; Conflict beyond the limit of pins.
        """
        before = self._store.is_pinned(tenant, name)
        pointer = await self._change(partial(self._store.pin, tenant, name, pinned))
        if before != pinned:
            _audit(name, "pin" if pinned else "unpin", pointer.shares, pointer.etag)
            self.pins.renew()
        return pointer

    async def share(self, tenant: str, name: str, readers: Collection[str]) -> Pointer:
        """Share the name with these tenants and no others. Raises UnknownAdapter, StorageFull."""
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
        """Delete the name; running requests keep their version. Raises UnknownAdapter."""
        before = self._shares(tenant, name)
        version = await self._change(partial(self._store.delete, tenant, name))
        self._metrics.adapter_deleted(version.label)
        _audit(name, "delete", before, None)
        self.pins.renew()
        self._forget_unused(before)
        return version

    def apply_remote_changes(self, changes: Iterable[Change]) -> None:
        """Update metrics, pins and the engine after changes made by other servers."""
        for before, after in changes:
            if before is not None and after is None:
                self._metrics.adapter_deleted(before.current.label)
            self._forget_unused(before.shares if before is not None else ())
            self.pins.renew()

    def _with_warnings(self, spec: AdapterSpec) -> AdapterSpec:
        """Return the spec, with a warning added if the config names a base other than the served one."""
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
        """Have the engine drop versions that no name means any more; it does so once their last request ends.

        Concurrent changes may miss a digest, or drop one needed again. That costs a little memory or time only: the
        engine evicts and loads on its own.
        """
        for digest in digests:
            if not self._store.is_answering(digest):
                task = asyncio.create_task(self._engine.forget(digest))
                self._forget_tasks.add(task)
                task.add_done_callback(self._forget_tasks.discard)


def outline_of(files: Outline, base: Ready) -> Outline:
    """Return the outline of the base as the engine loaded it, from the outline of its files."""
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
    """Log a change of a name. The access log's line of the same time has the caller."""
    was = ", ".join(before) or "nothing"
    fields = {"action": action, "adapter": name, "before": dict(before), "after": after, **more}
    audit_log.info("%s %s: %s -> %s", action, name, was, after or "nothing", extra={FIELDS: fields})
