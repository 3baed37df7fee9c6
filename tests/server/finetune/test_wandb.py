"""Jobs reported to Weights & Biases."""

import importlib.machinery
import sys
import types
from typing import Any

import pytest

from tests.support.site import TuningSite, eventually, refused


async def test_wandb_is_refused_by_name_where_it_is_not_installed(
    site: TuningSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    body = {
        "model": "tiny",
        "training_file": await site.upload(),
        "integrations": [{"type": "wandb", "wandb": {"project": "p"}}],
    }
    response = await site.client.post("/v1/fine_tuning/jobs", json=body)
    assert "wandb" in refused(response, "integrations.0")


class FakeWandb(types.ModuleType):
    """Records its calls, and raises after two steps."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.opened: list[dict[str, Any]] = []
        self.steps: list[int] = []
        self.codes: list[int] = []

    def init(self, **settings: Any) -> "FakeWandb":
        self.opened.append(settings)
        return self

    def log(self, data: dict[str, Any], step: int) -> None:
        assert data["train_loss"] > 0
        self.steps.append(step)
        if step >= 2:
            raise ConnectionError("the network is down")

    def finish(self, exit_code: int) -> None:
        self.codes.append(exit_code)


async def test_wandb_gets_every_step_and_its_faults_touch_nothing(
    site: TuningSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    integration = {"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}
    job = await site.create(integrations=[integration], hyperparameters={"n_epochs": 1, "batch_size": 3})
    done = await site.until(job["id"])
    assert done["status"] == "succeeded"
    assert done["integrations"][0]["wandb"]["project"] == "p"
    await eventually(lambda: bool(wandb.codes))
    (opened,) = wandb.opened
    assert (opened["project"], opened["id"], opened["name"]) == ("p", job["id"], job["id"])
    assert (wandb.steps, wandb.codes) == ([1, 2, 3, 4], [0])
