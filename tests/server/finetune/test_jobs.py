"""The job store: the state machine, the event log and checkpoints, all durable."""

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.storage.database import UnknownCursorError
from adapters.storage.versions import check_name
from server.finetune.database import open_database
from server.finetune.hyperparameters import LoraOptions
from server.finetune.jobs import FINAL, Job, JobError, JobSpec, JobStateError, JobStore, Status, UnknownJobError
from server.messages.training import Metrics, TrainingStep


def spec(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "model": "base",
        "base": "base",
        "training_file": "file-1",
        "seed": 1,
        "lora": LoraOptions(r=8),
    }
    return JobSpec(**(fields | changes))


def training_step(job: Job, loss: float) -> TrainingStep:
    return TrainingStep(
        id=job.id,
        metrics=Metrics(step=1, train_loss=loss),
        total_steps=4,
        learning_rate=1e-3,
        grad_norm=1.0,
        trained_tokens=10,
        seconds=1.0,
        busy_seconds=1.0,
    )


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(open_database(tmp_path / "db.sqlite3"))


def test_a_job_survives_the_process(tmp_path: Path) -> None:
    database = open_database(tmp_path / "db.sqlite3")
    store = JobStore(database)
    job = store.create("", spec(metadata={"a": "b"}, suffix="mine"))
    job = store.move(job, "queued")
    store.record_step(job, training_step(job, 0.5))
    database.close()
    again = JobStore(open_database(tmp_path / "db.sqlite3"))
    (found,) = again.unfinished()
    assert (found.status, found.spec, found.step, found.trained_tokens) == ("queued", job.spec, 1, 10)
    assert again.steps(job.id) == [Metrics(step=1, train_loss=0.5)]
    assert again.events(job.id, limit=9) == JobStore(open_database(tmp_path / "db.sqlite3")).events(job.id, limit=9)


def test_the_model_name_carries_base_suffix_and_id(store: JobStore) -> None:
    job = store.create("", spec(suffix="mine"))
    assert job.model_name == f"ft:base:mine:{job.id[6:14]}"


@pytest.mark.parametrize(
    ("base", "part"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("my model (v2)", "my-model-v2-"),
        ("llama3:8b:q4", "llama3-8b-q4"),
        ("模型", "-"),
        ("long" * 99, ("long" * 99)[:256]),
    ],
)
def test_every_base_makes_a_name_that_an_adapter_may_have(store: JobStore, base: str, part: str) -> None:
    name = store.create("", spec(base=base, suffix="s" * 64)).model_name
    assert name.startswith(f"ft:{part}:s")
    check_name(f"{name}:ckpt-step-1000000", fine_tuned=True)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_an_end_is_final(store: JobStore, status: Status) -> None:
    job = store.create("", spec())
    for step in ("queued", "running", status):
        job = store.move(job, step)
    assert job.finished_at is not None
    for other in get_args(Status):
        with pytest.raises(JobStateError, match=f"is {status}"):
            store.move(job, other)
    assert store.unfinished() == []


def test_a_move_is_checked_against_the_status_now(store: JobStore) -> None:
    stale = store.create("", spec())
    store.move(stale, "cancelled")
    with pytest.raises(JobStateError):
        store.move(stale, "queued")


def test_a_refused_move_changes_nothing(store: JobStore) -> None:
    job = store.create("", spec())
    before = store.events(job.id, limit=99)
    with pytest.raises(JobStateError):
        store.move(job, "succeeded", "Done", fine_tuned_model="x")
    assert store.get("", job.id) == job
    assert store.events(job.id, limit=99) == before


def test_failure_is_an_error_event(store: JobStore) -> None:
    job = store.create("", spec())
    store.move(job, "failed", "No good", error=JobError("invalid_training_file", "No good", "training_file"))
    event = store.events(job.id, limit=1)[0][0]
    assert (event.level, event.type, event.message, event.data) == ("error", "message", "No good", None)


