"""Constrained and unconstrained answers compared, at the scale of a test; verdicts from figures."""

import json
from pathlib import Path

import httpx
import pytest

from loadtest import constrained
from loadtest.constrained import OPEN, RECORD, Pairs, Streams, beside_streams, decode, large_schema, of_schema, summary
from tests.support.running import BASE, RunningServer


def test_schemas_are_new_and_of_one_size() -> None:
    schemas = [json.dumps(large_schema(seed)) for seed in range(5)]
    assert len(set(schemas)) == 5
    assert all(10_000 <= len(schema) < 10_300 for schema in schemas)


def test_verdicts() -> None:
    pairs = {"nothing forced": Pairs([100.0] * 3, [96.0] * 3), "half forced": Pairs([100.0] * 3, [130.0] * 3)}
    result = summary(pairs, Streams([0.01] * 100, [0.1]), Streams([0.01] * 90 + [0.05] * 10, [0.3]))
    assert [verdict["holds"] for verdict in result["verdicts"]] == [True, False, False]
    assert result["first_token_ms"] == {"without": 100.0, "with": 300.0, "schemas": 1}
    assert constrained.table(result).row_count == 3


@pytest.mark.slow
async def test_all_of_it_runs_on_a_real_server(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrained, "STREAMED", 40)
    names = [BASE] * 2
    lines: list[str] = []
    server = RunningServer(model_dir, tmp_path, tmp_path / "data")
    try:
        server.ensure()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            more = {"nothing forced": OPEN, "half forced": of_schema(RECORD)}
            pairs = {
                kind: await decode(http, names, each, rounds=1, report=lines.append) for kind, each in more.items()
            }
            without, with_schema = await beside_streams(http, names, rounds=1, report=lines.append)
    finally:
        server.stop()
    result = summary(pairs, without, with_schema)
    assert len(lines) == 4
    assert all(rate > 0 for pair in result["decode"].values() for rates in pair.values() for rate in rates)
    assert len(without.gaps) > 20
    assert with_schema.answers
