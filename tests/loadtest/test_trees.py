"""Two checkouts compared: the code that each side runs, and the resulting ratios."""

import os
import subprocess
from pathlib import Path

from loadtest.peers.base import Kit
from loadtest.trees import This, other, table, verdicts


def test_each_side_runs_the_code_of_its_checkout(tmp_path: Path) -> None:
    """From any working directory, even a checkout's own folder."""
    package = tmp_path / "server"
    package.mkdir()
    (package / "__init__.py").write_text("")
    show = "import sys; print(sys.modules['server'].__file__); print(sys.argv[1:])"
    (package / "cli.py").write_text(f"def main():\n    {show}\n")
    kit = Kit(model=tmp_path, adapters={}, rank=16, threads=2, folder=tmp_path)
    side = other(tmp_path)()
    assert side.missing_reason() is None
    command, environment = side.command(kit, 8000)
    here = Path(__file__).parents[2]
    shown = subprocess.run(command, env=os.environ | environment, cwd=here, capture_output=True, text=True, check=True)
    file, arguments = shown.stdout.splitlines()
    assert Path(file) == package / "__init__.py"
    assert arguments.startswith("['serve', '--model'")
    assert This().command(kit, 8000)[1]["PYTHONPATH"] == str(here)


def test_a_folder_without_a_server_takes_no_part(tmp_path: Path) -> None:
    assert other(tmp_path)().missing_reason() == f"{tmp_path} is no checkout"


def test_verdicts_go_by_the_median_of_neighbouring_rounds() -> None:
    rates = {"this": [98.0, 50.0, 99.0], "other": [100.0, 50.0, 90.0]}
    seconds = {"this": [4.0, 4.4], "other": [4.0, 4.0]}
    measured = verdicts({"one": rates, "eight": rates | {"this": [97.0, 48.0, 99.0]}}, seconds)
    assert [line["value"] for line in measured] == ["1.000", "0.970", "1.050"]
    assert [line["holds"] for line in measured] == [True, False, True]
    shown = table({"decode": {"one": rates}, "start_seconds": seconds})
    assert shown.row_count == 2
