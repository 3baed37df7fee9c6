"""Wrappers of text and images: their text model is served, and adapters may use any of its usual names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import Check, inspect_adapter
from adapters.peft_format.outline import Outline
from adapters.peft_format.text import NO_TEXT
from server.engine import selfcheck
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef
from server.registry.publish import outline_of
from tests.server.engine.test_parity import our_logprobs
from tests.support.offline import load_engine, request, run
from tests.sweep.families import auto_class, tiny_family

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = torch.randint(3, 490, (40,), generator=torch.Generator().manual_seed(1)).tolist()
OURS = "model.language_model."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("towers") / "qwen2_5_vl"
    tiny_family("qwen2_5_vl", path)
    return path


@pytest.fixture(scope="module")
def engine(model: Path, cache_dir: Path) -> Engine:
    return load_engine(model, cache_dir, quantization="none", adapter_bytes=32 << 20)


def stock(model: Path) -> Any:
    return auto_class("qwen2_5_vl").from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def adapter(path: Path, model: Path, **config: Any) -> tuple[Path, torch.Tensor]:
    """A random PEFT adapter of the real wrapper, and its log-probabilities of the prompt there."""
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(stock(model), peft.LoraConfig(**settings | config))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name and ".visual." not in name:
                parameter.normal_(0.0, 0.08)
    wrapped.save_pretrained(str(path))
    with torch.no_grad():
        logits = wrapped(input_ids=torch.tensor([PROMPT])).logits[0, :-1]
    return path, logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def edit(directory: Path, rename: Callable[[str], str], **config: Any) -> None:
    """Rename tensors, and change fields of the config."""
    fields = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(fields | config))
    tensors = {rename(name): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS)


def uploaded(engine: Engine, model: Path, directory: Path, *, ignore_vision: bool = False) -> list[str]:
    """Check an adapter as an upload would; return the warnings."""
    ready = engine.ready()
    outline = outline_of(Outline.read(model), ready)
    check = Check(directory, ready.linears, ready.architecture, outline, NO_TEXT, ignore_vision)
    spec = inspect_adapter(check)
    spec.save(directory)
    return list(spec.warnings)


def answered(engine: Engine, directory: Path) -> torch.Tensor:
    """The engine's log-probabilities of the prompt with an uploaded adapter."""
    digest = json.loads((directory / "spec.json").read_text())["digest"]
    asked = [request("a", PROMPT, AdapterRef(digest, str(directory)), max_tokens=0, prompt_logprobs=0)]
    answer = run(engine, asked)["a"]
    assert answer.error is None
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs if entry is not None])


