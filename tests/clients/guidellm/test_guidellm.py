"""GuideLLM's command line: generated prompts, streamed by two concurrent clients, over each API that it supports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_benchmark(url: str, model: str, model_dir: str, path: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={url},model={model},request_format={path}"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", "kind=max_requests,count=4"),
        *("--tokenizer", f"kind=huggingface_auto,model={model_dir}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=6"),
        *("--output", f"kind=json,path={report}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    counts = benchmark["metrics"]["request_totals"]
    assert (counts["successful"], counts["errored"]) == (4, 0), benchmark["requests"]["errored"]
    assert {request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]} == {6}
