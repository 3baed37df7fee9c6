"""Files and jobs over HTTP, with a real trainer."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format import directory as adapter_format
from server.engine.engine import Engine
from server.services import TENANT
from tests.server.finetune.test_dataset import BAD
from tests.support.site import EXAMPLES, FINAL, TrainingEngine, TuningSite, as_file, eventually, refused, tuning_site

# --- files ------------------------------------------------------------------------------------------------


async def test_a_file_and_its_report(site: TuningSite) -> None:
    lines = [*EXAMPLES, EXAMPLES[0], b"", {"prompt": "a", "completion": ""}]
    response = await site.client.post("/v1/files", files=as_file(lines), data={"purpose": "fine-tune"})
    uploaded = response.json()
    assert (uploaded["object"], uploaded["purpose"], uploaded["status"]) == ("file", "fine-tune", "processed")
    assert uploaded["filename"] == "train.jsonl"
    report = uploaded["report"]
    assert (report["examples"], report["duplicates"], report["empty"], report["over_long"]) == (13, 1, 2, 0)
    assert (await site.client.get(f"/v1/files/{uploaded['id']}")).json() == uploaded
    content = await site.client.get(f"/v1/files/{uploaded['id']}/content", headers={"Range": "bytes=nonsense"})
    assert content.content == as_file(lines)["file"][1]
    assert len(content.content) == uploaded["bytes"]


async def test_files_are_listed_and_deleted(site: TuningSite) -> None:
    ids = [await site.upload() for _ in range(3)]
    listed = (await site.client.get("/v1/files?limit=2")).json()
    assert ([f["id"] for f in listed["data"]], listed["has_more"]) == (ids[:0:-1], True)
    rest = (await site.client.get(f"/v1/files?after={ids[1]}&order=desc")).json()
    assert ([f["id"] for f in rest["data"]], rest["has_more"]) == (ids[:1], False)
    gone = await site.client.delete(f"/v1/files/{ids[0]}")
    assert gone.json() == {"id": ids[0], "object": "file", "deleted": True}
    for path in (f"/v1/files/{ids[0]}", f"/v1/files/{ids[0]}/content"):
        refused(await site.client.get(path), "id", 404)
    refused(await site.client.delete(f"/v1/files/{ids[0]}"), "id", 404)


async def test_a_file_is_looked_at_line_by_line(site: TuningSite) -> None:
    lines = [EXAMPLES[0], b"", {"prompt": "a\U0001f99c", "completion": "b"}, {"text": "word " * 3000}]
    uploaded = (await site.client.post("/v1/files", files=as_file(lines), data={"purpose": "fine-tune"})).json()
    preview = f"/v1/files/{uploaded['id']}/preview"
    first = (await site.client.get(f"{preview}?limit=1")).json()
    assert ([line["line"] for line in first["data"]], first["has_more"]) == ([1], True)
    rest = (await site.client.get(f"{preview}?after=1")).json()
    assert ([line["line"] for line in rest["data"]], rest["has_more"]) == ([3, 4], False)
    completion, text = rest["data"]
    [sequence] = completion["sequences"]
    trained = [token for token, counts in zip(sequence["tokens"], sequence["trained"], strict=True) if counts]
    assert trained == ["b", "<|im_end|>"]
    assert "".join(sequence["tokens"]) == "a\U0001f99cb<|im_end|>"
    assert text["cut"]
    assert text["length"] > len(text["sequences"][0]["tokens"])
    shown = [*first["data"], *rest["data"]]
    counts = [sum(sequence["trained"]) for line in shown for sequence in line["sequences"]]
    assert sum(counts) == uploaded["report"]["trained_tokens"]
    refused(await site.client.get(f"{preview}?limit=101"), "limit")
    refused(await site.client.get("/v1/files/file-nobody/preview"), "id", 404)


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=-1", "limit=10001", "limit=99999999999999999999"])
async def test_bad_limits(site: TuningSite, query: str) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        refused(await site.client.get(f"{path}?{query}"), "limit")


async def test_bad_cursors(site: TuningSite) -> None:
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        refused(await site.client.get(f"{path}?after=nobody"), "after")
    refused(await site.client.get("/v1/files?order=random"), "order")


@pytest.mark.parametrize(("line", "field"), BAD[::6], ids=range(len(BAD[::6])))
async def test_bad_data_is_refused_with_line_and_field_and_nothing_kept(
    site: TuningSite, line: Any, field: str | None
) -> None:
    response = await site.client.post("/v1/files", files=as_file([EXAMPLES[0], line]), data={"purpose": "fine-tune"})
    message = refused(response, "file")
    assert message.startswith("line 2")
    assert field is None or f"`{field}`" in message
    assert (await site.client.get("/v1/files")).json()["data"] == []
    assert [path.name for path in (site.settings.data_dir / "files").iterdir()] == ["staging"]


async def test_bad_uploads(site: TuningSite) -> None:
    part = as_file(EXAMPLES)
    refused(await site.client.post("/v1/files", files=part), "purpose")
    refused(await site.client.post("/v1/files", files=part, data={"purpose": "assistants"}), "purpose")
    missing = {"other": ("train.jsonl", b"{}")}
    refused(await site.client.post("/v1/files", files=missing, data={"purpose": "fine-tune"}), "other")
    refused(await site.client.post("/v1/files", files=as_file([]), data={"purpose": "fine-tune"}), "file")


# --- a job's life -------------------------------------------------------------------------------------------


async def test_from_file_to_model(site: TuningSite) -> None:
    validation = await site.upload(EXAMPLES[:3])
    job = await site.create(
        suffix="mine",
        validation_file=validation,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    )
    assert job["status"] == "validating_files"
    done = await site.until(job["id"])
    assert done["status"] == "succeeded", done["error"]
    assert done["fine_tuned_model"] == f"ft:tiny:mine:{job['id'][6:14]}"
    assert done["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert done["error"] is None
    assert done["finished_at"] >= done["created_at"]
    assert done["metadata"] == {"team": "a"}

    checkpoints = (await site.client.get(f"/v1/fine_tuning/jobs/{job['id']}/checkpoints")).json()["data"]
    assert [c["step_number"] for c in checkpoints] == [6, 3]
    names = {c["fine_tuned_model_checkpoint"] for c in checkpoints} | {done["fine_tuned_model"]}
    assert names == {version.name for version in site.store.list(TENANT)}
    assert all(c["metrics"]["full_valid_loss"] is not None for c in checkpoints)
    config = (await site.client.get(f"/v1/adapters/{done['fine_tuned_model']}/config")).json()
    assert (config["r"], config["target_modules"]) == (4, ["q_proj", "v_proj"])

    (result_file,) = done["result_files"]
    results = (await site.client.get(f"/v1/files/{result_file}/content")).text.splitlines()
    assert results[0].startswith("step,train_loss,")
    assert [line.split(",")[0] for line in results[1:]] == ["1", "2", "3", "4", "5", "6"]
    await eventually(lambda: not list((site.settings.data_dir / "jobs").iterdir()))

    messages = await site.messages(job["id"])
    assert messages[-1] == "The job has successfully completed"
    assert any(message.startswith("Step 6/6: training loss=") for message in messages)
    page = (await site.client.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=2")).json()
    assert page["has_more"]
    assert page["data"][0]["message"] == messages[-1]

    metrics = (await site.client.get("/metrics")).text
    assert 'lorakeet:finetune_jobs{status="succeeded"} 1.0' in metrics
    assert "lorakeet:finetune_steps_total 6.0" in metrics
    assert job["id"] not in metrics


async def test_a_fine_tune_can_be_fine_tuned(site: TuningSite) -> None:
    first = await site.until((await site.create(lora={"r": 2, "rank_pattern": {"o_proj": 4}}))["id"])
    refused(
        await site.client.post(
            "/v1/fine_tuning/jobs",
            json={"model": first["fine_tuned_model"], "training_file": first["training_file"], "lora": {"r": 8}},
        ),
        "lora",
    )
    second = await site.create(model=first["fine_tuned_model"], training={"learning_rate": 1e-12})
    await site.client.delete(f"/v1/models/{first['fine_tuned_model']}")  # the job has its own copy
    second = await site.until(second["id"])
    assert second["status"] == "succeeded", second["error"]
    paths = [
        site.store.get(TENANT, name).path
        for name in (f"{first['fine_tuned_model']}:ckpt-step-{first['step']}", second["fine_tuned_model"])
    ]
    before, after = (adapter_format.load(path) for path in paths)
    for name in before:
        for left, right in zip(before[name], after[name], strict=True):
            assert (left - right).abs().max() < 1e-6


async def test_events_live(site: TuningSite) -> None:
    job = await site.create()

    async def listen(headers: dict[str, str]) -> list[tuple[str, str]]:
        url = f"/v1/fine_tuning/jobs/{job['id']}/events"
        text = (await site.client.get(url, headers={"Accept": "text/event-stream"} | headers)).text
        blocks = text.strip().split("\n\n")
        assert blocks.pop() == "data: [DONE]"
        return [tuple(line.partition(": ")[2] for line in block.splitlines()) for block in blocks]  # type: ignore[misc]

    events = await listen({})
    assert "successfully completed" in events[-1][1]
    assert len(events) == len(await site.messages(job["id"]))
    assert await listen({"Last-Event-ID": events[-3][0]}) == events[-2:]
    url, live = f"/v1/fine_tuning/jobs/{job['id']}/events", {"Accept": "text/event-stream"}
    refused(await site.client.get(url, headers=live | {"Last-Event-ID": "ftevent-nope"}), "Last-Event-ID")
    refused(await site.client.get(f"{url}?after=ftevent-nope", headers=live), "after")


@pytest.mark.parametrize("seconds", [0.05, 0.0])
async def test_silences_between_events_have_comments(tmp_path: Path, engine: TrainingEngine, seconds: float) -> None:
    async with tuning_site(tmp_path / "data", engine, stream_ping_seconds=seconds) as site:
        engine.held = True
        job = await site.create()
        await site.until(job["id"], "running")
        url = f"/v1/fine_tuning/jobs/{job['id']}/events"
        stream = asyncio.create_task(site.client.get(url, headers={"Accept": "text/event-stream"}))
        await asyncio.sleep(0.5)
        engine.held = False
        blocks = (await stream).text.removesuffix("\n\n").split("\n\n")
        assert len(blocks) - blocks.count(": ping") == len(await site.messages(job["id"])) + 1
    assert blocks[-1] == "data: [DONE]"
    pings = [i for i, block in enumerate(blocks) if block == ": ping"]
    if seconds:
        assert len(pings) >= 3
        assert 0 < pings[0] < len(blocks) - 2
    else:
        assert not pings


async def test_jobs_are_found_by_their_metadata(site: TuningSite, engine: TrainingEngine) -> None:
    """OpenAI's: without any filter, by pairs, and those that have none."""
    engine.held = True
    bodies: list[dict[str, Any]] = [{}, {"metadata": {"team": "a", "e": ""}}, {"metadata": {}}]
    ids = [(await site.create(**body))["id"] for body in bodies]
    found = {
        query: [job["id"] for job in (await site.client.get(f"/v1/fine_tuning/jobs?{query}")).json()["data"]]
        for query in ("", "metadata=null", "metadata[team]=a", "metadata[e]=", "metadata[team]=null")
    }
    assert found[""] == ids[::-1]
    assert found["metadata=null"] == [ids[0]]
    assert found["metadata[team]=a"] == found["metadata[e]="] == [ids[1]]
    assert found["metadata[team]=null"] == []
    refused(await site.client.get("/v1/fine_tuning/jobs?metadata=none"), "metadata")