def test_only_the_text_tower_is_loaded_and_read(
    model: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[str] = []
    opened = safetensors.safe_open

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            read.append(self.name)
            found: torch.Tensor = self.inner[index]
            return found

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = opened(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    loaded = load_engine(model, cache_dir, quantization="none")
    assert any("layers.0." in name for name in read)
    assert not [name for name in read if "visual" in name]
    assert [name for name in load_file(model / "model.safetensors") if "visual" in name]
    assert not [name for name, _ in loaded.base.model.named_parameters() if "visual" in name]
    assert loaded.base.aside == ["model.visual"]
    selfcheck.run(loaded, tmp_path)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_text_of_a_wrapper_equals_the_real_one(quantization: str, model: Path, cache_dir: Path, tmp_path: Path) -> None:
    loaded = load_engine(model, cache_dir, quantization=quantization)
    again = load_engine(model, cache_dir, quantization=quantization)  # from the quantised copy
    assert loaded.base.digest() == again.base.digest()
    if quantization == "none":
        with torch.no_grad():
            logits = stock(model)(input_ids=torch.tensor([PROMPT])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
        torch.testing.assert_close(our_logprobs(loaded, None, PROMPT), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "config"),
    [
        pytest.param(OURS, {}, id="transformers 5"),
        pytest.param("language_model.model.", {}, id="transformers 4"),
        pytest.param("model.", {}, id="the text model alone"),
        pytest.param("", {}, id="its decoder"),
        pytest.param("model.text_model.", {}, id="SmolVLM's"),
        pytest.param("model.", {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|v|down)_proj"}, id="regex"),
        pytest.param(
            "language_model.model.",
            {"target_modules": [f"language_model.model.layers.0.{name}" for name in ("mlp.down_proj",)]},
            id="full names",
        ),
    ],
)
def test_adapters_call_the_text_model_by_any_name_in_use(
    theirs: str, config: dict[str, Any], engine: Engine, model: Path, tmp_path: Path
) -> None:
    made: dict[str, Any] = {"target_modules": r".*language_model.*layers\.\d+\.(self_attn|mlp)\.(q|v|down)_proj"}
    if isinstance(config.get("target_modules"), list):
        made = {"target_modules": [f"{OURS}layers.0.mlp.down_proj"]}
    directory, expected = adapter(tmp_path, model, **made)
    wanted = config or {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    edit(directory, lambda name: name.replace(f"model.{OURS}", f"model.{theirs}"), **wanted)
    assert uploaded(engine, model, directory) == []
    torch.testing.assert_close(answered(engine, directory), expected, atol=1e-3, rtol=0)
    spec = json.loads((directory / "spec.json").read_text())
    assert all(name.startswith(OURS) for name in spec["modules"])


def test_an_older_releases_head_and_embedding_are_found(engine: Engine, model: Path, tmp_path: Path) -> None:
    directory, expected = adapter(
        tmp_path, model, target_modules=["embed_tokens", "o_proj"], modules_to_save=["lm_head"], bias="all"
    )

    def older(name: str) -> str:
        name = name.replace(f"model.{OURS}", "model.language_model.model.").replace(
            "model.model.visual", "model.visual"
        )
        return name.replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")

    edit(directory, older)
    with pytest.raises(AdapterError, match=r"changes 'visual'.*--ignore-vision-adapters"):
        uploaded(engine, model, directory)
    warnings = uploaded(engine, model, directory, ignore_vision=True)
    assert any("'visual' are ignored" in warning for warning in warnings)
    torch.testing.assert_close(answered(engine, directory), expected, atol=1e-3, rtol=0)


def test_a_tower_that_was_not_trained_is_a_warning_and_one_that_was_is_refused(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    directory, expected = adapter(tmp_path, model, target_modules="all-linear")
    warnings = uploaded(engine, model, directory)  # PEFT adapts it, but text leaves its B at zero
    assert any("tensors of 'model.visual' are ignored" in warning for warning in warnings), warnings
    torch.testing.assert_close(answered(engine, directory), expected, atol=1e-3, rtol=0)
    tensors = load_file(directory / WEIGHTS)
    name = next(name for name in tensors if ".visual." in name and ".lora_B." in name)
    tensors[name][0, 0] = 1e-3
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(AdapterError, match=r"changes 'model\.visual', which is not used for text") as refusal:
        uploaded(engine, model, directory)
    assert refusal.value.param == name
    assert uploaded(engine, model, directory, ignore_vision=True) == warnings


def test_a_file_of_two_spellings_is_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    directory, _ = adapter(tmp_path, model, target_modules=["q_proj"])
    edit(directory, lambda name: name.replace(f"model.{OURS}layers.0", "model.language_model.model.layers.0"))
    with pytest.raises(AdapterError, match="does not have"):
        uploaded(engine, model, directory)


def test_mrope_counts_text_as_one_stream(engine: Engine) -> None:
    """Positions of a request that begins inside a packed batch are its own in all three streams."""
    alone = run(engine, [request("a", PROMPT, None, max_tokens=4)])["a"].tokens
    both = run(engine, [request("b", PROMPT[7:30], None, max_tokens=4), request("a", PROMPT, None, max_tokens=4)])
    assert both["a"].tokens == alone


def test_the_head_sees_no_more_rows_of_a_class_that_does_not_choose_them(cache_dir: Path, tmp_path: Path) -> None:
    tiny_family("minicpmv4_6", tmp_path / "model")
    loaded = load_engine(tmp_path / "model", cache_dir, quantization="none")
    real = auto_class("minicpmv4_6").from_pretrained(
        tmp_path / "model", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = real(input_ids=torch.tensor([PROMPT])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(our_logprobs(loaded, None, PROMPT), expected, atol=1e-3, rtol=0)
    rows: list[int] = []
    head = loaded.base.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, output: rows.append(output.shape[-2]))
    run(loaded, [request("a", PROMPT, max_tokens=3)])
    assert rows == [1, 1, 1]
