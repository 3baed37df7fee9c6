"""aiperf's command line: generated prompts, streamed by two concurrent clients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_profile(url: str, model: str, model_dir: str, endpoint: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "aiperf", "profile", "--ui", "none", "--workers-max", "1"),
        *("--model", model, "--url", url, "--tokenizer", model_dir, "--endpoint-type", endpoint, "--streaming"),
        *("--concurrency", "2", "--request-count", "4", "--isl", "16", "--osl", "6", "--num-dataset-entries", "4"),
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count"),
        *(["--per-chunk-usage"] if endpoint == "chat" else []),
        *("--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(tmp_path)),
    ]
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # offline it rejects paths
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=online, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    [report] = tmp_path.rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    assert not found.get("error_summary"), found["error_summary"]
    assert found["request_count"]["avg"] == 4
    assert found["output_sequence_length"]["avg"] == 6