async def test_jobs_wait_for_a_slot_in_order(site: TuningSite, engine: TrainingEngine) -> None:
    engine.held = True
    first, second = [await site.create() for _ in range(2)]
    await site.until(first["id"], "running")
    await site.until(second["id"], "queued")
    await asyncio.sleep(0.05)
    assert (await site.job(second["id"]))["status"] == "queued"
    engine.held = False
    await site.until(second["id"], "running")
    assert (await site.job(first["id"]))["status"] == "succeeded"
    listed = (await site.client.get("/v1/fine_tuning/jobs?limit=1")).json()
    assert ([job["id"] for job in listed["data"]], listed["has_more"]) == ([second["id"]], True)


async def test_pause_and_resume_change_no_bit(site: TuningSite, engine: TrainingEngine) -> None:
    file = await site.upload()
    whole = await site.until((await site.create(training_file=file))["id"])
    paused = await site.create(training_file=file)
    await site.until(paused["id"], "running")
    await eventually(lambda: site.tuning.jobs.get(TENANT, paused["id"]).step >= 2)
    engine.held = True  # otherwise it might finish before the pause
    assert (await site.steer(paused["id"], "pause")).json()["status"] == "pausing"
    engine.held = False
    await site.until(paused["id"], "paused")
    at = engine.pieces
    await asyncio.sleep(0.05)
    assert engine.pieces == at
    refused(await site.steer(paused["id"], "pause"), None)
    assert (await site.steer(paused["id"], "resume")).json()["status"] == "queued"
    done = await site.until(paused["id"])
    assert digest(site, done) == digest(site, whole)
    refused(await site.steer(paused["id"], "resume"), None)


