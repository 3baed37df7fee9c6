"""A real engine process behind `LocalEngine`: streams, aborts, crashes and restarts."""

import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
import pytest_asyncio

from adapters.storage.names import LocalNames
from adapters.storage.store import AdapterStore
from server.client import process
from server.client.engine import AdapterLoadFailed, LocalEngine
from server.errors import EngineUnavailable
from server.http.app import build_app
from server.messages.protocol import AdapterRef, EngineConfig, Generate, Stats
from server.messages.training import JobEnded, JobNote, JobReply, StartJob, StopJob, TrainingPlan
from server.settings import Settings
from server.startup import make_services
from tests.support.conforming import client_of
from tests.support.offline import load_engine, publish, request
from tests.support.running import slowed
from tests.support.tiny import tiny_adapter, tiny_text

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("forked_engines")]


def config(model: Path, cache: Path) -> EngineConfig:
    return EngineConfig(
        address="",
        model=str(model),
        cache_dir=str(cache),
        kv_cache_bytes=8 << 20,
        adapter_bytes=8 << 20,
        max_batch_tokens=64,
        max_batch_requests=16,
        threads=1,
    )


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file read by the engine's steps; see `tests.support.running.slowed`."""
    path = tmp_path_factory.mktemp("fault") / "fault"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT_FILE", str(path))
        yield path


async def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.02)


async def collect(engine: LocalEngine, single: Generate) -> list[int]:
    return [token async for output in engine.generate(single) for token in output.tokens]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stats() -> list[Stats]:
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    forked_engines: None, fault: Path, model_dir: Path, cache_dir: Path, stats: list[Stats]
) -> AsyncIterator[LocalEngine]:
    client = LocalEngine(config(model_dir, cache_dir), stats.append)
    with pytest.raises(EngineUnavailable):
        await collect(client, request("early", [5, 6]))
    await client.start()
    assert client.unready_reason
    await until(lambda: client.unready_reason is None)
    yield client
    pid = client.pid
    await client.stop(grace=5)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_answers_equal_the_engine_in_process(engine: LocalEngine, model_dir: Path, cache_dir: Path) -> None:
    from tests.support.offline import run

    prompts = [[7 + i, 8, 9, 10 + i] for i in range(4)]
    requests = [request(f"q{i}", prompt, max_tokens=10) for i, prompt in enumerate(prompts)]
    expected = run(load_engine(model_dir, cache_dir), requests)
    answers = await asyncio.gather(*(collect(engine, single) for single in requests))
    assert answers == [expected[single.id].tokens for single in requests]


async def test_a_closed_stream_is_aborted(engine: LocalEngine, stats: list[Stats], fault: Path) -> None:
    before = len(stats)
    with slowed(fault):
        stream = engine.generate(request("closed", [5, 6, 7], max_tokens=400))
        await anext(stream)
        await stream.aclose()
    await until(lambda: stats[-1].running == 0)
    assert sum(said.step_requests for said in stats[before:]) < 300
    assert await collect(engine, request("after", [5, 6, 7], max_tokens=3))


