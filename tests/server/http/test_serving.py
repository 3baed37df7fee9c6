"""The server's listeners, and the addresses in its greeting."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.storage.database import DatabaseBusy
from server.http.serving import _Server, bind
from server.model_source import ModelError
from server.settings import SettingError, Settings
from tests.support.harness import Site


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "\u00df" * 300])
def test_names_that_no_host_can_have(host: str) -> None:
    with pytest.raises(SettingError, match=r"^--host: "):
        bind(host, 0)


def server(**services: Any) -> _Server:
    """A server without listeners."""
    made = _Server.__new__(_Server)
    made._services = cast("Any", SimpleNamespace(**services))
    made.failure, made.should_exit = None, False
    return made


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "http://127.0.0.1:81"),
        ("0.0.0.0", "http://127.0.0.1:81"),
        ("::1", "http://[::1]:81"),
        ("::", "http://[::1]:81"),
    ],
)
def test_the_greeting_has_an_address_that_works(host: str, shown: str) -> None:
    made = server(settings=Settings(), tenants=SimpleNamespace(requires_key=False))
    listener = SimpleNamespace(getsockname=lambda: (host, 81, 0, 0))
    made.servers = [cast("Any", SimpleNamespace(sockets=[listener]))]
    assert f" on {shown}. Try:" in made._greeting()


def test_idle_connections_stay_open_as_long_as_told(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, keep_alive_seconds=620)) as site:
        assert _Server(site.services, cast("Any", site.engine)).config.timeout_keep_alive == 620


async def test_a_failure_during_startup_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run without ever becoming ready."""

    async def import_configured(tenant: str) -> None:
        raise DatabaseBusy("another process holds adapters.db")

    async def wait() -> None:
        pass

    made = server(registry=SimpleNamespace(discovery=SimpleNamespace(import_configured=import_configured)))
    made._engine = cast("Any", SimpleNamespace(failed_for_good=SimpleNamespace(wait=wait)))
    await made._start()
    assert made.should_exit
    assert isinstance(made.failure, ModelError)
    assert "another process holds adapters.db" in str(made.failure)