def test_lists_come_newest_first_in_pages(store: JobStore) -> None:
    jobs = [store.create("", spec(metadata={"n": str(n % 2)})) for n in range(5)]
    page, more = store.page("", limit=2)
    assert ([j.id for j in page], more) == ([jobs[4].id, jobs[3].id], True)
    page, more = store.page("", limit=3, after=jobs[3].id)
    assert ([j.id for j in page], more) == ([jobs[2].id, jobs[1].id, jobs[0].id], False)
    odd, _ = store.page("", limit=9, metadata={"n": "1"})
    assert [j.id for j in odd] == [jobs[3].id, jobs[1].id]
    assert store.page("", limit=9, metadata={"n": "1", 'x"]': "1"}) == ([], False)
    assert store.page("", limit=9, metadata=None) == ([], False)
    assert store.page("", limit=9, metadata={}) == store.page("", limit=9)
    with pytest.raises(UnknownCursorError):
        store.page("", limit=9, after="ftjob-nope")


def test_tenants_do_not_see_each_other(store: JobStore) -> None:
    job = store.create("a", spec())
    assert store.page("b", limit=9) == ([], False)
    with pytest.raises(UnknownJobError):
        store.get("b", job.id)


def test_events_in_both_orders(store: JobStore) -> None:
    job = store.create("", spec())
    for n in range(4):
        store.add_event(job.id, f"event {n}", level="warn")
    newest, more = store.events(job.id, limit=2)
    assert ([e.message for e in newest], more) == (["event 3", "event 2"], True)
    older, _ = store.events(job.id, limit=9, after=newest[-1].id)
    assert [e.message for e in older][:2] == ["event 1", "event 0"]
    newer, _ = store.events(job.id, limit=9, after=newest[-1].id, newest_first=False)
    assert [e.message for e in newer] == ["event 3"]
    assert newer[0].number > newest[-1].number


def test_a_repeated_step_replaces_itself_without_a_second_event(store: JobStore) -> None:
    job = store.create("", spec())
    for loss in (0.5, 0.25):
        store.record_step(job, training_step(job, loss))
    assert store.steps(job.id) == [Metrics(step=1, train_loss=0.25)]
    events, _ = store.events(job.id, limit=9)
    (data,) = [e.data for e in events if e.data is not None]
    assert (data["step"], data["total_steps"], data["train_loss"]) == (1, 4, 0.5)


def test_checkpoints(store: JobStore) -> None:
    job = store.create("", spec())
    for step, name in ((2, "m:ckpt-step-2"), (3, None), (4, "m:ckpt-step-4"), (2, "m:ckpt-step-2")):
        store.add_checkpoint(
            job, metrics=Metrics(step=step), name=name, directory=f"step-{step}", hashes={"a": "b"}, trained_tokens=step
        )
    assert [c.metrics.step for c in store.resumable(job.id)] == [4, 3, 2]
    served, more = store.checkpoints(job.id, limit=1)
    assert ([c.name for c in served], more) == (["m:ckpt-step-4"], True)
    rest, _ = store.checkpoints(job.id, limit=9, after=served[0].id)
    assert [c.name for c in rest] == ["m:ckpt-step-2"]
    assert sum(e.message.startswith("Checkpoint created") for e in store.events(job.id, limit=99)[0]) == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(get_args(Status)), max_size=12))
def test_any_sequence_of_moves_keeps_the_record_whole(
    tmp_path_factory: pytest.TempPathFactory, moves: list[Status]
) -> None:
    database = open_database(tmp_path_factory.mktemp("jobs") / "db.sqlite3")
    store = JobStore(database)
    job = store.create("", spec())
    for status in moves:
        before = store.get("", job.id)
        try:
            assert store.move(job, status).status == status
        except JobStateError:
            assert store.get("", job.id) == before
    now = store.get("", job.id)
    assert store.counts()[now.status] == 1
    assert (now.finished_at is not None) == (now.status in FINAL)
    assert (now in store.unfinished()) == (now.status not in FINAL)
    database.close()
