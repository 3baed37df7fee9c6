"""The allowed directions of imports, read from the source without importing it."""

import ast
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSES = ("server", "adapters", "loadtest")
HEAVY = ("torch", "transformers", "bitsandbytes", "peft")
# Modules of the engine process and of the API process; both import only `server.messages` of each other.
ENGINE_SIDE = ("server.engine", "server.model", "server.training")
API_SIDE = tuple(
    f"server.{part}"
    for parts in (
        "http openai anthropic text registry finetune batches client children tenants responses ui",  # packages
        "startup services settings setting_kinds data_dir doctor model_source errors admission",
        "metrics usage history",
    )
    for part in parts.split()
)
WEB = ("starlette", "uvicorn", "pydantic", "httpx", "python_multipart")


@dataclass(frozen=True)
class Module:
    """The modules that one file imports: when it is loaded, and at any time (in functions, for type checking)."""

    at_load: frozenset[str]
    ever: frozenset[str]


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Module]:
    """Every module of the three packages."""
    files = {_name(path): path for house in HOUSES for path in (ROOT / house).rglob("*.py")}
    graph = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lazy = {id(node) for scope in ast.walk(tree) if _runs_later(scope) for node in ast.walk(scope)}
        at_load, ever = set(), set()
        for node in ast.walk(tree):
            for target in _targets(node, files.keys()):
                ever.add(target)
                if id(node) not in lazy:
                    at_load.add(target)
        graph[name] = Module(frozenset(at_load), frozenset(ever))
    return graph


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith("TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _targets(node: ast.AST, known: Collection[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in known else node.module for name in full]
    return []


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("who", "but", "never"),
    [
        pytest.param(("adapters",), (), ("server", "loadtest", *WEB), id="adapters know no server"),
        pytest.param(("loadtest",), (), ("server", "adapters"), id="the load test drives from outside"),
        pytest.param(("server",), (), ("loadtest",), id="the server does not know its load test"),
        pytest.param(
            ("server", "adapters"), ("adapters.offline.oracle",), ("tests", "peft"), id="neither needs what tests need"
        ),
        pytest.param(
            ("server.http.routes", "server.openai", "server.anthropic"),
            (),
            ("server.http.app", "server.http.serving", "server.startup", "server.cli", *HEAVY),
            id="handlers are built upon",
        ),
        pytest.param(
            API_SIDE, ("server.children.programs",), (*ENGINE_SIDE, "torch"), id="the API process has no engine"
        ),
        pytest.param(
            ENGINE_SIDE,
            (),
            (*API_SIDE, "server.cli", *WEB),
            id="the engine knows no HTTP",
        ),
        pytest.param(
            ("server.messages",),
            (),
            (*ENGINE_SIDE, *API_SIDE, "torch", *WEB),
            id="messages know neither side",
        ),
        pytest.param(
            ("server.text", "server.finetune", "server.client", "server.children", "server.messages"),
            (),
            ("server.http", "server.openai", "starlette", "uvicorn", "httpx", "python_multipart"),
            id="HTTP ends at the handlers",
        ),
        pytest.param(
            ("server.engine.scheduler", "server.engine.blocks", "adapters.device.rows", "adapters.device.cache"),
            (),
            ("numpy", *HEAVY),
            id="bookkeeping holds no tensors",
        ),
        pytest.param(
            ("server.commands",),
            (),
            ("server.http", "server.startup", "server.engine", "adapters"),
            id="commands talk HTTP",
        ),
    ],
)
def test_forbidden_imports_do_not_occur(who: tuple[str, ...], but: tuple[str, ...], never: tuple[str, ...]) -> None:
    for package in who:
        assert any(_within(name, (package,)) for name in modules()), f"{package} is gone: change this rule"
    offences = [
        f"{name} imports {target}"
        for name, module in modules().items()
        if _within(name, who) and not _within(name, but)
        for target in module.ever
        if _within(target, never)
    ]
    assert not offences, offences


def test_no_route_module_imports_another() -> None:
    routes = {name for name in modules() if name.startswith("server.http.routes.")}
    assert len(routes) > 10
    shared = {name: modules()[name].ever & routes for name in routes if modules()[name].ever & routes}
    assert not shared, f"move what they share out of server/http/routes: {shared}"


@pytest.mark.parametrize("entry", ["server.http.serving", "server.cli"])
def test_the_api_process_starts_without_torch(entry: str) -> None:
    paths = {entry: [entry]}
    queue = [entry]
    for name in queue:
        for target in modules()[name].at_load:
            assert not _within(target, HEAVY), " -> ".join([*paths[name], target])
            if target in modules() and target not in paths:
                paths[target] = [*paths[name], target]
                queue.append(target)
    assert len(queue) > 3


def test_the_engine_starts_without_torchs_compiler() -> None:
    """It takes seconds to import, and bitsandbytes would import it for unused functions."""
    code = "import sys, adapters.kernels; print(*({'bitsandbytes', 'torch._inductor.lowering'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == ["bitsandbytes"]


SANDBOX = "server.children.programs.template_sandbox"


def test_the_template_sandbox_needs_nothing_but_jinja() -> None:
    """Counts every import of every module in its closure, and the packages that contain them."""
    ours, foreign, queue = set(), set(), [SANDBOX]
    while queue:
        name = queue.pop()
        if name not in modules():
            foreign.add(name.partition(".")[0])
        elif name not in ours:
            ours.add(name)
            queue += modules()[name].ever
            queue += filter(None, [name.rpartition(".")[0]])
    assert "server.text.chat_template" in ours
    assert foreign - sys.stdlib_module_names == {"jinja2"}


def test_the_template_sandbox_loads_nothing_but_jinja() -> None:
    code = f"import sys, {SANDBOX}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    plain = subprocess.run(
        [sys.executable, "-c", "import sys, jinja2; print(*{name.partition('.')[0] for name in sys.modules})"],
        capture_output=True,
        text=True,
        check=True,
    )
    beyond = set(run.stdout.split()) - sys.stdlib_module_names - set(plain.stdout.split())
    assert beyond == {"server"}


def _package(name: str) -> str:
    """A module's node in the package graph: its folder in `server` or `adapters`, or the module itself."""
    house, *rest = name.split(".")
    if house == "loadtest":
        return house
    if name.startswith("server.children.programs"):
        return "server.children.programs"
    return ".".join([house, *rest[:1]])


def test_packages_form_no_cycle() -> None:
    """Counts every import: at load, in functions, for type checking."""
    graph: dict[str, set[str]] = {}
    for name, module in modules().items():
        targets = {_package(target) for target in module.ever if target in modules()}
        graph.setdefault(_package(name), set()).update(targets - {_package(name)})
    assert {"server.http", "server.engine", "adapters.device"} <= graph.keys()
    _refuse_cycles(graph)


def test_imports_form_no_cycle() -> None:
    _refuse_cycles({name: {t for t in module.at_load if t in modules()} - {name} for name, module in modules().items()})


def _refuse_cycles(graph: Mapping[str, Collection[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_every_module_says_what_it_is() -> None:
    empty = [
        _name(path)
        for house in HOUSES
        for path in (ROOT / house).rglob("*.py")
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not empty, empty
