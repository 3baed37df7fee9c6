"""Scenario files: accepted contents, and refusals with the name of the culprit."""

from pathlib import Path

import pytest

from loadtest.scenario import Closed, Open, ScenarioError, TraceFile, load_scenario

MINIMAL = """
name = "x"
[load]
kind = "closed"
concurrency = 2
requests = 4
[lengths]
kind = "fixed"
prompt = 8
output = 4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return path


def test_minimal(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, MINIMAL))
    assert scenario.load == Closed(concurrency=2, requests=4)
    assert scenario.points() == [scenario]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("requests = 4", "requests = 0"), "load.requests"),
        (('kind = "closed"', 'kind = "shut"'), "shut"),
        (("prompt = 8", "prompts = 8"), "prompts"),
        (('name = "x"', ""), "name"),
        (('name = "x"', 'name = "x"\ntoken_ids = [9, 5]'), "token_ids"),
        (('name = "x"', 'name = "x"\nsweep = {rate = [1.0]}'), "sweep.rate"),
        (('name = "x"', 'name = "x"\nadapters = {names = ["a"], count = 2}'), "adapters.names"),
        (('name = "x"', 'name = "x"\nadapters = {popularity = {kind = "zipf", a = 0.0}}'), "popularity.a"),
        (('name = "x"', "name ="), "line 2"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    with pytest.raises(ScenarioError, match=named):
        load_scenario(write(tmp_path, MINIMAL.replace(*change)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="nowhere"):
        load_scenario(tmp_path / "nowhere.toml")


def test_sweeps_change_one_thing(tmp_path: Path) -> None:
    swept = load_scenario(write(tmp_path, MINIMAL + "[sweep]\nadapters = [1, 8]\n"))
    assert [point.adapters.count for point in swept.points()] == [1, 8]
    assert [point.seed for point in swept.points()] == [0, 1]
    text = MINIMAL.replace('"closed"\nconcurrency = 2', '"open"\nrate = 1.0') + "[sweep]\nrate = [2.0, 4.0]\n"
    loads = [point.load for point in load_scenario(write(tmp_path, text)).points()]
    assert loads == [Open(rate=2.0, requests=4), Open(rate=4.0, requests=4)]


def test_trace_lies_beside_the_scenario(tmp_path: Path) -> None:
    text = MINIMAL.replace('kind = "fixed"\nprompt = 8\noutput = 4', 'kind = "trace"\nfile = "t.csv"')
    lengths = load_scenario(write(tmp_path, text)).lengths
    assert isinstance(lengths, TraceFile)
    assert Path(lengths.file) == tmp_path / "t.csv"


def test_shipped_scenarios_are_valid() -> None:
    import loadtest

    files = sorted((Path(loadtest.__file__).parent / "scenarios").glob("*.toml"))
    assert files
    assert all(load_scenario(file).points() for file in files)
