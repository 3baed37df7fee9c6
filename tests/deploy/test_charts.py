"""The Helm chart renders to valid Kubernetes objects, and deploy/kubernetes only uses existing names.

`make charts` fetches Helm and Kubernetes's schemas; without them their tests are skipped.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import lorakeet_relay as relay
import pytest
import yaml  # type: ignore[import-untyped]

from server.settings import Settings, settings_fields
from tests.support.charts import HELM, VALIDATE

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/lorakeet"
FOUND = str(HELM) if HELM.exists() else shutil.which("helm")
SETTINGS = {row.name for row in settings_fields()}
VARIABLES = {row.env for row in settings_fields()}

needs_helm = pytest.mark.skipif(FOUND is None, reason="needs helm: make charts fetches it")
needs_schemas = pytest.mark.skipif(not VALIDATE.exists(), reason="needs Kubernetes's schemas: make charts fetches them")

FULL: dict[str, Any] = {
    "settings": {"model": "/models/m", "drain_seconds": 120, "kv_cache_bytes": 21474836480, "finetune_share": 0.5},
    "apiKeys": {"keys": ["one", "two"]},
    "objectStore": {"url": "s3://bucket/adapters", "credentialsSecret": "aws"},
    "imagePullSecrets": [{"name": "registry"}],
    "servers": {
        "enabled": True,
        "autoscaling": {"enabled": True},
        "resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "16Gi"}},
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
    "podMonitor": {"enabled": True},
}
ONE: dict[str, Any] = FULL | {
    "servers": {"enabled": False},
    "single": {
        "storage": {"size": "10Gi", "storageClassName": "fast"},
        "resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "16Gi"}},
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": FULL,
    "one with everything": ONE,
    "processor": {"gpu": {"count": 0}},
    "fixed": {"servers": {"enabled": True, "replicas": 3}, "objectStore": {"url": "gs://bucket"}},
}


def _render(values: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "values.json"
    file.write_text(json.dumps(values))  # JSON is YAML
    command = [str(FOUND), "template", "mine", str(CHART), "--values", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _objects(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The rendered objects by `kind/name`."""
    done = _render(values, folder)
    assert done.returncode == 0, done.stderr
    rendered = [one for one in yaml.safe_load_all(done.stdout) if one]
    objects = {f"{one['kind']}/{one['metadata']['name']}": one for one in rendered}
    assert len(objects) == len(rendered)
    return objects


def _container(workload: Any) -> Any:
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


# --- the chart --------------------------------------------------------------------------------------------------


def test_values_are_settings_that_there_are() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    set_elsewhere = set(schema["properties"]["settings"]["propertyNames"]["not"]["enum"])
    assert set(values["settings"]) <= SETTINGS - set_elsewhere
    assert set_elsewhere <= SETTINGS
    assert set(schema["properties"]) - {"global"} == set(values)
    assert values["settings"]["drain_seconds"] == Settings().drain_seconds


def test_the_image_fits_the_chart() -> None:
    """The chart's user, directories and port are those of the Dockerfile."""
    image = (ROOT / "Dockerfile").read_text()
    pod = (CHART / "templates/_helpers.tpl").read_text()
    assert "enableServiceLinks: false" in pod
    assert re.findall(r"--uid (\d+)", image) == sorted(set(re.findall(r"(?:runAsUser|fsGroup): (\d+)", pod)))
    assert re.findall(r"LORAKEET_PORT=(\d+)", image) == re.findall(r"containerPort: (\d+)", pod)
    assert set(re.findall(r"LORAKEET_(?:DATA|CACHE)_DIR=(\S+)", image)) == set(re.findall(r"mountPath: (\S+)", pod))


