"""Metrics of requests, engine reports and adapters, with a bounded number of series."""

from prometheus_client.parser import text_string_to_metric_families

from server.messages.protocol import AdapterUse, Stats
from server.metrics import Metrics
from tests.support.harness import base_info


def scrape(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by (name, labels); a duplicate series fails."""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            key = (sample.name.removeprefix("lorakeet:"), tuple(sorted(sample.labels.items())))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return scrape(metrics)[name, tuple(sorted(labels.items()))]


def served(metrics: Metrics, adapter: str | None, digest: str = "", *, prompt: int = 5, outputs: int = 3) -> None:
    request = metrics.request(*([(adapter, digest)] if adapter else []))
    for _ in range(outputs):
        request.output(1, prompt, 0.25)
    request.finish("length")


def test_a_request_feeds_counters_and_histograms_once() -> None:
    metrics = Metrics()
    served(metrics, None)
    assert value(metrics, "prompt_tokens_total") == 5
    assert value(metrics, "generation_tokens_total") == 3
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "e2e_request_latency_seconds_count") == 1
    assert value(metrics, "request_queue_time_seconds_sum") == 0.25
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "request_success_total", finished_reason="stop") == 0


def test_an_aborted_request_has_no_latency() -> None:
    metrics = Metrics()
    metrics.request().finish("abort")
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 0
    assert value(metrics, "time_to_first_token_seconds_count") == 0


def test_engine_reports_are_gauges_and_increments() -> None:
    metrics = Metrics()
    report = Stats(
        running=3,
        waiting=2,
        step_requests=3,
        step_adapters=2,
        kv_usage=0.5,
        state_usage=0.75,
        prefix_queries=10,
        prefix_hits=4,
        drafted_tokens=7,
        accepted_tokens=5,
    )
    metrics.add_engine_stats(report)
    metrics.add_engine_stats(report)
    assert value(metrics, "num_requests_running") == 3
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_perc") == 0.5
    assert value(metrics, "state_cache_usage_perc") == 0.75
    assert value(metrics, "prefix_cache_queries_total") == 20
    assert value(metrics, "prefix_cache_hits_total") == 8
    assert value(metrics, "spec_decode_num_draft_tokens_total") == 14
    assert value(metrics, "spec_decode_num_accepted_tokens_total") == 10
    assert value(metrics, "engine_step_adapters_bucket", le="2.0") == 2
    assert value(metrics, "engine_step_adapters_bucket", le="1.0") == 0


def test_a_heartbeat_is_no_step() -> None:
    metrics = Metrics()
    metrics.add_engine_stats(Stats())
    assert value(metrics, "engine_step_requests_count") == 0


def test_counters_survive_the_engine_and_gauges_do_not() -> None:
    metrics = Metrics()
    metrics.add_engine_stats(Stats(running=3, prefix_hits=4, adapters=[AdapterUse("sha256:1", "device", 8, 1, 0)]))
    metrics.set_engine_process(alive=False)
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "engine_up") == 0
    assert value(metrics, "num_loaded_lora_adapters", level="device") == 0
    metrics.add_engine_stats(Stats(prefix_hits=1))
    assert value(metrics, "prefix_cache_hits_total") == 5


def test_adapters_are_counted_by_name() -> None:
    metrics = Metrics()
    served(metrics, "legal", "sha256:1")
    metrics.add_engine_stats(
        Stats(
            loads=[("sha256:1", 0.5)],
            evictions=["sha256:1", "sha256:unknown"],
            adapters=[AdapterUse("sha256:1", "host", 8, 0, 0), AdapterUse("sha256:unknown", "device", 4, 0, 0)],
        )
    )
    assert value(metrics, "lora_requests_total", adapter_name="legal") == 1
    assert value(metrics, "lora_prompt_tokens_total", adapter_name="legal") == 5
    assert value(metrics, "lora_generation_tokens_total", adapter_name="legal") == 3
    assert value(metrics, "lora_adapter_load_seconds_total", adapter_name="legal") == 0.5
    assert value(metrics, "lora_adapter_evictions_total", adapter_name="legal") == 1
    assert value(metrics, "lora_adapter_evictions_total", adapter_name="other") == 1
    assert value(metrics, "lora_adapter_loaded", adapter_name="legal", level="host", pinned="false", rank="8") == 1
    assert value(metrics, "lora_adapter_loaded", adapter_name="other", level="device", pinned="false", rank="") == 1


def test_adapters_are_told_by_their_changes() -> None:
    metrics = Metrics()
    served(metrics, "legal", "sha256:1")
    metrics.add_engine_stats(Stats(adapters=[AdapterUse("sha256:1", "host", 8), AdapterUse("sha256:2", "device", 4)]))
    metrics.add_engine_stats(Stats())
    moved = [AdapterUse("sha256:1", "host", present=False), AdapterUse("sha256:1", "device", 8)]
    metrics.add_engine_stats(Stats(adapters=[*moved, AdapterUse("sha256:2", "device", present=False)]))
    loaded = {labels: count for (name, labels), count in scrape(metrics).items() if name == "lora_adapter_loaded"}
    labels = {"adapter_name": "legal", "level": "device", "pinned": "false", "rank": "8"}
    assert loaded == {tuple(sorted(labels.items())): 1}


def test_ten_thousand_adapters_make_a_bounded_number_of_series() -> None:
    metrics = Metrics(top_adapters=4)
    served(metrics, "a0", "d0")
    few = len(scrape(metrics))
    for i in range(10_000):
        served(metrics, f"a{i}", f"d{i}", outputs=1)
    samples = scrape(metrics)
    assert len(samples) - few <= 3 * 6  # three more names, six series each
    requests = {labels: n for (name, labels), n in samples.items() if name == "lora_requests_total"}
    assert sum(requests.values()) == 10_001
    assert requests[(("adapter_name", "a9999"),)] == 1
    assert requests[(("adapter_name", "other"),)] == 10_001 - 4


def test_a_deleted_adapter_leaves_its_sums_in_other() -> None:
    metrics = Metrics()
    served(metrics, "legal", "sha256:1")
    metrics.adapter_deleted("legal")
    metrics.adapter_deleted("never-seen")
    samples = scrape(metrics)
    assert ("lora_requests_total", (("adapter_name", "legal"),)) not in samples
    assert value(metrics, "lora_requests_total", adapter_name="other") == 1


def test_an_adapter_called_other_does_not_break_the_page() -> None:
    metrics = Metrics()
    served(metrics, "other", "sha256:1")
    assert value(metrics, "lora_requests_total", adapter_name="other") == 1


def test_gateway_info_names_running_and_waiting_adapters() -> None:
    metrics = Metrics()
    requests = [
        metrics.request(("b", "sha256:1")),
        metrics.request(("a", "sha256:1")),
        metrics.request(("c", "sha256:2")),
    ]
    requests.append(metrics.request(("d", "sha256:3")))  # still on disk
    metrics.add_engine_stats(
        Stats(adapters=[AdapterUse("sha256:1", "device", 8, 2, 0), AdapterUse("sha256:2", "host", 8, 0, 1)])
    )
    labels = {"max_lora": "1", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c,d"}
    assert value(metrics, "lora_requests_info", **labels) > 1.6e9
    for request in requests:
        request.finish("stop")
    gone = [AdapterUse("sha256:1", "device", present=False), AdapterUse("sha256:2", "host", present=False)]
    metrics.add_engine_stats(Stats(adapters=[*gone, AdapterUse("sha256:2", "device", 8, 0, 0)]))
    labels = {"max_lora": "1", "running_lora_adapters": "c", "waiting_lora_adapters": ""}  # resident without requests
    assert value(metrics, "lora_requests_info", **labels) > 1.6e9


def test_a_pinned_adapter_is_named_before_anybody_asks_for_it() -> None:
    metrics = Metrics()
    metrics.set_pinned([("faq", "sha256:1")], 4096)
    metrics.add_engine_stats(Stats(adapters=[AdapterUse("sha256:1", "device", 8, 0, 0)]))
    labels = {"max_lora": "1", "running_lora_adapters": "faq", "waiting_lora_adapters": ""}
    assert value(metrics, "lora_requests_info", **labels) > 1.6e9
    labels = {"adapter_name": "other", "level": "device", "pinned": "true", "rank": ""}
    assert value(metrics, "lora_adapter_loaded", **labels) == 1


def test_residency_tells_tier_pin_and_rank() -> None:
    metrics = Metrics()
    served(metrics, "legal", "sha256:1")
    served(metrics, "poet", "sha256:2")
    metrics.set_pinned([("legal", "sha256:1")], 4096)
    metrics.set_engine_process(alive=True, info=base_info())
    metrics.add_engine_stats(
        Stats(
            adapters=[
                AdapterUse("sha256:1", "device", 8, 0, 0),
                AdapterUse("sha256:1", "merged", 8, 0, 0),
                AdapterUse("sha256:2", "host", 64, 0, 0),
                AdapterUse("sha256:3", "device", 5, 0, 0),
                AdapterUse("sha256:4", "device", 6, 0, 0),
            ]
        )
    )
    loaded = {labels: n for (name, labels), n in scrape(metrics).items() if name == "lora_adapter_loaded"}
    assert {tuple(value for _, value in labels): n for labels, n in loaded.items()} == {
        ("legal", "device", "true", "8"): 1,
        ("legal", "merged", "true", "8"): 1,
        ("poet", "host", "false", "64"): 1,
        ("other", "device", "false", ""): 2,
    }
    assert value(metrics, "num_gpu_loaded_lora_adapters") == 3
    assert value(metrics, "max_gpu_lora_adapters") == min(base_info().pool_rows.values()) // 16
    labels = {"block_size": str(base_info().block_size), "num_gpu_blocks": str(base_info().num_blocks)}
    assert value(metrics, "cache_config_info", **labels) == 1
    metrics.set_engine_process(alive=False)
    assert value(metrics, "num_gpu_loaded_lora_adapters") == 0


def test_another_prefix_renames_everything_of_ours() -> None:
    ours, vllm = Metrics(), Metrics(prefix="vllm")
    for metrics in (ours, vllm):
        served(metrics, "legal", "sha256:1")
    expected = {name for name, _ in scrape(ours)}
    names = {
        sample.name for family in text_string_to_metric_families(vllm.render().decode()) for sample in family.samples
    }
    own = {name for name in names if name.startswith("vllm:")}
    assert {name.removeprefix("vllm:") for name in own} | (names - own) == expected
    assert names - own == {name for name in expected if name.startswith("process_")}
    # Names used by dashboards for vLLM and by the Gateway's endpoint picker.
    assert {
        *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
        *("vllm:lora_requests_info", "vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_bucket"),
    } <= own


def test_tenants_have_series_of_bounded_number() -> None:
    metrics = Metrics(top_tenants=2)
    for tenant in ("", "acme", "rival", "third", "acme"):
        metrics.request(tenant=tenant).output(2, 5, 0.0)
    samples = scrape(metrics)
    requests = {labels: n for (name, labels), n in samples.items() if name == "tenant_requests_total"}
    assert requests == {(("tenant", "default"),): 1, (("tenant", "acme"),): 2, (("tenant", "other"),): 2}
    assert value(metrics, "tenant_tokens_total", tenant="acme", kind="prompt") == 10
    assert value(metrics, "tenant_tokens_total", tenant="other", kind="generation") == 4


def test_equal_names_of_two_tenants_are_two_adapters() -> None:
    metrics = Metrics()
    for tenant, label in (("", "law"), ("acme", "acme//law")):
        metrics.request((label, "sha256:1"), tenant=tenant).output(1, 5, 0.0)
    assert value(metrics, "lora_requests_total", adapter_name="law") == 1
    assert value(metrics, "lora_requests_total", adapter_name="acme//law") == 1
    assert metrics.usage.get("acme", "acme//law").requests == 1
    assert metrics.usage.get("acme", "law").requests == 0
    metrics.adapter_deleted("acme//law")
    assert metrics.usage.get("acme", "acme//law").requests == 0
    assert metrics.usage.get("", "law").requests == 1
