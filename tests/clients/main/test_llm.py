"""Simon Willison's `llm`: a model in extra-openai-models.yaml, prompts, `--schema`, tools."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
- model_id: ours
  model_name: {model}
  api_base: {api}
  api_key_name: ours
  supports_schema: true
  supports_tools: true
"""


@pytest.fixture
def home(tmp_path: Path, api: str, model: str) -> Path:
    (tmp_path / "extra-openai-models.yaml").write_text(MODEL.format(model=model, api=api))
    (tmp_path / "keys.json").write_text('{"ours": "none"}')
    return tmp_path


def llm(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "llm", "-m", "ours", "-o", "max_tokens", "80", *arguments]
    environment = os.environ | {"LLM_USER_PATH": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prompt(home: Path) -> None:
    llm(home, "Hello")
    llm(home, "--no-stream", "Hello")


def test_a_schema(home: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 9, "minimum": 0}, "red": {"type": "boolean"}},
        "required": ["age", "red"],
        "additionalProperties": False,
    }
    answer = json.loads(llm(home, "--schema", json.dumps(schema), "Name a bird."))
    assert set(answer) == {"age", "red"}
    assert set(json.loads(llm(home, "--no-stream", "--schema", json.dumps(schema), "Name a bird."))) == {"age", "red"}
    assert llm(home, "--schema", "age int, red bool", "Name a bird.").lstrip().startswith("{")  # more text may follow


def test_tools_are_offered(home: Path) -> None:
    llm(home, "-T", "llm_version", "--no-stream", "Hello")
