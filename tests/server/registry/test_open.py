"""Opening a version: its name is looked up once, and its text parts are reported exactly."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.peft_format.directory import SPEC_NAME, AdapterSpec
from adapters.peft_format.text import AdapterText
from adapters.storage.store import AdapterStore
from adapters.storage.versions import Pointer
from server.openai.target import has_own_text
from server.tenants.caller import OPERATOR_CALLER
from tests.support.harness import Site, write_adapter


async def test_a_name_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    version, _ = await site.publisher.import_directory("", "a", write_adapter(tmp_path / "a"))
    asked: list[str] = []
    real = AdapterStore.readable_pointer

    def readable(self: AdapterStore, tenant: str, name: str) -> Pointer:
        asked.append(name)
        return real(self, tenant, name)

    monkeypatch.setattr(AdapterStore, "readable_pointer", readable)
    for name in ("a", f"a@{version.digest.removeprefix('sha256:')[:12]}"):
        async with site.registry.open(OPERATOR_CALLER, name) as opened:
            assert opened == version
    assert asked == ["a", "a"]
    site.close()


async def test_a_template_that_is_not_allowed_brings_no_text(tmp_path: Path) -> None:
    site = Site(tmp_path)
    version, _ = await site.publisher.import_directory("", "a", write_adapter(tmp_path / "a"))
    assert site.services.text.renderer is None
    with_template = replace(version, receipt=version.receipt | {"chat_template": True})
    assert not has_own_text(site.services, with_template)
    assert has_own_text(site.services, replace(version, receipt=version.receipt | {"tokenizer_tokens": 1}))
    site.close()


async def test_a_lost_spec_is_made_anew_with_the_stop_tokens_that_a_fine_tune_taught(tmp_path: Path) -> None:
    site = Site(tmp_path)
    async with site.publisher.staging_directory() as staging:
        shutil.copytree(write_adapter(tmp_path / "a"), staging, dirs_exist_ok=True)
        version, _ = await site.publisher.publish("", "a", staging, from_training=AdapterText(stop_tokens=(7,)))
    (version.path / SPEC_NAME).unlink()
    async with site.registry.open(OPERATOR_CALLER, "a", verify=True) as opened:
        assert AdapterSpec.read(opened.path).text.stop_tokens == (7,)
    site.close()
