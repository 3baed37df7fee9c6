"""A Ray cluster of one node running deploy/ray, in the environment of `make ray`."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.running import PATH, REPOSITORY, eventually

PYTHON = REPOSITORY / ".venv-ray/bin/python"
DRIVER = REPOSITORY / "tests/support/ray_driver.py"
APPLICATION = REPOSITORY / "deploy/ray"
SERVE = [sys.executable, "-c", "from server.cli import main; main()", "serve"]
# Explained in docs/guides/scaling.md.
ADVISED = {
    "RAY_worker_niceness": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}


class RayCluster:
    """A cluster, started by the constructor; `deploy` starts or changes the application."""

    def __init__(self, root: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.fault = root / "fault"  # to inject a fault, write a kind of `inject.sitecustomize` to it
        self._data = root / "data"
        # Socket paths must be short, so Ray's files cannot be in pytest's directories.
        self._temporary = Path(tempfile.mkdtemp(prefix="lorakeet-ray-", dir="/tmp"))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAKEET_")}
        environment |= {
            "PYTHONPATH": f"{APPLICATION}{os.pathsep}{REPOSITORY}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "300",
            # Ray gives its proxy three times 5 s for its imports, too short on a busy machine.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "100",
            **ADVISED,
        }
        self._lock = threading.Lock()
        self._log = root / "ray.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(PYTHON), str(DRIVER), str(self._temporary), str(port)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._answer().get("started")

    def _answer(self) -> dict[str, Any]:
        """The driver's next answer; output of Ray's workers in between is skipped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        said = self._log.read_text(errors="replace")[-4000:]
        raise AssertionError(f"Ray's driver ended with {self._process.wait()}\n{said}")

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def deploy(self, servers: dict[str, Any], settings: dict[str, str], most: int = 32, seconds: float = 600) -> None:
        """Run the application with these autoscaling options and `LORAKEET_*` settings, and wait until it runs.

        most: concurrent requests per replica.
        """
        command = ["env", f"PYTHONPATH={PATH}", f"FAULT_FILE={self.fault}", *SERVE]
        told = {
            "LORAKEET_RAY_COMMAND": shlex.join(command),
            "LORAKEET_DATA_DIR": str(self._data),
            "HF_HUB_OFFLINE": "1",
        }
        application = {
            "name": "lorakeet",
            "import_path": "lorakeet_ray:app",
            "route_prefix": "/",
            "runtime_env": {"env_vars": told | settings},
            "deployments": [
                {"name": "Server", "autoscaling_config": servers, "max_ongoing_requests": most},
                *([] if "LORAKEET_ADAPTER_STORE" in settings else [{"name": "Writer"}]),
            ],
        }
        self._ask({"deploy": {"applications": [application]}})
        time.sleep(1)  # the controller needs time to notice

        def runs() -> bool:
            time.sleep(0.5)
            status = self._ask({"status": True})
            assert status["application"] != "DEPLOY_FAILED", status
            return status["application"] == "RUNNING" and status["replicas"] >= servers["min_replicas"]

        eventually(runs, seconds, "the application")

    def replicas(self) -> int:
        """The number of replicas of `Server`."""
        count = self._ask({"status": True})["replicas"]
        assert isinstance(count, int)
        return count

    def processes(self, deployment: str = "Server") -> list[psutil.Process]:
        """The replicas' processes; the first child of each is its server."""
        title = f"ray::ServeReplica:lorakeet:{deployment}"
        family = psutil.Process(self._process.pid).children(recursive=True)
        return [one for one in family if one.is_running() and one.cmdline() and one.cmdline()[0].startswith(title)]

    def server_of(self, replica: psutil.Process) -> psutil.Process:
        (server,) = [one for one in replica.children() if "server.cli" in " ".join(one.cmdline())]
        return server

    def requests(self) -> dict[str, dict[str, float]]:
        """Adapter -> replica -> number of its requests, from the metrics page."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if line.startswith("lorakeet:lora_requests_total{"):
                labels, _, value = line.partition("{")[2].rpartition("} ")
                pairs = dict(label.split("=") for label in labels.split(","))
                found[pairs["adapter_name"].strip('"')][pairs["replica"].strip('"')] = float(value)
        return found

    def stop(self) -> None:
        """Stop all its processes."""
        family = psutil.Process(self._process.pid).children(recursive=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        for one in family:
            if one.is_running():
                one.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)
