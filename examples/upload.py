"""Upload a directory written by PEFT's `save_pretrained`, and send the new adapter a prompt.

python examples/upload.py NAME DIRECTORY
"""

import os
import sys
from pathlib import Path

import httpx

URL = os.environ.get("LORAKEET_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("LORAKEET_API_KEY", "none")


def main(name: str, directory: str) -> None:
    with httpx.Client(base_url=URL, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as client:
        with (
            (Path(directory) / "adapter_config.json").open("rb") as config,
            (Path(directory) / "adapter_model.safetensors").open("rb") as weights,
        ):
            response = client.post("/v1/adapters", data={"name": name}, files={"config": config, "weights": weights})
        if response.is_error:  # the message names the refused field or tensor
            raise SystemExit(response.json()["error"]["message"])
        receipt = response.json()
        print(f"{name} is {receipt['digest']}")

        body = {"model": name, "prompt": "Once upon a time", "max_tokens": 16}
        answer = client.post("/v1/completions", json=body).raise_for_status()
        print(answer.json()["choices"][0]["text"])


if __name__ == "__main__":
    main(*sys.argv[1:])
