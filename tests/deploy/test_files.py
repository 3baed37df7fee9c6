"""The files of deploy/ are readable by their programs, and name only existing metrics and settings."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml  # type: ignore[import-untyped]

from server.finetune.jobs import Status
from server.metrics import PREFIX, FinishedReason
from server.settings import Settings, settings_fields
from tests.support.documented import documented, series_names

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
NAMES = {name for metric in documented() for name in series_names(metric)}


def _needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def _load(path: Path) -> Any:
    class Loader(yaml.SafeLoader):
        """A YAML loader with Compose's own tags."""

    Loader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))
    return yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader


def _dashboard() -> Any:
    return json.loads((DEPLOY / "grafana/dashboard.json").read_text(encoding="utf-8"))


def _rules() -> list[dict[str, Any]]:
    (group,) = _load(DEPLOY / "prometheus/alerts.yml")["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def _panel_queries() -> list[str]:
    return [target["expr"] for panel in _dashboard()["panels"] for target in panel.get("targets", [])]


def _queries() -> list[str]:
    return [*_panel_queries(), *(rule["expr"] for rule in _rules())]


def _variables() -> set[str]:
    return {row.env for row in settings_fields()}


# --- names ----------------------------------------------------------------------------------------------


def test_queries_name_metrics_that_there_are() -> None:
    asked = {name for query in _queries() for name in re.findall(rf"{PREFIX}\w+", query)}
    assert len(asked) > 25
    assert asked <= NAMES
    variables = json.dumps(_dashboard()["templating"])
    assert set(re.findall(rf"{PREFIX}\w+", variables)) == {f"{PREFIX}engine_up"}


def test_queries_name_label_values_that_there_are() -> None:
    chosen = re.findall(r'(status|finished_reason)=~?"([^"]+)"', " ".join(_queries()))
    known = {"status": set(get_args(Status)), "finished_reason": set(get_args(FinishedReason))}
    assert len(chosen) >= 3
    for label, values in chosen:
        assert set(values.split("|")) <= known[label]


def test_environments_name_settings_that_there_are() -> None:
    compose = set(_load(DEPLOY / "compose.yaml")["services"]["lorakeet"]["environment"])
    unit = set(re.findall(r"LORAKEET_[A-Z_]+(?==)", (DEPLOY / "lorakeet.service").read_text(encoding="utf-8")))
    image = set(re.findall(r"LORAKEET_[A-Z_]+(?==)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert all((compose, unit, image))
    assert compose | unit | image <= _variables()
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"LORAKEET_[A-Z_]+[A-Z]", text)) <= _variables()
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= {row.flag for row in settings_fields()}


# --- the image and Compose --------------------------------------------------------------------------------


def test_the_image_that_serves_on_gpus_can_compile() -> None:
    """Triton compiles its driver module on first use of a GPU, which needs a C compiler and the C library's headers."""
    *_, cpu, last = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cpu.splitlines()[0].endswith(" AS cpu")
    assert last.splitlines()[0] == "cpu"  # so it has the same entry point, user and settings
    assert {"gcc", "libc6-dev"} <= set(last.split())
    assert "compute" in last[last.index("NVIDIA_DRIVER_CAPABILITIES") :]
    assert [line for line in last.splitlines() if line.startswith("USER")][-1] == "USER lorakeet"


def test_the_dockerfile_names_existing_stages_and_files() -> None:
    """Stages are defined before use, copied files are in the build context, and the command is the package's."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    assert stages == ["build", "cpu"]
    assert set(re.findall(r"--from=(\S+)", text)) == {"build"}
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert all((ROOT / name).exists() for name in allowed)
    assert set(re.findall(r"^COPY (\w\S*) ", text, flags=re.MULTILINE)) <= allowed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.split(".")[0].rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= allowed
    (entry,) = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', text, flags=re.MULTILINE)
    assert entry in project["project"]["scripts"]


def test_compose_reserves_a_gpu_and_mounts_what_is_there() -> None:
    services = _load(DEPLOY / "compose.yaml")["services"]
    (device,) = services["lorakeet"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert _load(DEPLOY / "compose.cpu.yaml")["services"]["lorakeet"]["build"]["target"] == "cpu"
    mounted = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    assert [path for path in mounted if path.startswith(".") and not (DEPLOY / path).exists()] == []
    grace = services["lorakeet"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > Settings().drain_seconds


def test_grafana_finds_its_dashboard_and_data() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = _load(provisioning / "datasources/prometheus.yml")["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in _load(DEPLOY / "compose.yaml")["services"]
    (provider,) = _load(provisioning / "dashboards/lorakeet.yml")["providers"]
    mounts = _load(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboard.json:{provider['options']['path']}/lorakeet.json:ro" in mounts
    panels = _dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


# --- the programs themselves ----------------------------------------------------------------------------------


@_needs("promtool")
def test_promtool_takes_the_configuration_and_the_rules() -> None:
    for command in ("config", "rules"):
        file = {"config": "prometheus.yml", "rules": "alerts.yml"}[command]
        done = subprocess.run(
            ["promtool", "check", command, str(DEPLOY / "prometheus" / file)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@_needs("promtool")
def test_promtool_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for query in _panel_queries()]
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@_needs("promtool")
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    def series(name: str, values: str, **labels: str) -> dict[str, str]:
        chosen = ", ".join(f'{key}="{value}"' for key, value in {"instance": "a", **labels}.items())
        return {"series": f"{name}{{{chosen}}}", "values": values}

    def fires(alert: str, minute: int, count: int) -> dict[str, Any]:
        severity = next(rule["labels"]["severity"] for rule in _rules() if rule["alert"] == alert)
        expected = [{"exp_labels": {"instance": "a", "severity": severity}, "exp_annotations": {}}] * count
        return {"alertname": alert, "eval_time": f"{minute}m", "exp_alerts": expected}

    rules = _rules()
    for rule in rules:
        del rule["annotations"]  # their wording is not tested here
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "alerts", "rules": rules}]}))
    tests = [
        {
            "interval": "1m",
            "input_series": [
                series(f"{PREFIX}engine_up", "1x20 0x40"),
                series(f"{PREFIX}request_success_total", "0+100x60", finished_reason="stop"),
                series(f"{PREFIX}request_success_total", "0x20 0+10x40", finished_reason="error"),
                series(f"{PREFIX}finetune_jobs", "1x120", status="running"),
                series(f"{PREFIX}finetune_steps_total", "0+1x20 20x100"),
            ],
            "alert_rule_test": [
                fires("LorakeetEngineDown", 20, 0),
                fires("LorakeetEngineDown", 30, 1),
                fires("LorakeetRequestsFail", 20, 0),
                fires("LorakeetRequestsFail", 50, 1),
                fires("LorakeetTrainingStalled", 40, 0),
                fires("LorakeetTrainingStalled", 90, 1),
            ],
        }
    ]
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": ["rules.yml"], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@_needs("systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "lorakeet.service").read_text(encoding="utf-8")
    unit = tmp_path / "lorakeet.service"
    unit.write_text(text.replace("/opt/lorakeet/bin/lorakeet", "/bin/true"))  # the executable must exist
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if "lorakeet" in line]
    assert (done.returncode, complaints) == (0, [])
