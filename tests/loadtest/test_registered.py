"""Few adapters against many, at the scale of a test."""

import json
from pathlib import Path

from loadtest.registered import compare, fill
from server.services import TENANT
from tests.support.harness import HIDDEN, LAYERS
from tests.support.scripted import serving


async def test_both_servers_are_filled_and_asked_the_same(tmp_path: Path) -> None:
    config = {"hidden_size": HIDDEN, "intermediate_size": 1, "num_attention_heads": 1, "num_hidden_layers": LAYERS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    async with serving(tmp_path / "few") as few, serving(tmp_path / "many") as many:
        await fill(few.client, 2, tmp_path, tmp_path)
        await fill(many.client, 9, tmp_path, tmp_path)
        assert [len(site.services.store.list(TENANT)) for site in (few, many)] == [2, 9]
        result = await compare(few.client, many.client, (2, 9), rounds=3)
        assert set(result) == {"GET model", "admission"}
        assert all(row["few"] > 0 and row["ratio"] == row["many"] / row["few"] for row in result.values())
        assert few.engine.requests == many.engine.requests == []
