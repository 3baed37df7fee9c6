"""Scrape `/metrics` and print each adapter's generated tokens and the current load.

python examples/metrics.py
"""

import os
import sys

import httpx
from prometheus_client.parser import text_string_to_metric_families

URL = os.environ.get("LORAKEET_URL", "http://127.0.0.1:8000")


def main() -> None:
    page = httpx.get(f"{URL}/metrics").raise_for_status().text  # usually needs no key
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    for sample in samples:
        if sample.name == "lorakeet:lora_generation_tokens_total":
            print(f"{sample.labels['adapter_name']}: {sample.value:.0f} tokens")
    load = {sample.name: sample.value for sample in samples if not sample.labels}
    running, waiting = load["lorakeet:num_requests_running"], load["lorakeet:num_requests_waiting"]
    print(f"{running:.0f} running, {waiting:.0f} waiting, KV cache {load['lorakeet:kv_cache_usage_perc']:.0%} used")


if __name__ == "__main__":
    main(*sys.argv[1:])