@needs_helm
def test_helm_finds_no_fault(tmp_path: Path) -> None:
    for values in VALUES.values():
        (tmp_path / "values.json").write_text(json.dumps(values))
        command = [str(FOUND), "lint", "--strict", str(CHART), "--values", str(tmp_path / "values.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@needs_helm
@needs_schemas
@pytest.mark.parametrize("name", VALUES)
def test_rendered_objects_are_valid_kubernetes(tmp_path: Path, name: str) -> None:
    done = _render(VALUES[name], tmp_path)
    assert done.returncode == 0, done.stderr
    # PodMonitor is a kind of the Prometheus operator.
    objects = [one for one in yaml.safe_load_all(done.stdout) if one and one["kind"] != "PodMonitor"]
    (tmp_path / "objects.yaml").write_text(yaml.safe_dump_all(objects))
    command = [str(VALIDATE), "--strict", str(tmp_path / "objects.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_helm
def test_by_default_there_is_one_server(tmp_path: Path) -> None:
    objects = _objects({}, tmp_path)
    assert set(objects) == {"StatefulSet/mine", "Service/mine"}
    assert _container(objects["StatefulSet/mine"])["resources"] == {"limits": {"nvidia.com/gpu": 1}}


@needs_helm
@pytest.mark.parametrize(("values", "kind"), [(FULL, "Deployment"), (ONE, "StatefulSet")])
def test_everything_is_passed_on(tmp_path: Path, values: dict[str, Any], kind: str) -> None:
    """One server or several: a StatefulSet or a Deployment, never both."""
    objects = _objects(values, tmp_path)
    assert {name for name in objects if name in ("Deployment/mine", "StatefulSet/mine")} == {f"{kind}/mine"}
    workload = objects[f"{kind}/mine"]
    container = _container(workload)
    variables = {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}
    assert set(variables) <= VARIABLES
    assert variables["LORAKEET_KV_CACHE_BYTES"] == "21474836480"
    assert variables["LORAKEET_FINETUNE_SHARE"] == "0.5"
    assert variables["LORAKEET_ADAPTER_STORE"] == "s3://bucket/adapters"
    assert variables["LORAKEET_API_KEY"]["secretKeyRef"] == {"name": "mine-api-keys", "key": "api-keys"}
    Settings.load({}, {name: value for name, value in variables.items() if isinstance(value, str)})
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert probes == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    pod = workload["spec"]["template"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > FULL["settings"]["drain_seconds"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    mounted = {one["name"] for one in container["volumeMounts"]}
    claims = {one["metadata"]["name"] for one in workload["spec"].get("volumeClaimTemplates", [])}
    assert mounted == claims | {one["name"] for one in pod["spec"].get("volumes", [])}
    assert objects["Secret/mine-api-keys"]["stringData"] == {"api-keys": "one,two"}
    assert container["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": 1}
    assert pod["spec"]["nodeSelector"] == {"gpu": "h200"}
    assert ("replicas" in workload["spec"]) == (kind == "StatefulSet")  # a Deployment's number is set by the autoscaler
    autoscaled = objects.get("HorizontalPodAutoscaler/mine", {"spec": {"scaleTargetRef": None}})
    assert (autoscaled["spec"]["scaleTargetRef"] is None) == (kind == "StatefulSet")
    labels = pod["metadata"]["labels"].items()
    assert objects["Service/mine"]["spec"]["selector"].items() <= labels
    assert objects["PodMonitor/mine"]["spec"]["selector"]["matchLabels"].items() <= labels


@needs_helm
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"servers": {"enabled": True}}, "objectStore.url"),
        ({"settings": {"api_key": "secret"}}, "api_key"),
        ({"settings": {"guard_metrics": True}}, "guard_metrics"),
        ({"gpu": {"count": 2}}, "count"),
        ({"apiKeys": {"keys": ["a,b"]}}, "keys"),
        ({"srevers": {"enabled": True}}, "srevers"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    done = _render(values, tmp_path)
    assert done.returncode != 0
    assert named in done.stderr


# --- examples -------------------------------------------------------------------------------------------------------


def _example(name: str) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())}


def test_the_pool_gets_requests_that_any_server_can_answer() -> None:
    pool, route = _example("inference-pool.yaml").values()
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    by_adapter, rest = route["spec"]["rules"]
    assert by_adapter["backendRefs"][0]["name"] == pool["metadata"]["name"]
    paths = {match["path"]["value"] for match in by_adapter["matches"]}
    assert paths <= relay.BY_ADAPTER | {relay.RESPONSES}
    assert all(match["method"] == "POST" and match["path"]["type"] == "Exact" for match in by_adapter["matches"])
    assert "matches" not in rest


@needs_helm
def test_the_pool_finds_the_charts_servers(tmp_path: Path) -> None:
    pool, route = _example("inference-pool.yaml").values()
    objects = _objects(FULL, tmp_path)
    labels = objects["Deployment/mine"]["spec"]["template"]["metadata"]["labels"]
    wanted = pool["spec"]["selector"]["matchLabels"]
    assert {**wanted, "app.kubernetes.io/instance": "mine"}.items() <= labels.items()
    (backend,) = route["spec"]["rules"][1]["backendRefs"]
    service = objects[f"Service/{backend['name'].replace('lorakeet', 'mine')}"]
    assert backend["port"] == service["spec"]["ports"][0]["port"]


@pytest.mark.parametrize("text", ["kubernetes/ray-service.yaml", "ray/serve.yaml"])
def test_ray_configurations_name_existing_classes_and_settings(text: str) -> None:
    document = next(yaml.safe_load_all((DEPLOY / text).read_text()))
    config = yaml.safe_load(document["spec"]["serveConfigV2"]) if "spec" in document else document
    (application,) = config["applications"]
    module, _, attribute = application["import_path"].partition(":")
    source = (DEPLOY / f"ray/{module}.py").read_text()
    assert f"\n{attribute} = " in source
    classes = set(re.findall(r"^@serve\.deployment(?s:.*?)^class (\w+)", source, re.MULTILINE))
    named, told = {one["name"] for one in application["deployments"]}, application["runtime_env"]["env_vars"]
    assert named <= classes == {"Server", "Writer", "Ingress"}
    # Ray rejects the names of deployments that the application lacks.
    assert ("Writer" in named) == ("LORAKEET_ADAPTER_STORE" not in told)
    assert set(told) <= VARIABLES


def test_rays_image_has_all_modules() -> None:
    copied = re.findall(r"COPY (.*) /", (DEPLOY / "ray/Dockerfile").read_text())[0].split()
    assert set(copied) == {path.name for path in (DEPLOY / "ray").glob("*.py")}
