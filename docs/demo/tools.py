"""Calls of functions: serve, fine-tune on examples of calls, and ask base and adapter through OpenAI's client.

    make demo-tools

Starts a server of its own like `demo.py`, trains on `calls/train.jsonl` and asks what is in `calls/held_out.jsonl`. An
answer counts if it is one call of the right function with the right arguments. Ends with status 1 below 90%.
"""

import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
from demo import HERE, console, fine_tune, server

TRAINING, HELD_OUT = HERE / "calls/train.jsonl", HERE / "calls/held_out.jsonl"
AT_LEAST_AFTER = 0.9


def called(client: openai.OpenAI, model: str, row: dict[str, Any]) -> list[tuple[str, Any]]:
    """The functions that a model calls for a request, greedily, with their arguments."""
    answer = client.chat.completions.create(
        model=model, messages=row["messages"][:-1], tools=row["tools"], temperature=0, max_tokens=64, stream=False
    )
    calls: list[Any] = answer.choices[0].message.tool_calls or []
    return [(call.function.name, _read(call.function.arguments)) for call in calls]


def _read(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def right(client: openai.OpenAI, model: str) -> float:
    """The share of the held-out requests that a model answers with the right call."""
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(partial(called, client, model), rows)
    hits = 0
    for row, found in zip(rows, answers, strict=True):
        [expected] = [call["function"] for call in row["messages"][-1]["tool_calls"]]
        hit = found == [(expected["name"], json.loads(expected["arguments"]))]
        if not hit and model.startswith("ft:"):
            console.print(f"  wrong: {row['messages'][0]['content']} -> {found}")
        hits += hit
    return hits / len(rows)


def main() -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lorakeet-demo-") as directory:
        console.print("Starting the server (a first start also fetches the model) ...")
        with server(Path(directory)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            base = client.models.list().data[0].id
            before = right(client, base)
            console.print(f"Right calls of {base}: {before:.0%}. Fine-tuning on {TRAINING.relative_to(HERE.parent)}:")
            began = time.monotonic()
            adapter = fine_tune(url, TRAINING, "tools", batch_size=4, learning_rate=0.001)
            trained = time.monotonic() - began
            told = httpx.get(f"{url}/v1/adapters/{adapter}").json()
            console.print(f"Trained in {trained:.0f} s; {adapter} calls in the format {told['tool_format']}.")
            after = right(client, adapter)
    console.print(
        f"\nHeld-out requests with the right function and arguments: base {before:.0%}, adapter {after:.0%}. "
        f"All in {time.monotonic() - started:.0f} s."
    )
    return 0 if after >= AT_LEAST_AFTER else 1


if __name__ == "__main__":
    sys.exit(main())