def digest(site: TuningSite, job: dict[str, Any]) -> str:
    return site.store.get(TENANT, job["fine_tuned_model"]).digest


async def test_concurrent_steering_leaves_one_task_per_job(site: TuningSite) -> None:
    job = await site.create(hyperparameters={"n_epochs": 100})

    def working() -> int:
        return sum(task.get_name() == job["id"] for task in asyncio.all_tasks())

    async def steer(action: str) -> int:
        most = 0
        for _ in range(12):
            await site.steer(job["id"], action)
            most = max(most, working())
        return most

    assert max(await asyncio.gather(*map(steer, ["pause", "resume"] * 4))) <= 1
    assert (await site.steer(job["id"], "cancel")).json()["status"] == "cancelled"
    await eventually(lambda: not working())


async def test_only_a_paused_job_is_resumed(site: TuningSite, engine: TrainingEngine) -> None:
    engine.held = True
    job = await site.create(hyperparameters={"n_epochs": 100})
    await site.until(job["id"], "running")
    refused(await site.steer(job["id"], "resume"), None)
    assert (await site.job(job["id"]))["status"] == "running"
    waiting = await site.create()
    await site.until(waiting["id"], "queued")
    refused(await site.steer(waiting["id"], "resume"), None)


async def test_a_waiting_job_pauses_at_once(site: TuningSite, engine: TrainingEngine) -> None:
    engine.held = True
    await site.until((await site.create())["id"], "running")
    waiting = await site.create()
    await site.until(waiting["id"], "queued")
    assert (await site.steer(waiting["id"], "pause")).json()["status"] == "paused"
    assert (await site.steer(waiting["id"], "resume")).json()["status"] == "queued"
    assert (await site.steer(waiting["id"], "cancel")).json()["status"] == "cancelled"
    assert not (site.settings.data_dir / "jobs" / waiting["id"]).exists()


