"""The table of settings: flags, variables, defaults, ranges."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.setting_kinds import parse_bool, parse_size
from server.setting_table import settings_table, warn_about_unknown
from server.settings import SettingError, Settings, settings_fields
from server.text.reasoning import VLLM_NAMES as REASONING_NAMES
from server.text.tools.table import VLLM_NAMES as TOOL_NAMES


def test_precedence_is_flag_then_environment_then_default() -> None:
    environ = {"LORAKEET_PORT": "9001", "LORAKEET_HOST": "0.0.0.0"}
    settings = Settings.load({"port": "9000", "host": None}, environ)
    assert (settings.port, settings.host, settings.dtype) == (9000, "0.0.0.0", "auto")


def test_every_field_is_a_row_with_flag_variable_and_help() -> None:
    rows = settings_fields()
    assert [row.name for row in rows] == [field.name for field in fields(Settings)]
    for row in rows:
        assert row.help.endswith(".")
        assert f"`{row.flag}`" in settings_table()
        assert f"`{row.env}`" in settings_table()
        assert all(f"`{alias}`" in settings_table() for alias in row.aliases)


def test_vllms_names_are_aliases() -> None:
    aliases = {alias: row.flag for row in settings_fields() for alias in row.aliases}
    assert aliases == {
        "--max-num-seqs": "--max-batch-requests",
        "--max-num-batched-tokens": "--max-batch-tokens",
        "--enable-prefix-caching": "--prefix-caching",
        "--kv-cache-memory-bytes": "--kv-cache-bytes",
        "--lora-modules": "--adapter",
        "--tool-call-parser": "--tool-parser",
    }
    # The same names in both.
    assert {"--model", "--served-model-name", "--max-model-len", "--dtype", "--quantization", "--api-key"} <= {
        row.flag for row in settings_fields()
    }


@pytest.mark.parametrize(
    ("flag", "given", "meant"),
    [
        *(("tool_parser", *pair) for pair in TOOL_NAMES.items()),
        *(("reasoning_parser", *pair) for pair in REASONING_NAMES.items()),
        ("tool_parser", "hermes", "hermes"),
        ("tool_parser", "qwen3_coder", "qwen3_coder"),
        ("reasoning_parser", "mistral", "mistral"),
        ("enable_auto_tool_choice", "true", True),
    ],
)
def test_vllms_names_of_formats_are_known(flag: str, given: str, meant: Any) -> None:
    assert getattr(Settings.load({flag: given}, {}), flag) == meant


def test_no_flag_is_declared_twice() -> None:
    declared = [flag for row in settings_fields() for both in row.declarations for flag in both.split("/")]
    assert len(declared) == len(set(declared))


@pytest.mark.parametrize("row", settings_fields(), ids=lambda row: row.name)
def test_every_setting_is_read_alike_from_flag_and_environment(row: Any) -> None:
    sample = {
        "adapter": "a=/x",
        "kv_cache_bytes": "1GiB",
        "adapter_bytes": "1GiB",
        "max_body_bytes": "1MiB",
        "max_head_bytes": "1MiB",
        "max_body_items": "2048",
        "max_body_depth": "100",
        "max_response_bytes": "1MiB",
        "max_upload_bytes": "1GiB",
        "adapter_host_bytes": "1GiB",
        "finetune_share": "0.5",
        "merge_share": "0.5",
        "speculative_tokens": "8",
        "adapter_template_seconds": "1",
        "adapter_template_cpu_seconds": "1",
        "adapter_template_bytes": "1GiB",
        "adapter_check_bytes": "1GiB",
        "grammar_seconds": "1",
        "database_seconds": "1",
        "store_requests": "30",
        "grammar_bytes": "1GiB",
        "state_cache_bytes": "1GiB",
        "audit_bytes": "1MiB",
        "response_bytes": "1GiB",
        "metrics_prefix": "vllm",
        "device": "cuda:1",
        "allowed_origins": "https://example.com",
        "adapter_hub": "someone/*",
    }
    text = sample.get(row.name) or (row.choices[-1] if row.choices else "true" if row.is_bool else "100")
    by_flag = Settings.load({row.name: [text] if row.repeatable else text}, {})
    by_variable = Settings.load({}, {row.env: text})
    assert getattr(by_flag, row.name) == getattr(by_variable, row.name) is not None


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"port": "65536"}, {}, "--port: 65536 is more than 65535"),
        ({"port": "8e3"}, {}, "--port: expected a whole number"),
        ({"port": "9" * 5000}, {}, "--port: expected a whole number"),
        ({"drain_seconds": "nan"}, {}, "--drain-seconds: nan"),
        ({"drain_seconds": "-1"}, {}, "--drain-seconds: -1"),
        ({}, {"LORAKEET_DTYPE": "int3"}, "LORAKEET_DTYPE: 'int3' is not one of auto"),
        ({}, {"LORAKEET_PREFIX_CACHING": "maybe"}, "LORAKEET_PREFIX_CACHING: expected true or false"),
        ({"kv_cache_bytes": "lots"}, {}, "--kv-cache-bytes: expected a size"),
        ({"adapter": ["no-equals-sign"]}, {}, "--adapter: 'no-equals-sign' is not NAME=DIR"),
        ({"max_batch_tokens": "32", "max_batch_requests": "32"}, {}, "--max-batch-tokens: 32 leaves no room"),
        ({"model": ""}, {}, "--model: expected a value"),
        ({"model": "base-\udcff"}, {}, r"--model: 'base-\\udcff' is not UTF-8"),
        ({"adapter_dir": "/\udcff"}, {}, "--adapter-dir: .* is not UTF-8"),
        ({"data_dir": "~nobody.here/x"}, {}, "--data-dir: ~nobody.here/x: there is no such home directory"),
        ({"adapter": ["a=~nobody.here/x"]}, {}, "--adapter: ~nobody.here/x: there is no such home directory"),
        ({"adapter": ["a=x", "b=y", "a=z"]}, {}, "--adapter: a name is given twice"),
        ({"kv_cache_bytes": "9" * 400}, {}, "--kv-cache-bytes: expected a size"),
        ({"device": "gpu"}, {}, "--device: expected auto, cpu"),
        ({"device": "cuda:all"}, {}, "--device: expected auto, cpu"),
        ({"api_key": [""]}, {}, "--api-key: expected a value"),  # from `--api-key "$UNSET"`
        ({}, {"LORAKEET_API_KEY": ","}, "LORAKEET_API_KEY: expected a value"),
        ({"allowed_origins": ["https://example.com/"]}, {}, "--allowed-origins: .* without a trailing slash"),
        ({"allowed_origins": ["example.com"]}, {}, "--allowed-origins: 'example.com' is neither"),
        ({"tool_parser": "gigachat3"}, {}, "--tool-parser: 'gigachat3' is not one of .*hermes, .*qwen3_coder"),
        ({"reasoning_parser": "step3"}, {}, "--reasoning-parser: 'step3' is not one of auto, none, .*think"),
    ],
)
def test_an_error_names_the_source_of_a_bad_value(flags: Any, environ: Any, message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}"):
        Settings.load(flags, environ)


def test_kubernetes_service_variables_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"LORAKEET_PORT": "tcp://10.96.0.7:80", "LORAKEET_SERVICE_PORT": "80", "LORAKEET_PORT_80_TCP": "tcp://x"}
    assert Settings.load({}, environ).port == 8000
    warn_about_unknown(environ)
    assert not caplog.records


def test_a_misspelt_variable_is_told(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"LORAKEET_API_KEYS": "a", "LORAKEET_MAX_MODEL_LENGTH": "64", "LORAKEET_MODEL": "x", "HOME": "/"}
    warn_about_unknown(environ | {"LORAKEET_URL": "x", "LORAKEET_TRITON": "0", "LORAKEET_RAY_COMMAND": "x"})
    assert caplog.messages == ["LORAKEET_API_KEYS is not a setting", "LORAKEET_MAX_MODEL_LENGTH is not a setting"]


def test_origins_are_as_browsers_write_them() -> None:
    origins = ("*", "null", "https://Example.com:8443", "http://[::1]:3000", "chrome-extension://abc")
    assert Settings.load({"allowed_origins": origins}, {}).allowed_origins == tuple(map(str.lower, origins))


def test_settings_built_directly_are_checked_too() -> None:
    with pytest.raises(SettingError, match="--port"):
        Settings(port=-1)


def test_keys_are_not_shown() -> None:
    settings = Settings.load({}, {"LORAKEET_API_KEY": "secret-1, secret-2"})
    assert settings.api_key == ("secret-1", "secret-2")
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("1KiB", 1024), ("1k", 1024), ("1 KB", 1000), ("2GiB", 2 * 2**30), ("1.5m", 3 * 2**19), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_refusal(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "expected a size" in str(error)  # noqa: PT017


def test_booleans() -> None:
    assert parse_bool("Yes") is True
    assert parse_bool("0") is False


def test_the_bases_name_and_aliases() -> None:
    assert Settings(model="org/Model-1B").base_aliases == {"Model-1B", "org/Model-1B"}
    assert Settings(model="/models/x.gguf").base_name == "x"
    assert Settings(served_model_name="mine").base_aliases == {"mine", Settings.model}
    assert Settings(adapter=("a=~/x",)).adapter_sources == {"a": Path.home() / "x"}
