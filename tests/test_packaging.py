"""Packaging: declared dependencies against imports, pins against both, files against package data."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "adapters", "loadtest")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Declared, but never imported by name in the code: libraries load them at run time.
BY_NAME = {"accelerate", "gguf", "httptools", "uvloop"}
# Imported if present, never required.
OPTIONAL = {"triton", "wandb"}


def _declared(*extras: str) -> set[str]:
    lines = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@cache
def _imported(package: str) -> set[str]:
    """Distributions imported by one of our packages."""
    roots = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.partition(".")[0])
    foreign = roots - set(sys.stdlib_module_names) - set(PACKAGES) - OPTIONAL
    owners = importlib.metadata.packages_distributions()
    return {canonicalize_name(owners[root][0]) for root in foreign}


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_imported_distributions_are_declared() -> None:
    # PEFT is imported for comparisons where it is installed (`adapters.offline.oracle`), and never required.
    assert (_imported("server") | _imported("adapters")) - {"peft"} <= _declared()
    assert _imported("loadtest") <= _declared("bench", "peers")


def test_declared_dependencies_are_imported() -> None:
    used = _imported("server") | _imported("adapters")
    assert _declared() - used <= BY_NAME


def test_pins_cover_everything_that_an_install_brings() -> None:
    pins = _pins()
    missing, seen = set(), set()
    queue = [("lorakeet", frozenset({"test"}))]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name != "lorakeet" and name not in pins:
            missing.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if any(not requirement.marker or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    # A CUDA build of torch requires libraries that it pins itself.
    missing = {name for name in missing if not re.match(r"nvidia-|cuda-|triton$", name)}
    assert not missing


def test_pins_are_exact_and_carry_no_local_version() -> None:
    for name, version in _pins().items():
        assert re.fullmatch(r"\d[\w.]*", version), f"{name}=={version}"


def test_building_needs_no_torch() -> None:
    assert PROJECT["build-system"]["requires"] == ["setuptools>=77"]


def test_every_file_that_code_reads_is_shipped() -> None:
    """Every file in the packages is package data, except Python, Markdown and the results of loadtest."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    shipped = set()
    for package, patterns in data.items():
        folders = [ROOT / name for name in PACKAGES] if package == "*" else [ROOT / package.replace(".", "/")]
        shipped |= {path for folder in folders for pattern in patterns for path in folder.glob(pattern)}
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    lying = {ROOT / line for line in listed.stdout.splitlines() if not line.endswith((".py", ".md"))}
    lying = {path for path in lying if path.exists() and ROOT / "loadtest/results" not in path.parents}
    assert lying <= shipped, lying - shipped


def test_types_are_visible_to_type_checkers() -> None:
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


@pytest.mark.parametrize(("target", "installed"), [("serve", ["."]), ("demo", ["."]), ("test", [".", ".[test]"])])
def test_a_target_installs_what_it_needs_and_nothing_else(target: str, installed: list[str]) -> None:
    dry = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"--constraint constraints.txt --editable '(.*)'", done.stdout) == installed
