"""Publishing and removing adapters, without HTTP."""

import asyncio
import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import AsyncMock

import msgspec
import pytest

from adapters.peft_format.fields import AdapterError
from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable, UnknownAdapter
from server.errors import EngineUnavailable, StorageFull, disk_faults
from server.services import TENANT
from server.settings import SettingError
from server.tenants.caller import OPERATOR_CALLER
from tests.support.harness import Site, base_info, write_adapter

T = TENANT


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


async def test_new_content_changes_the_name_and_the_same_does_not(site: Site) -> None:
    one, two = write_adapter(site.settings.data_dir / "one", 1), write_adapter(site.settings.data_dir / "two", 2)
    first, changed = await site.publisher.import_directory(T, "legal", one)
    assert changed
    again, changed = await site.publisher.import_directory(T, "legal", one)
    assert (again.digest, changed) == (first.digest, False)
    second, changed = await site.publisher.import_directory(T, "legal", two)
    assert changed
    assert second.digest != first.digest
    back, changed = await site.publisher.import_directory(T, "legal", one)
    assert (back.digest, changed) == (first.digest, True)


async def test_the_engine_forgets_what_no_name_points_at(site: Site) -> None:
    one, two = write_adapter(site.settings.data_dir / "one", 1), write_adapter(site.settings.data_dir / "two", 2)
    shared, _ = await site.publisher.import_directory(T, "a", one)
    await site.publisher.import_directory(T, "b", one)
    await site.publisher.import_directory(T, "a", two)  # b still holds the old content
    await asyncio.sleep(0)
    assert site.engine.forgotten == []
    await site.registry.delete(OPERATOR_CALLER, "b")
    await asyncio.sleep(0)
    assert site.engine.forgotten == [shared.digest]


async def test_a_rank_beyond_the_gpus_kernels_is_refused_on_a_gpu_only(site: Site) -> None:
    directory = write_adapter(site.settings.data_dir / "one", rank=513)
    site.engine.info = msgspec.structs.replace(base_info(pool_rows=4096), device="cuda:0")
    with pytest.raises(AdapterError, match="513 is more than the 512") as refusal:
        await site.publisher.import_directory(T, "wide", directory)
    assert refusal.value.param == "r"
    site.engine.info = base_info(pool_rows=4096)
    await site.publisher.import_directory(T, "wide", directory)


async def test_an_adapter_that_can_never_fit_is_refused_with_the_limit(site: Site) -> None:
    site.engine.info = base_info(pool_rows=6)  # an fp32 row takes two units
    with pytest.raises(AdapterError, match=r"rank 4 .* needs 8 rows .* has 6: the largest rank .* is 3") as refusal:
        await site.publisher.import_directory(T, "legal", write_adapter(site.settings.data_dir / "one", rank=4))
    assert refusal.value.param == "r"
    await site.publisher.import_directory(T, "legal", write_adapter(site.settings.data_dir / "one", rank=3))
    assert site.names() == ["legal"]


