"""Chat with an adapter through OpenAI's client, streaming, with the base in `model` and the adapter in `adapter_id`.

python examples/chat.py ADAPTER "Hello!"
"""

import os
import sys

from openai import OpenAI

URL = os.environ.get("LORAKEET_URL", "http://127.0.0.1:8000")


def main(adapter: str, question: str) -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("LORAKEET_API_KEY", "none"))
    base = next(iter(client.models.list())).id  # the base is listed first
    stream = client.chat.completions.create(
        model=base,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        stream=True,
        extra_body={"adapter_id": adapter},
    )
    digest = None
    for chunk in stream:
        digest = chunk.system_fingerprint or digest
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print(f"\nanswered by {digest}")


if __name__ == "__main__":
    main(*sys.argv[1:])
