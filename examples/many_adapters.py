"""Send one prompt to many adapters concurrently; their requests share forward passes.

python examples/many_adapters.py "Once upon a time" [ADAPTER ...]      (default: all adapters)
"""

import asyncio
import os
import sys
import time

from openai import AsyncOpenAI

URL = os.environ.get("LORAKEET_URL", "http://127.0.0.1:8000")


async def main(prompt: str, *adapters: str) -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("LORAKEET_API_KEY", "none"))
    _, *listed = [model.id async for model in client.models.list()]  # the base comes first

    async def ask(adapter: str) -> tuple[str, int]:
        answer = await client.completions.create(model=adapter, prompt=prompt, max_tokens=16, temperature=0)
        assert answer.usage is not None
        return answer.choices[0].text, answer.usage.completion_tokens

    names = adapters or listed
    began = time.perf_counter()
    answers = await asyncio.gather(*map(ask, names))
    seconds = time.perf_counter() - began
    for name, (text, _) in zip(names, answers, strict=True):
        print(f"{name}: {' '.join(text.split())}")
    print(f"{len(names)} adapters, {sum(tokens for _, tokens in answers) / seconds:.0f} tokens/s")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
