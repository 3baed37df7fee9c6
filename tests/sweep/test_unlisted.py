"""Without the lists of names, families that keep state unknown to the engine are still refused.

By the self-check; or at load, if a family has no attention heads, no list of layers or hardly any linears.
"""

from pathlib import Path

import pytest

from server.engine import selfcheck
from server.model import base, positions
from server.model.base import UnservableModel
from tests.support.offline import load_engine
from tests.sweep.families import tiny_family

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of transformers about unserved families

FAST = ["minimax", "diffllama", "gpt_neox_japanese", "xglm", "openai-gpt", "xlm"]
REST = [
    *["falcon_mamba", "jamba", "mamba"],
    *["mamba2", "recurrent_gemma", "rwkv", "xlstm", "zamba2"],
]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in REST)])
def test_the_check_refuses_without_the_lists(
    family: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_family(family, tmp_path / "model")
    monkeypatch.setattr(base, "check_servable", lambda config: None)
    monkeypatch.setattr(positions, "longest_context", lambda text, asked=None: 512)
    with pytest.raises(UnservableModel) as refusal:
        selfcheck.run(load_engine(tmp_path / "model", tmp_path / "cache", quantization=quantization), tmp_path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "selfcheck").exists()
