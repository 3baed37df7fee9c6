"""Fine-tune on the resident base, wait for the job to end, and send the new adapter a prompt.

python examples/fine_tune.py DATA.jsonl NAME
"""

import os
import sys
import time
from pathlib import Path

from openai import OpenAI

URL = os.environ.get("LORAKEET_URL", "http://127.0.0.1:8000")


def main(data: str, name: str) -> None:
    client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("LORAKEET_API_KEY", "none"))
    with Path(data).open("rb") as lines:
        file = client.files.create(file=lines, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=next(iter(client.models.list())).id,
        training_file=file.id,
        suffix=name,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        extra_body={"lora": {"r": 8}},
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=5).data):
        print(event.message)
    if job.fine_tuned_model is None:
        raise SystemExit(f"the job {job.status}: {job.error}")

    answer = client.completions.create(model=job.fine_tuned_model, prompt="Once upon a time", max_tokens=16)
    print(f"{job.fine_tuned_model}: {answer.choices[0].text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