async def test_cancel(site: TuningSite) -> None:
    job = await site.create(hyperparameters={"n_epochs": 100})
    await site.until(job["id"], "running")
    assert (await site.steer(job["id"], "cancel")).json()["status"] == "cancelled"
    refused(await site.steer(job["id"], "cancel"), None)
    await asyncio.sleep(0.05)
    done = await site.job(job["id"])
    assert (done["status"], done["fine_tuned_model"]) == ("cancelled", None)
    again = await site.until((await site.create())["id"])  # the slot is free again
    assert again["status"] == "succeeded"
    refused(await site.steer(again["id"], "cancel"), None)


async def test_a_file_deleted_before_it_was_read_fails_the_job(site: TuningSite, engine: TrainingEngine) -> None:
    engine.unready_reason = "still loading"
    job = await site.create()
    await site.client.delete(f"/v1/files/{job['training_file']}")
    engine.unready_reason = None
    failed = await site.until(job["id"])
    assert (failed["status"], failed["error"]["code"], failed["error"]["param"]) == (
        "failed",
        "file_not_found",
        "training_file",
    )


async def test_a_job_that_cannot_fit_is_refused_before_it_starts(site: TuningSite, engine: TrainingEngine) -> None:
    engine.memory = 1 << 20
    failed = await site.until((await site.create())["id"])
    assert failed["error"]["code"] == "out_of_memory"
    assert "MiB" in failed["error"]["message"]
    assert engine.pieces == 0


