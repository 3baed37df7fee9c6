"""How an adapter gets in, and out: checked against the base, sure to fit, published under a name, forgotten when gone.

Uploads, directories named on the command line, vLLM's load endpoint and finished fine-tunes all come through here, so
whatever the store holds can be served. It knows neither HTTP nor what a request is.
"""

import asyncio
import contextlib
import dataclasses
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from adapters.background import run_in, threads
from adapters.disk import is_full
from adapters.offline.checker import Check, Shape
from adapters.peft_format.directory import CONFIG_NAME, EXTRAS, WEIGHTS_NAME, AdapterError, AdapterSpec
from adapters.peft_format.fields import shorten
from adapters.peft_format.outline import Outline
from adapters.peft_format.text import (
    NO_TEXT,
    TEMPLATE_NAME,
    TOKENIZER_NAME,
    AdapterText,
    NewToken,
    check_template,
    read_new_tokens,
)
from adapters.storage.details import device_bytes
from adapters.storage.files import Staging
from adapters.storage.store import AdapterStore
from adapters.storage.versions import DamagedAdapter, Pointer, RemoteUnavailable, UnknownAdapter, Version, check_name
from server.children.checker import Checker
from server.client.engine import EngineClient
from server.errors import Conflict, EngineUnavailable, InvalidRequest, StorageFull
from server.logs import FIELDS
from server.messages.protocol import AdapterRef, Ready
from server.metrics import Metrics
from server.registry.fit import check_fit, first_that_fit, row_units
from server.settings import SettingError, Settings
from server.text.processor import TextProcessor

_POLL_SECONDS = 0.1
_RETRY_SECONDS = 10.0  # until the files of a pinned adapter are asked for again
_CHANGES = 8  # that are checked, or wait for a disk or a network, at once

T = TypeVar("T")

log = logging.getLogger(__name__)
audit_log = logging.getLogger("server.audit")  # one line per change of what a name means


