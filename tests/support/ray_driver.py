"""A driver in Ray's environment: starts Ray on this machine, and executes one line of JSON at a time until input ends.

{"deploy": {...}}   configure Serve, like `serve deploy`
{"status": true}    reply {"application": STATUS, "replicas": number of replicas of `Server`}
"""

import json
import sys
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema


def _status() -> dict[str, Any]:
    application = serve.status().applications.get("lorakeet")
    if application is None:
        return {"application": "NONE", "replicas": 0}
    server = application.deployments.get("Server")
    running = server.replica_states.get("RUNNING", 0) if server else 0
    return {"application": application.status.value, "message": application.message, "replicas": running}


def main(temporary: str, port: int) -> None:
    """Execute commands until standard input ends."""
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=100_000_000,
        _temp_dir=temporary,
        namespace="serve",
        log_to_driver=True,
    )
    for patience in (1, 0):  # on a busy machine the proxy may take longer than Ray's minute; the second try finds it
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
            break
        except ray.exceptions.GetTimeoutError:
            if not patience:
                raise
    print(json.dumps({"started": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "deploy" in order:
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(order["deploy"]))
        print(json.dumps(_status()), flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
