"""The command line, against a scripted server."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest import __main__ as main
from loadtest import kernels
from tests.support import fake_server as fake

SCENARIO = """
name = "smoke"
adapters = {names = ["a", "b"]}
slo = {e2e = 60.0}
[load]
kind = "open"
rate = 50.0
requests = 4
[lengths]
kind = "fixed"
prompt = 8
output = 4
"""


async def run(script: fake.Script, tmp_path: Path) -> tuple[int, str, fake.FakeServer]:
    scenario = tmp_path / "s.toml"
    scenario.write_text(SCENARIO)
    async with fake.running(script) as server:
        arguments = ["run", "--url", server.url, "--scenario", str(scenario), "--model", "m", "--out", str(tmp_path)]
        done = await asyncio.to_thread(CliRunner().invoke, main.app, arguments)
        return done.exit_code, done.output, server


async def test_run_prints_a_table_and_writes_both_files(tmp_path: Path) -> None:
    code, output, server = await run(fake.tokens, tmp_path)
    assert code == 0, output
    assert [body["model"] for body in server.bodies] == ["a", "b", "a", "b"]
    point = json.loads((tmp_path / "result.json").read_text())["points"][0]
    assert point["summary"]["output_tokens"] == 16
    assert point["summary"]["goodput"] > 0
    assert "smoke" in (tmp_path / "report.html").read_text()


async def test_run_fails_when_requests_do(tmp_path: Path) -> None:
    refusal = b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nbusy"
    code, output, _ = await run(lambda body: [refusal], tmp_path)
    assert code == 1
    assert "4 x HTTP 429: busy" in output


def test_faults_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["loadtest", "run", "--scenario", "nowhere.toml"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    assert "nowhere.toml" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["compare", "--side", "nobody"], ["peers", "install", "nobody"]])
def test_unknown_names_list_the_known_ones(arguments: list[str]) -> None:
    done = CliRunner().invoke(main.app, arguments)
    assert done.exit_code == 2
    assert "llama" in done.output


def test_kernels_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MODULE", "loadtest.nothing")
    with pytest.raises(kernels.KernelsError, match="No module named"):
        kernels.measure()