async def test_adapters_are_warmed_and_forgotten(
    engine: LocalEngine, model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    reference = publish(load_engine(model_dir, cache_dir), tiny_adapter(tmp_path / "a", model_dir))
    assert await engine.warm(reference) >= 0
    resident = (await engine.inspect()).resident_rows
    assert engine.info is not None
    assert {resident[linear.kind] for linear in engine.info.linears.values()} == {16}
    await engine.forget(reference.digest)
    report = await engine.inspect()
    assert set(report.resident_rows.values()) == {0}
    assert report.base_digest == engine.info.base_digest


async def test_changes_between_requests_are_reported(
    engine: LocalEngine, stats: list[Stats], model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    def residents() -> set[str]:
        last = {(use.digest, use.tier): use.present for said in stats for use in said.adapters}
        return {digest for (digest, _), present in last.items() if present}

    reference = publish(load_engine(model_dir, cache_dir), tiny_adapter(tmp_path / "a", model_dir, seed=5))
    stats.clear()
    await engine.warm(reference)
    await until(lambda: reference.digest in [digest for said in stats for digest, _ in said.loads])
    assert reference.digest in residents()
    await engine.forget(reference.digest)
    await until(lambda: [digest for said in stats for digest in said.evictions] == [reference.digest])
    assert reference.digest not in residents()
    assert not any(said.step_requests for said in stats)


async def test_an_adapter_that_is_not_there_fails_alone(engine: LocalEngine, tmp_path: Path) -> None:
    missing = AdapterRef("sha256:00", str(tmp_path / "nowhere"))
    with pytest.raises(AdapterLoadFailed):
        await engine.warm(missing)
    outputs = [output async for output in engine.generate(request("x", [5, 6], missing))]
    assert outputs[-1].error
    assert await collect(engine, request("fine", [5, 6], max_tokens=2))


async def test_killed_under_load_it_comes_back(engine: LocalEngine, stats: list[Stats], fault: Path) -> None:
    pid = engine.pid
    assert pid is not None
    with slowed(fault):
        running = [asyncio.create_task(collect(engine, request(f"k{i}", [5, 6], max_tokens=450))) for i in range(3)]
        await until(lambda: stats[-1].running == 3)
        os.kill(pid, signal.SIGKILL)
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(outcome, EngineUnavailable) for outcome in outcomes)
    assert engine.unready_reason
    await until(lambda: engine.unready_reason is None)
    assert engine.pid != pid
    assert await collect(engine, request("again", [5, 6], max_tokens=3))


@asynccontextmanager
async def over_http(engine: LocalEngine, root: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The application in front of a running engine."""
    with closing(LocalNames(root / "names.db")) as names, closing(tiny_text()) as text:
        settings = Settings(data_dir=root, served_model_name="tiny")
        services = make_services(settings, engine, AdapterStore(root / "adapters", names), text)
        async with client_of(build_app(services), timeout=60) as client:
            yield client
        await services.grammars.close()


async def test_a_stalled_engine_is_replaced(
    engine: LocalEngine, tmp_path: Path, fault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that the server is unready; running requests and new ones get a 503."""
    pid = engine.pid
    assert engine.info is not None
    stands = engine.info.pid
    going, start = asyncio.Event(), asyncio.create_subprocess_exec

    async def held(*args: Any, **kwargs: Any) -> Any:
        await going.wait()
        return await start(*args, **kwargs)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", held)
    body = {"model": "tiny", "prompt": [5, 6], "temperature": 0, "ignore_eos": True, "max_tokens": 3}
    async with over_http(engine, tmp_path) as client:
        assert (await client.get("/ready")).status_code == 200
        before = (await client.post("/v1/completions", json=body)).json()["choices"]
        with slowed(fault):
            running = asyncio.create_task(client.post("/v1/completions", json=body | {"max_tokens": 450}))
            await until(lambda: bool(engine._streams))
            os.kill(stands, signal.SIGSTOP)
        monkeypatch.setattr(process, "_SILENCE_SECONDS", 2.0)
        late = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: engine.unready_reason is not None)
        ready = await client.get("/ready")
        assert (ready.status_code, engine.pid) == (503, pid), "it may still recover"
        assert "has sent no message for" in ready.text
        monkeypatch.setattr(engine._process, "_stall_seconds", 2.0)
        for response in await asyncio.wait_for(asyncio.gather(running, late), 60):
            assert response.status_code == 503, response.text
            assert int(response.headers["Retry-After"]) > 0
        assert "--engine-stall-seconds" in (await client.get("/ready")).text
        going.set()
        await until(lambda: not Path(f"/proc/{stands}").exists())
        monkeypatch.undo()
        await until(lambda: engine.unready_reason is None)
        assert (await client.get("/ready")).json()["engine_pid"] == engine.pid != pid
        assert (await client.post("/v1/completions", json=body)).json()["choices"] == before


async def test_an_engine_not_loaded_in_time_is_restarted_and_finally_given_up(
    model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine is given up however long it has lived, since it was never healthy."""
    for name in ("_WATCH_SECONDS", "_SILENCE_SECONDS"):
        monkeypatch.setattr(process, name, 0.01)
    client = LocalEngine(config(model_dir, cache_dir), lambda _: None, start_seconds=0.03)
    await client.start()
    await until(lambda: client.pid is not None)
    pid = client.pid
    await asyncio.wait_for(client.failed_for_good.wait(), 60)
    assert caplog.text.count("is being restarted (it was not loaded within 0 s (--engine-start-seconds))") == 2
    assert "3 times" in (client.unready_reason or "")
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await client.stop(grace=0)


async def test_three_deaths_in_a_row_are_enough(model_dir: Path, cache_dir: Path) -> None:
    client = LocalEngine(config(model_dir, cache_dir), lambda _: None)
    await client.start()
    killed: set[int] = set()
    while len(killed) < 3:
        await until(lambda: client.pid is not None and client.pid not in killed)
        assert client.pid is not None
        killed.add(client.pid)
        os.kill(client.pid, signal.SIGKILL)
    await asyncio.wait_for(client.failed_for_good.wait(), 60)
    assert "3 times" in (client.unready_reason or "")
    await client.stop(grace=0)


async def test_a_process_that_cannot_be_started_is_tried_again(
    model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times if no process ever ran, without end if one did."""
    monkeypatch.setattr(process, "_RETRY_SECONDS", 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        client = LocalEngine(config(model_dir, cache_dir), lambda _: None)
        await client.start()
        await asyncio.wait_for(client.failed_for_good.wait(), 60)
        assert re.search("3 times.*cannot be started: .*No such file", client.unready_reason or "")
        await client.stop(grace=0)
    client = LocalEngine(config(model_dir, cache_dir), lambda _: None)
    await client.start()
    await until(lambda: client.unready_reason is None)
    with monkeypatch.context() as patch:
        start = AsyncMock(side_effect=OSError(errno.ENOMEM, "no memory"))
        patch.setattr(asyncio, "create_subprocess_exec", start)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: "no memory" in (client.unready_reason or ""))
        await until(lambda: start.await_count > 5)
    await until(lambda: client.unready_reason is None)
    await client.stop(grace=0)


async def test_a_fault_in_the_supervision_ends_the_start(
    model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "create_subprocess_exec", AsyncMock(side_effect=RuntimeError("nobody thought of it")))
    client = LocalEngine(config(model_dir, cache_dir), lambda _: None)
    await client.start()
    await asyncio.wait_for(client.failed_for_good.wait(), 60)
    assert "a fault in the server: RuntimeError('nobody thought of it')" in (client.unready_reason or "")
    await client.stop(grace=0)


async def test_the_engines_imports_ignore_the_working_directory_and_python_variables(
    model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server.py").write_text("raise SystemExit('somebody else wrote this')")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start := AsyncMock(side_effect=RuntimeError))
    client = LocalEngine(config(model_dir, cache_dir), lambda _: None)
    await client.start()
    await asyncio.wait_for(client.failed_for_good.wait(), 60)
    await client.stop(grace=0)
    command = [sys.executable, "-c", "import server.client; assert server.client.__doc__; assert __debug__"]
    subprocess.run(command, cwd=tmp_path, env=start.call_args.kwargs["env"], check=True)


async def test_the_way_to_temporary_files_may_be_long(
    model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the path of a socket may be."""
    (far := tmp_path / ("far" * 40)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    monkeypatch.setenv("TMPDIR", str(far))
    client = LocalEngine(config(model_dir, cache_dir), lambda _: None)
    await client.start()
    await until(lambda: client.unready_reason is None)
    await client.stop(grace=0)


async def test_a_base_that_cannot_be_served_is_not_retried(cache_dir: Path, tmp_path: Path) -> None:
    from tests.support.tiny import tiny_model

    model = tiny_model(tmp_path / "m", num_local_experts=4)
    client = LocalEngine(config(model, cache_dir), lambda _: None)
    await client.start()
    await asyncio.wait_for(client.failed_for_good.wait(), 60)
    assert "mixture-of-experts" in (client.unready_reason or "")
    await client.stop(grace=0)


async def test_the_engine_ends_with_its_parent(
    model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRELOADED", raising=False)
    script = (
        "import asyncio, sys\n"
        "from server.client.engine import LocalEngine\n"
        "from server.messages.protocol import decode_config\n"
        "async def main():\n"
        "    engine = LocalEngine(decode_config(sys.argv[1]), lambda _: None)\n"
        "    await engine.start()\n"
        "    while engine.unready_reason: await asyncio.sleep(0.05)\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    from server.messages.protocol import encode_config

    parent = subprocess.Popen(
        [sys.executable, "-c", script, encode_config(config(model_dir, cache_dir)).decode()], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        # A zombie that is not reaped here has ended too.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"

    await until(gone, seconds=30)


async def test_the_last_words_of_a_closed_run_do_not_reach_the_jobs_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[StartJob | StopJob] = []
    monkeypatch.setattr("server.client.engine.EngineProcess", lambda *_, **__: Mock(send=sent.append))
    engine = LocalEngine(config(Path("model"), Path("cache")), lambda stats: None)
    plan = TrainingPlan(seed=0, n_epochs=1, batch_size=1, micro_batch_tokens=1, learning_rate=1.0)
    job = StartJob(id="job", directory="", train_data="", modules={}, config={}, plan=plan)

    async def begin() -> tuple[AsyncGenerator[JobReply, None], asyncio.Task[JobReply]]:
        replies = engine.train(job)
        first = asyncio.create_task(anext(replies))
        await asyncio.sleep(0)
        return replies, first

    before, first = await begin()
    engine._on_message(JobNote(sent[0].id, "info", "one"))
    assert (await first).id == "job"
    await before.aclose()
    _, first = await begin()
    await engine.stop_job(StopJob("job", save=True))
    old, stopped, new, paused = (message.id for message in sent)
    assert (old, new) == (stopped, paused)
    assert old != new
    engine._on_message(JobEnded(id=old, outcome="cancelled"))
    engine._on_message(JobEnded(id=new, outcome="paused"))
    assert await first == JobEnded(id="job", outcome="paused")