@pytest.mark.parametrize(
    "name",
    ["smollm2-135m-instruct", "SmolLM2-135M-Instruct", "", ".hidden", "a/", "../x", "a b", "x" * 129, "ä", "ft:x"],
)
async def test_names_that_no_adapter_may_have(site: Site, name: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        await site.publisher.import_directory(T, name, write_adapter(site.settings.data_dir / "one"))
    assert refusal.value.param == "name"
    assert site.names() == []


async def test_names_differing_only_in_case_are_refused(site: Site) -> None:
    one, two = write_adapter(site.settings.data_dir / "one", 1), write_adapter(site.settings.data_dir / "two", 2)
    await site.publisher.import_directory(T, "Legal", one)
    with pytest.raises(AdapterError, match="differs from the adapter 'Legal' in upper and lower case only") as refusal:
        await site.publisher.import_directory(T, "legal", two)
    assert refusal.value.param == "name"
    await site.publisher.import_directory(T, "Legal", two)
    assert site.names() == ["Legal"]
    await site.registry.delete(OPERATOR_CALLER, "Legal")
    both = (site.publisher.import_directory(T, name, one) for name in ("legal", "LEGAL"))
    outcomes = await asyncio.gather(*both, return_exceptions=True)
    assert sorted(isinstance(outcome, AdapterError) for outcome in outcomes) == [False, True], "also concurrently"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
async def test_links_out_of_the_directory_of_adapters_are_not_followed(name: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "adapters", write_adapter(tmp_path / "outside", 1)
    (outside / "tokenizer.json").write_text('{"added_tokens": []}')
    write_adapter(root / "linked", 1)
    (root / "linked" / name).unlink(missing_ok=True)
    (root / "linked" / name).symlink_to(outside / name)
    (root / "away").symlink_to(outside)
    write_adapter(root / ".blobs", 2)
    (root / "inside").symlink_to(root / ".blobs")
    with contextlib.closing(Site(tmp_path, adapter_dir=root)) as site:
        for linked in ("linked", "away"):
            assert not await site.registry.discovery.discover(T, linked)
        assert await site.registry.discovery.discover(T, "inside")
        await site.publisher.import_directory(T, "told", root / "away")  # named by the operator
        assert site.names() == ["inside", "told"]


async def test_without_a_base_nothing_is_admitted(site: Site) -> None:
    site.engine.info = None
    with pytest.raises(EngineUnavailable):
        await site.publisher.import_directory(T, "legal", write_adapter(site.settings.data_dir / "one"))


async def test_concurrent_changes_of_one_name_are_never_mixed(site: Site) -> None:
    sources = [write_adapter(site.settings.data_dir / str(seed), seed) for seed in range(6)]
    results = await asyncio.gather(*(site.publisher.import_directory(T, "legal", source) for source in sources))
    current = site.store.get(T, "legal")
    assert current.digest in {version.digest for version, _ in results}
    source = next(s for s, (v, _) in zip(sources, results, strict=True) if v.digest == current.digest)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (current.path / name).read_bytes() == (source / name).read_bytes()
    await asyncio.sleep(0)
    assert current.digest not in site.engine.forgotten


async def test_the_command_lines_adapters_are_there_before_it_is_ready(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "source")
    site = Site(tmp_path, adapter=(f"legal={source}",))
    site.engine.info = None
    task = asyncio.create_task(site.registry.discovery.import_configured(T))
    await asyncio.sleep(0.01)
    waits = site.registry.discovery.pending
    assert waits
    site.engine.info = base_info()
    await task
    assert not site.registry.discovery.pending
    assert site.names() == ["legal"]
    site.close()


@pytest.mark.parametrize("fault", ["missing", "bad"])
async def test_a_bad_adapter_on_the_command_line_is_an_error(tmp_path: Path, fault: str) -> None:
    source = tmp_path / "source"
    if fault == "bad":
        write_adapter(source, use_dora=True)
    site = Site(tmp_path, adapter=(f"legal={source}",))
    with pytest.raises(SettingError, match="--adapter legal"):
        await site.registry.discovery.import_configured(T)
    site.close()


async def test_a_directory_of_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "good")
    write_adapter(root / "bad", use_dora=True)
    write_adapter(root / "bad name")
    (root / "empty").mkdir()
    site = Site(tmp_path, adapter_dir=root)
    await site.registry.discovery.import_configured(T)
    assert site.names() == ["good"]
    assert "bad is not served" in caplog.text

    assert (await site.registry.find(OPERATOR_CALLER, "good")).name == "good"
    with pytest.raises(UnknownAdapter):
        await site.registry.find(OPERATOR_CALLER, "late")
    write_adapter(root / "late", 3)
    assert (await site.registry.find(OPERATOR_CALLER, "late")).name == "late"

    caplog.clear()
    assert not await site.registry.discovery.discover(T, "bad")
    assert not caplog.records  # examined once, until its files change
    write_adapter(root / "bad", 4, r=5, lora_alpha=17)
    assert not await site.registry.discovery.discover(T, "bad")  # the rank differs from the tensors'
    assert "bad is not served" in caplog.text
    for name in ("../adapters/good", ".", "..", "empty", "x" * 300):
        assert not await site.registry.discovery.discover(T, name)
    site.close()


async def test_an_adapter_that_the_base_hides_is_said_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Site(tmp_path)) as site:
        await site.publisher.import_directory(T, "legal", write_adapter(tmp_path / "legal"))
    with contextlib.closing(Site(tmp_path)):
        assert not caplog.records
    with contextlib.closing(Site(tmp_path, served_model_name="legal")):
        assert "adapter legal is hidden by the base" in caplog.text


async def test_an_import_failed_by_a_transient_fault_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "adapters"
    site = Site(tmp_path, adapter_dir=root)
    await site.registry.discovery.import_configured(T)
    assert "the directory cannot be read yet" in caplog.text
    write_adapter(root / "good")
    for fault in (RemoteUnavailable("down"), DatabaseBusy("held"), StorageFull("full"), OSError("flaky")):
        with monkeypatch.context() as patch:
            patch.setattr(site.publisher, "import_directory", AsyncMock(side_effect=fault))
            await site.registry.discovery.import_configured(T)
        assert f"good is not served: {fault}" in caplog.text
    assert (await site.registry.find(OPERATOR_CALLER, "good")).name == "good"
    site.close()


async def test_a_deleted_adapter_of_the_directory_stays_deleted_until_its_files_change(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "good")
    site = Site(tmp_path, adapter_dir=root)
    await site.registry.discovery.import_configured(T)
    await site.registry.delete(OPERATOR_CALLER, "good")
    with pytest.raises(UnknownAdapter):
        await site.registry.find(OPERATOR_CALLER, "good")
    write_adapter(root / "good", 3)
    assert (await site.registry.find(OPERATOR_CALLER, "good")).name == "good"
    site.close()


async def test_an_upload_outlives_a_restart_with_the_same_directory(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "good")
    write_adapter(tmp_path / "better", 3)
    site = Site(tmp_path, adapter_dir=root)
    await site.registry.discovery.import_configured(T)
    uploaded, _ = await site.publisher.import_directory(T, "good", tmp_path / "better")
    site.close()

    site = Site(tmp_path, adapter_dir=root)
    await site.registry.discovery.import_configured(T)
    assert (await site.registry.find(OPERATOR_CALLER, "good")).digest == uploaded.digest
    site.close()

    write_adapter(root / "good", 4)
    site = Site(tmp_path, adapter_dir=root)
    await site.registry.discovery.import_configured(T)
    assert (await site.registry.find(OPERATOR_CALLER, "good")).digest != uploaded.digest
    site.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_by_any_name(code: int) -> None:
    with pytest.raises(StorageFull), disk_faults():
        raise OSError(code, "no")


def test_other_faults_of_a_disk_are_not_called_full() -> None:
    with pytest.raises(PermissionError), disk_faults():
        raise PermissionError(errno.EACCES, "no")