# --- deaths ---------------------------------------------------------------------------------------------------


async def test_ten_deaths_of_either_process_change_no_bit(
    tmp_path: Path, tiny_engine: Engine, engine: TrainingEngine
) -> None:
    """The trainer, or the whole API process, dies at random moments; the finished job is the same as without deaths."""
    body: dict[str, Any] = {
        "hyperparameters": {"n_epochs": 4, "batch_size": 3},
        "training": {"checkpoint_every": 1},
        "lora": {"lora_dropout": 0.1, "r": 4},
    }
    async with tuning_site(tmp_path / "whole", engine) as site:
        whole = await site.until((await site.create(**body))["id"])
        expected, rows = digest(site, whole), await result_rows(site, whole)
    choose = random.Random(4)
    root, job_id = tmp_path / "killed", None

    def until_pieces(site: TuningSite, pieces: int) -> Callable[[], bool]:
        return lambda: engine.pieces >= pieces or site.tuning.jobs.get(TENANT, str(job_id)).status in FINAL

    def checkpoint_since_last_death(site: TuningSite) -> Callable[[], bool]:
        return lambda: site.tuning.jobs.get(TENANT, str(job_id)).deaths == 0

    for death in range(11):
        async with tuning_site(root, engine) as site:
            if job_id is None:
                job_id = (await site.create(**body))["id"]
            if death == 10:
                done = await site.until(job_id)
                assert done["status"] == "succeeded", await site.messages(job_id)
                assert digest(site, done) == expected
                assert await result_rows(site, done) == rows
                steps = [m for m in await site.messages(job_id) if m.startswith("Step ")]
                assert len(steps) == len(set(steps)) == len(rows) - 1
                break
            await eventually(until_pieces(site, engine.pieces + choose.randrange(5, 90)))
            if death % 2:  # two engine deaths without a checkpoint in between rightly fail the job
                await eventually(checkpoint_since_last_death(site))
                engine.kill()
                await asyncio.sleep(0.01)


async def result_rows(site: TuningSite, job: dict[str, Any]) -> list[str]:
    return (await site.client.get(f"/v1/files/{job['result_files'][0]}/content")).text.splitlines()


async def test_a_paused_job_stays_paused(tmp_path: Path, engine: TrainingEngine) -> None:
    engine.held = True
    async with tuning_site(tmp_path / "data", engine) as site:
        job = await site.create()
        await site.until(job["id"], "running")
        await site.steer(job["id"], "pause")
        engine.held = False
        await site.until(job["id"], "paused")
    async with tuning_site(tmp_path / "data", engine) as site:
        await asyncio.sleep(0.05)
        assert (await site.job(job["id"]))["status"] == "paused"
        await site.steer(job["id"], "resume")
        assert (await site.until(job["id"]))["status"] == "succeeded"


async def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, engine: TrainingEngine) -> None:
    body: dict[str, Any] = {"training": {"checkpoint_every": 1}}
    async with tuning_site(tmp_path / "data", engine) as site:
        file = await site.upload()
        whole = await site.until((await site.create(training_file=file, **body))["id"])
        job = await site.create(training_file=file, **body)
        await eventually(lambda: len(site.tuning.jobs.resumable(job["id"])) >= 3)
        engine.held = True
    engine.held = False
    newest = max((tmp_path / "data/jobs" / job["id"] / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\xff")
    async with tuning_site(tmp_path / "data", engine) as site:
        done = await site.until(job["id"])
        assert digest(site, done) == digest(site, whole)


async def test_jobs_that_no_database_knows_are_set_aside(tmp_path: Path, engine: TrainingEngine) -> None:
    stray = tmp_path / "data/jobs/ftjob-stray"
    stray.mkdir(parents=True)
    (stray / "checkpoint").write_bytes(b"1")
    async with tuning_site(tmp_path / "data", engine):
        assert not stray.exists()
        assert (tmp_path / "data/lost+found/jobs/ftjob-stray/checkpoint").read_bytes() == b"1"
