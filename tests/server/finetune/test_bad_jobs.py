"""Jobs refused with the name of the bad field, and estimates of a job's memory."""

from typing import Any

import pytest

from tests.support.site import TuningSite, refused

BAD_NUMBERS = [-1, 2**63, 1.5, "3", True, [1], {}]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("hyperparameters.n_epochs", [0, 1001, *BAD_NUMBERS]),
        ("hyperparameters.batch_size", [0, 4097, *BAD_NUMBERS]),
        ("hyperparameters.learning_rate_multiplier", [0, -1.0, 1001, "1", True]),
        ("seed", BAD_NUMBERS),
        ("suffix", ["", "a" * 65, "a/b", "a:b", "ä", "a b", 5]),
        ("metadata", [{str(n): "" for n in range(17)}, {"a" * 65: ""}, {"a": "b" * 513}, {"a": 1}, [], "x"]),
        ("training.learning_rate", [0, -1, 1.1, "1e-4", True]),
        ("training.lr_scheduler", ["Linear", 1]),
        ("training.warmup_ratio", [-0.1, 1.1]),
        ("training.warmup_steps", BAD_NUMBERS),
        ("training.weight_decay", [-0.1, 1.1]),
        ("training.max_grad_norm", [-1, 1e7]),
        ("training.optimizer", ["sgd", 1]),
        ("training.max_seq_len", [7, 513, *BAD_NUMBERS]),
        ("training.micro_batch_tokens", [0, *BAD_NUMBERS]),
        ("training.packing", [1, "true"]),
        ("training.checkpoint_every", [0, *BAD_NUMBERS]),
        ("training.eval_every", [0, *BAD_NUMBERS]),
        ("training.early_stopping", [0, *BAD_NUMBERS]),
        ("training.nonsense", [1]),
        ("lora.r", [0, 100_000, *BAD_NUMBERS]),
        ("lora.lora_alpha", [0, -1, 1e9, "32", True]),
        ("lora.lora_dropout", [-0.1, 1.0, "0"]),
        ("lora.target_modules", [["nobody"], [], "(", "", 5, [1]]),
        ("lora.target_parameters", [["experts.down_proj"], "experts.down_proj", [1]]),
        ("lora.bias", ["all", "lora_only", 5]),
        ("lora.modules_to_save", [["embed_tokens"], "x"]),
        ("lora.layers_to_transform", [3, [99], -1, "x"]),
        ("lora.rank_pattern", [{"nobody": 2}, {"q_proj": 0}, {"q_proj": "2"}, []]),
        ("lora.alpha_pattern", [{"nobody": 2}, {"q_proj": -1}]),
        ("lora.use_rslora", ["yes", 1]),
        ("lora.init", ["pissa", True]),
        ("lora.use_dora", [True]),
        ("model", ["nobody", "", 5]),
        ("training_file", ["file-nobody", "", 5]),
        ("validation_file", ["file-nobody", "", 5]),
        ("method", [{"type": "dpo"}, {"type": "reinforcement"}, {}, "supervised"]),
        ("integrations", [[{"type": "nobody"}], [{"type": "wandb"}], {}]),
        ("nonsense", [1]),
    ],
)
async def test_a_bad_field_is_named(site: TuningSite, path: str, values: list[Any]) -> None:
    file = await site.upload()
    section, _, field = path.rpartition(".")
    for value in values:
        body: dict[str, Any] = {"model": "tiny", "training_file": file}
        body |= {section: {field: value}} if section else {field: value}
        response = await site.client.post("/v1/fine_tuning/jobs", json=body)
        assert response.status_code in (400, 404), (value, response.text)
        assert str(response.json()["error"]["param"]).startswith(path), (value, response.text)
    assert (await site.client.get("/v1/fine_tuning/jobs")).json()["data"] == []


async def test_a_rank_that_could_not_be_served_is_refused(site: TuningSite) -> None:
    body = {"model": "tiny", "training_file": await site.upload(), "lora": {"r": 513}}  # fp32 rows: 1024 units at most
    assert "513" in refused(await site.client.post("/v1/fine_tuning/jobs", json=body), "lora.r")


async def test_unknown_jobs(site: TuningSite) -> None:
    for path in ("", "/events", "/checkpoints"):
        refused(await site.client.get(f"/v1/fine_tuning/jobs/ftjob-nobody{path}"), "fine_tuning_job_id", 404)
    for verb in ("cancel", "pause", "resume"):
        refused(await site.steer("ftjob-nobody", verb), "fine_tuning_job_id", 404)


async def test_estimate(site: TuningSite) -> None:
    """A 512 x 512 matrix at r = 2 would be 2,048 numbers; here it is 64 x 64 in three layers."""
    body = {"model": "tiny", "lora": {"r": 2, "target_modules": ["q_proj"]}, "training": {"max_seq_len": 64}}
    plan = (await site.client.post("/v1/fine_tuning/estimate", json=body)).json()
    assert plan["parameters"] == 3 * 2 * (64 + 64)
    assert (plan["adapter"], plan["optimizer"]) == (4 * plan["parameters"], 8 * plan["parameters"])
    assert plan["total"]["keep"] > plan["total"]["recompute"]
    assert plan["mode"] == "keep"
    refused(await site.client.post("/v1/fine_tuning/estimate", json=body | {"model": "nobody"}), "model", 404)
