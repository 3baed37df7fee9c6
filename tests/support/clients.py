"""`make clients`: every client of tests/clients, unchanged, against one real server with the default model.

Each directory there is one environment, created below .venv-clients and kept: it has the versions pinned in the
directory's requirements.txt or package.json, and runs the directory's tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from server.model_source import resolve
from server.settings import Settings
from tests.support.running import REPOSITORY, START_SECONDS, RunningServer

CLIENTS = REPOSITORY / "tests/clients"
ENVIRONMENTS = REPOSITORY / ".venv-clients"
MODEL = "smollm2-135m-instruct"


def names() -> list[str]:
    """Names of all environments."""
    return sorted(path.name for path in CLIENTS.iterdir() if path.is_dir() and path.name[0] not in "._")


def _python(name: str) -> list[str]:
    """The test command of a Python environment, created if necessary."""
    home, wanted = ENVIRONMENTS / name, CLIENTS / name / "requirements.txt"
    made = home / "requirements.txt"  # copied at the last installation
    python = str(home / "bin/python")
    if not made.exists() or made.read_bytes() != wanted.read_bytes():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", str(wanted)], check=True)
        shutil.copyfile(wanted, made)
    options = ["-c", str(CLIENTS / "pytest.ini"), "--rootdir", str(CLIENTS), "--durations", "5"]
    return [python, "-m", "pytest", *options, str(CLIENTS / name)]


def _node(name: str) -> list[str]:
    """The test command of a JavaScript environment, created if necessary."""
    home = ENVIRONMENTS / name
    home.mkdir(parents=True, exist_ok=True)
    for file in (CLIENTS / name).iterdir():
        shutil.copyfile(file, home / file.name)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=home, check=True)
    return ["node", "--test", *map(str, sorted(home.glob("*.test.mjs")))]


def main(chosen: list[str]) -> int:
    """Run these environments, or all; return the number of failures."""
    settings = Settings()
    model = resolve(settings.model, settings.cache_dir, print)
    failed = []
    with tempfile.TemporaryDirectory() as root:
        sizes = ("--kv-cache-bytes", "256MiB", "--adapter-bytes", "64MiB")
        flags = ("--served-model-name", MODEL, *sizes, "--threads", str(os.cpu_count() or 1))
        server = RunningServer(model, Path(root), Path(root) / "data", *flags)
        try:
            for name in chosen or names():
                command = _node(name) if (CLIENTS / name / "package.json").exists() else _python(name)
                server.begin()
                server.wait_ready(START_SECONDS * 5)  # the machine may still be busy after installing
                told = {"SERVER_URL": server.url, "SERVER_MODEL": MODEL, "SERVER_MODEL_DIR": str(model)}
                print(f"--- {name}", flush=True)
                environment = os.environ | told | {"HF_HUB_OFFLINE": "1"}
                if subprocess.run(command, env=environment, cwd=root, check=False).returncode:
                    failed.append(name)
        finally:
            server.stop()
    print(f"failed: {', '.join(failed)}" if failed else "all clients pass")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
