"""`lorakeet doctor` on files, jobs and databases: restoring files set aside, naming damaged ones."""

from pathlib import Path

from tests.server.test_data_dir import doctor, flip, set_aside
from tests.support.site import TrainingEngine, eventually, tuning_site


def lose_database(root: Path, name: str = "finetuning.db") -> None:
    """Delete a database and its write-ahead log, from which SQLite would restore it."""
    for path in root.glob(f"{name}*"):
        path.unlink()


async def test_files_and_jobs_of_a_lost_database_are_restored_and_the_job_goes_on(
    tmp_path: Path, engine: TrainingEngine
) -> None:
    root = tmp_path / "data"
    async with tuning_site(root, engine) as site:
        file = await site.upload()
        uploaded = (await site.client.get(f"/v1/files/{file}")).json()
        whole = await site.until((await site.create(training_file=file))["id"])
        expected = site.store.get("", whole["fine_tuned_model"]).digest
        job = (await site.create(training_file=file, training={"checkpoint_every": 1}))["id"]
        await eventually(lambda: len(site.tuning.jobs.resumable(job)) >= 1)
        assert (await site.steer(job, "pause")).status_code == 200
        before = await site.until(job, "paused")
    lose_database(root)
    async with tuning_site(root, engine) as site:
        assert (await site.client.get(f"/v1/files/{file}")).status_code == 404
        assert (await site.client.get(f"/v1/fine_tuning/jobs/{job}")).status_code == 404
    assert {file, job} <= set(set_aside(root))
    listed = doctor(root)[1].splitlines()
    assert [line.split()[2] for line in listed if line.startswith((file, job))] == ["train.jsonl", job]

    code, said = doctor(root, "--restore", file, job)
    assert (code, said.splitlines()) == (0, [f"{file} is restored", f"{job} is restored"])
    assert not {file, job} & set(set_aside(root))
    async with tuning_site(root, engine) as site:
        assert (await site.client.get(f"/v1/files/{file}")).json() == uploaded
        found = await site.job(job)
        assert (found["status"], found["model"], found["training_file"]) == ("paused", "tiny", file)
        assert found["created_at"] == before["created_at"]
        assert site.tuning.jobs.resumable(job)
        assert (await site.steer(job, "resume")).status_code == 200
        done = await site.until(job)
        assert done["status"] == "succeeded", done["error"]
        assert site.store.get("", done["fine_tuned_model"]).digest == expected


async def test_files_and_jobs_are_removed_for_good(tmp_path: Path, engine: TrainingEngine) -> None:
    root = tmp_path / "data"
    async with tuning_site(root, engine) as site:
        file = await site.upload()
        engine.held = True
        job = (await site.create(training_file=file))["id"]
        await site.until(job, "running")
    lose_database(root)
    async with tuning_site(root, engine):
        pass
    assert set_aside(root) == sorted([file, job])
    assert doctor(root, "--remove", "--all")[0] == 0
    assert not set_aside(root)
    assert not [path for path in root.rglob("*") if file in path.name or job in path.name]


async def test_damaged_files_and_databases_are_named(tmp_path: Path, engine: TrainingEngine) -> None:
    root = tmp_path / "data"
    async with tuning_site(root, engine) as site:
        whole, damaged = [await site.upload() for _ in range(2)]
    assert doctor(root, "--verify") == (0, "")
    flip(root / "files" / damaged)
    for name in ("finetuning.db", "tenants.db"):
        lose_database(root, name)
        (root / name).write_bytes(b"no database" * 1000)
    code, said = doctor(root, "--verify")
    assert code == 1
    finetuning, tenants, file = said.splitlines()[:3]
    assert finetuning.startswith(f"{root / 'finetuning.db'}: ")
    assert "the next start sets it aside and makes a new one" in finetuning
    assert tenants.startswith(f"{root / 'tenants.db'}: ")
    assert "restore it from a backup" in tenants
    assert file == f"{root / 'files' / damaged}: its content differs from the upload; upload it again"
    assert whole not in said