class AdapterIntake:
    """The one door through which stored adapters change.

    Args:
        settings: `adapter`, `adapter_dir`, `max_uploads` and the base's names are read.
        outline: the base's parameters beside its linears; without, adapters may touch nothing but linears.
        text: the base's, to which an adapter's own is added; without, no adapter brings any.
        checker: the process to check adapters in; without, a thread does.
    """

    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        store: AdapterStore,
        metrics: Metrics,
        outline: Outline | None = None,
        text: TextProcessor | None = None,
        checker: Checker | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._outline = outline or Outline()
        self._text = text
        self._checker = checker
        self._discovering = asyncio.Lock()
        self._unwanted: dict[str, object] = {}  # name in `adapter_dir` -> signature of the files refused or deleted
        self._background: set[asyncio.Task[None]] = set()
        self._workers = threads(_CHANGES, "adapter-intake", settings.background_priority)
        self._pinned: dict[str, contextlib.ExitStack] = {}  # digest -> the lease that keeps its files
        store.check_pins = self._check_pins
        self.upload_slots = asyncio.Semaphore(settings.max_uploads)
        self.receivers = threads(settings.max_uploads, "upload", "normal")  # one for each slot
        self.pending = bool(settings.adapter)  # adapters of the command line are not all there yet

    async def close(self) -> None:
        """End the process that checks."""
        if self._checker is not None:
            await self._checker.close()

    def check_name(self, name: str, *, fine_tuned: bool = False) -> None:
        """Raises AdapterError when an adapter may not be called so."""
        check_name(name, fine_tuned=fine_tuned)
        if name in self._settings.base_aliases:
            raise AdapterError(f"'{name}' is the base model's name.", "name")

    @property
    def base(self) -> Ready:
        """What adapters are checked against. Raises EngineUnavailable before the first engine has come up."""
        info = self._engine.info
        if info is None:
            raise EngineUnavailable(self._engine.unready_reason or "The engine is starting.")
        return info

    @contextlib.asynccontextmanager
    async def stage(self) -> AsyncIterator[Staging]:
        """A private directory for files on their way in; gone afterwards unless `admit` took them. StorageFull."""
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
        staging: Staging,
        *,
        fine_tuned: bool = False,
        promote: bool = True,
        again: bool = True,
        strict_text: bool = True,
    ) -> tuple[Version, bool]:
        """Validate what lies in `staging` and make it the current content of `name`, or with `promote=False` a version
        of it that waits; with `again=False` leave a name that has this version already as it is. A tokenizer or chat
        template that cannot be used is refused, or with `strict_text=False` left out with a warning.

        Returns the version and whether the name changed. Raises AdapterError (its fault), StorageFull,
        EngineUnavailable.
        """
        base = self.base
        self.check_name(name, fine_tuned=fine_tuned)
        text, warnings = await self._text_beside(staging.path, strict=strict_text)
        with disk_faults():
            spec = await self._check(
                Check(staging.path, _shapes(base), base.architecture, self._outline.loaded(tied=base.tied), text)
            )
        check_fit(spec, base)
        spec = self._with_warnings(dataclasses.replace(spec, warnings=(*spec.warnings, *warnings)))
        before = self._shares(tenant, name)
        if before and not again and spec.digest in {known.digest for known in self._store.versions(tenant, name)}:
            return self._store.get(tenant, name), False
        publish = partial(self._store.publish, tenant, name, staging, spec, fine_tuned=fine_tuned, promote=promote)
        version, changed = await self._change(publish)
        if changed:
            _audit(name, "upload" if promote or not before else "stage", before, version.digest)
            self._renew_pins()
            self._forget_unused(before)
        return version, changed

    async def _check(self, check: Check) -> AdapterSpec:
        if self._checker is not None:
            return await self._checker.check(check)
        return await run_in(self._workers, check.run)

    async def import_directory(
        self, tenant: str, name: str, directory: Path, *, again: bool = True
    ) -> tuple[Version, bool]:
        """Copy a PEFT directory of this machine and admit the copy."""
        self.check_name(name)
        async with self.stage() as staging:
            with disk_faults():
                await run_in(self._workers, partial(_copy, directory, staging.path))
            # Whatever trained it may have saved its tokenizer there, adapted to its own needs.
            return await self.admit(tenant, name, staging, again=again, strict_text=False)

    async def _text_beside(self, directory: Path, *, strict: bool) -> tuple[AdapterText, list[str]]:
        """The tokens and the template in a staged directory, whose files are then removed; and warnings."""
        tokenizer, template = directory / TOKENIZER_NAME, directory / TEMPLATE_NAME
        made: AdapterText = NO_TEXT
        warnings: list[str] = []
        base = self._text
        if base is None:
            return made, warnings
        try:
            if tokenizer.exists():
                size = base.tokenizer.get_vocab_size()
                read = partial(_new_tokens, tokenizer, base.tokenizer.token_to_id, size)
                made = AdapterText(await run_in(self._workers, read))
            if template.exists():
                source = check_template(template.read_bytes())
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
        """Split the name's requests between its versions. Raises what `AdapterStore.divide` does, and StorageFull."""
        return await self._repoint("split", tenant, name, partial(self._store.divide, tenant, name, shares, expected))

    async def roll_back(self, tenant: str, name: str, expected: Collection[str] | None) -> Pointer:
        """Undo the last change of the name. Raises what `AdapterStore.roll_back` does, and StorageFull."""
        return await self._repoint("rollback", tenant, name, partial(self._store.roll_back, tenant, name, expected))

    async def pin(self, tenant: str, name: str, pinned: bool) -> Pointer:
        """Keep whatever the name means on the device, now and later, or no longer.

        Raises UnknownAdapter, StorageFull; Conflict when more would be pinned than may be.
        """
        before = self._store.pinned(tenant, name)
        pointer = await self._change(partial(self._store.pin, tenant, name, pinned))
        if before != pinned:
            _audit(name, "pin" if pinned else "unpin", pointer.shares, pointer.etag)
            self._renew_pins()
        return pointer

    async def _repoint(self, action: str, tenant: str, name: str, change: Callable[[], Pointer]) -> Pointer:
        before = self._shares(tenant, name)
        pointer = await self._change(change)
        if before != pointer.shares:
            _audit(name, action, before, pointer.etag, split=dict(pointer.split) or None)
            self._renew_pins()
            self._forget_unused(before)
        return pointer

    async def _change(self, change: Callable[[], T]) -> T:
        with disk_faults():
            return await run_in(self._workers, change)

    async def delete(self, tenant: str, name: str) -> Version:
        """Take the name away; requests that run keep their version. Raises UnknownAdapter."""
        before = self._shares(tenant, name)
        version = await self._change(partial(self._store.delete, tenant, name))
        if self._settings.adapter_dir is not None:  # or the next request would bring it back
            self._unwanted[name] = await run_in_threadpool(_signature, self._settings.adapter_dir / name)
        self._metrics.adapter_deleted(name)
        _audit(name, "delete", before, None)
        self._renew_pins()
        self._forget_unused(before)
        return version

    async def find(self, tenant: str, name: str, digest_prefix: str | None = None) -> Version:
        """A stored version, if need be after a look into `adapter_dir`. Raises UnknownAdapter, AmbiguousDigest."""
        try:
            return self._store.get(tenant, name, digest_prefix)
        except UnknownAdapter:
            if not await self.discover(tenant, name):
                raise
            return self._store.get(tenant, name, digest_prefix)

    async def collect_orphans(self) -> None:
        """Again and again, remove from the object store what no name has: a deletion that it did not hear of, an upload
        that a crash cut short."""
        seconds = self._settings.adapter_orphan_hours * 3600
        while seconds and self._settings.adapter_store is not None:
            try:
                count = await self._store.remove_orphans(seconds)
                if count:
                    log.info("removed %d versions from the object store that no name had", count)
            except RemoteUnavailable as fault:
                log.warning("what no name has stays in the object store: %s", fault)
            await asyncio.sleep(seconds)

    async def bring(self, version: Version) -> None:
        """Wait until a leased version's files are here, for `adapter_store_seconds` at most.

        Raises RemoteUnavailable, DamagedAdapter, StorageFull.
        """
        if self._store.has(version):
            return
        try:
            with disk_faults():
                async with asyncio.timeout(self._settings.adapter_store_seconds):
                    await self._store.ready(version)
        except TimeoutError:
            log.warning("%s took more than --adapter-store-seconds to come from the store", version.digest)
            raise RemoteUnavailable("its files have not come in time") from None
        except (RemoteUnavailable, DamagedAdapter) as fault:
            log.warning("adapter %s (%s) cannot be served: %s", version.name, version.digest, fault)
            raise

    async def discover(self, tenant: str, name: str) -> bool:
        """Look for an unknown name in `adapter_dir`; whether it is in the store now."""
        root = self._settings.adapter_dir
        if root is None:
            return False
        try:
            self.check_name(name)
        except AdapterError:
            return False
        async with self._discovering:
            return await self._import_found(tenant, name, root / name)

    async def import_configured(self, tenant: str) -> None:
        """Once an engine is up, bring in `adapter` and everything in `adapter_dir`.

        Raises SettingError when an adapter named by `--adapter` is refused: the server must not start without it.
        """
        while self._engine.info is None:  # noqa: ASYNC110 - the engine's interface has no event
            await asyncio.sleep(_POLL_SECONDS)
        self._renew_pins()
        for name, directory in self._settings.adapter_directories.items():
            try:
                version, changed = await self.import_directory(tenant, name, directory)
            except (AdapterError, OSError, RemoteUnavailable) as error:
                raise SettingError(f"--adapter {name}: {error}") from None
            log.info("adapter %s is %s%s", name, version.digest, "" if changed else " (unchanged)")
        self.pending = False
        root = self._settings.adapter_dir
        for directory in sorted(root.iterdir()) if root is not None and root.is_dir() else ():
            if directory.is_dir():
                async with self._discovering:
                    await self._import_found(tenant, directory.name, directory)

    async def _import_found(self, tenant: str, name: str, directory: Path) -> bool:
        signature = await run_in_threadpool(_signature, directory)
        if signature is None or self._unwanted.get(name) == signature:
            return False
        try:
            # Whoever gave the name another version since, over HTTP, meant it: the same old files do not undo that.
            await self.import_directory(tenant, name, directory, again=False)
        except (AdapterError, OSError, StorageFull, Conflict, RemoteUnavailable) as error:
            self._unwanted[name] = signature  # until its files change
            log.warning("--adapter-dir: %s is not served: %s", name, error)
            return False
        self._unwanted.pop(name, None)
        return True

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
            if not self._store.answers(digest):
                self._in_background(self._engine.forget(digest))

    # --- pins ------------------------------------------------------------------------------------------

    def _renew_pins(self) -> None:
        """Lease what is pinned now, and tell the engine; what is not here yet follows when it has been fetched."""
        versions = self._store.pinned_versions()
        base = self._engine.info
        if base is None or not (versions or self._pinned):  # when the first engine is up, all this follows
            return
        fitting = first_that_fit(versions, self._room_for_pins(base))
        for version in versions[len(fitting) :]:
            log.warning("%s is pinned beyond --adapter-pinned-bytes; it may be evicted", version.name)
        wanted = {version.digest: version for version in fitting}
        for digest in self._pinned.keys() - wanted.keys():
            self._pinned.pop(digest).close()
        here = []
        for digest, version in wanted.items():
            if digest not in self._pinned:
                held = contextlib.ExitStack()
                with contextlib.suppress(UnknownAdapter):  # removed this very moment: another change follows
                    held.enter_context(self._store.lease(version))
                    self._pinned[digest] = held
                    if not self._store.has(version):
                        self._in_background(self._bring_pinned(version))
            if digest in self._pinned and self._store.has(version):
                here.append(AdapterRef(digest=digest, path=str(version.path)))
        self._engine.pin(here)
        size = sum(device_bytes(version.receipt["rows"], base.linears) for version in fitting)
        self._metrics.pinned(len(fitting), size)

    async def _bring_pinned(self, version: Version) -> None:
        while version.digest in self._pinned:
            try:
                await self.bring(version)
            except (RemoteUnavailable, DamagedAdapter, StorageFull):
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._renew_pins()
                return

    def _check_pins(self, versions: list[Version]) -> None:
        """Raises Conflict when these are too much to be pinned together."""
        room = self._room_for_pins(self.base)
        fitting = first_that_fit(versions, room)
        if len(fitting) < len(versions):
            excess = row_units([*fitting, versions[len(fitting)]])
            kind = next(kind for kind in excess if excess[kind] > room.get(kind, 0))
            raise Conflict(
                f"Pinned adapters would take {excess[kind]} rows of {kind} on the device, and may take "
                f"{room.get(kind, 0)} (--adapter-pinned-bytes). Unpin one.",
                param="name",
                code="pin_limit",
            )

    def _room_for_pins(self, base: Ready) -> dict[str, int]:
        """Row units per kind that pinned adapters may take: as large a share of each as of all the memory."""
        total = device_bytes({kind: units for kind, units in base.pool_rows.items() if kind != EXTRAS}, base.linears)
        allowed = self._settings.adapter_pinned_bytes
        share = 0.5 if allowed is None else min(1.0, allowed / max(total, 1))
        return {kind: int(units * share) for kind, units in base.pool_rows.items()}

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _audit(name: str, action: str, before: Mapping[str, float], after: str | None, **more: object) -> None:
    """Who asked is in the access log's line of the same moment."""
    was = ", ".join(before) or "nothing"
    fields = {"action": action, "adapter": name, "before": dict(before), "after": after, **more}
    audit_log.info("%s %s: %s -> %s", action, name, was, after or "nothing", extra={FIELDS: fields})


@contextlib.contextmanager
def disk_faults() -> Iterator[None]:
    """A full disk, whoever met it, becomes the HTTP side's StorageFull."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise StorageFull("The disk is full; nothing was kept.") from None
        raise


def _shapes(base: Ready) -> dict[str, Shape]:
    return {name: Shape(linear.kind, linear.in_features, linear.out_features) for name, linear in base.linears.items()}


def _new_tokens(tokenizer: Path, known: Callable[[str], int | None], size: int) -> tuple[NewToken, ...]:
    return read_new_tokens(tokenizer.read_bytes(), known, size)


def _copy(directory: Path, target: Path) -> None:
    for name in (CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME, TEMPLATE_NAME):
        if (directory / name).is_file():  # what is missing is named by the validation
            shutil.copyfile(directory / name, target / name)


def _signature(directory: Path) -> tuple[tuple[int, int], ...] | None:
    """Changes whenever the directory's files do; None when it is no adapter at all."""
    try:
        stats = [(directory / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
