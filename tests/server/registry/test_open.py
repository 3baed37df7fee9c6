"""Opening a version: its name is looked up once, and what it brings is told exactly."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.storage.store import AdapterStore
from adapters.storage.versions import Pointer
from server.openai.target import brings_text
from tests.support.harness import Site, write_adapter


async def test_a_name_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    version, _ = await site.publisher.import_directory("", "a", write_adapter(tmp_path / "a"))
    asked: list[str] = []
    real = AdapterStore.pointer

    def pointer(self: AdapterStore, tenant: str, name: str) -> Pointer:
        asked.append(name)
        return real(self, tenant, name)

    monkeypatch.setattr(AdapterStore, "pointer", pointer)
    for name in ("a", f"a@{version.digest.removeprefix('sha256:')[:12]}"):
        async with site.registry.open("", name) as opened:
            assert opened == version
    assert asked == ["a", "a"]
    site.close()


async def test_a_template_that_is_not_allowed_brings_no_text(tmp_path: Path) -> None:
    site = Site(tmp_path)
    version, _ = await site.publisher.import_directory("", "a", write_adapter(tmp_path / "a"))
    assert site.services.text.renderer is None
    with_template = replace(version, receipt=version.receipt | {"chat_template": True})
    assert not brings_text(site.services, with_template)
    assert brings_text(site.services, replace(version, receipt=version.receipt | {"tokenizer_tokens": 1}))
    site.close()
