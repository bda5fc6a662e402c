"""The house rule: who may import whom. Lazy and TYPE_CHECKING imports count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moetrain"

MAY_IMPORT = {
    "cli": {
        "bench",
        "compose",
        "config",
        "data",
        "prepare",
        "instruct",
        "stream",
        "hub",
        "evaluation",
        "surgery",
        "launch",
        "report",
        "sweep",
        "page",
        "metrics",
        "plan",
        "archive",
        "checkpoint.store",
        "checkpoint.remote",
        "parallel.lifeline",
        "verify",
        "preflight.checks",
        "preflight.rules",
        "preflight.seen",
        "preflight.verdict",
        "errors",
    },
    "compose": {"config", "errors"},
    "launch": {
        "config",
        "plan",
        "parallel.topology",
        "parallel.lifeline",
        "checkpoint.store",
        "metrics.log",
        "watch.incidents",
        "watch.board",
        "errors",
    },
    "report": {"config", "plan", "metrics", "sweep", "preflight.verdict", "watch.incidents", "errors"},
    "page": {"config", "plan", "metrics", "sweep", "errors"},
    "sweep": {"config", "plan", "launch", "metrics.log", "errors"},
    "preflight": {"plan", "parallel", "config", "errors"},
    "bench": {"train", "checkpoint", "model", "moe", "metrics", "plan", "parallel", "config", "errors"},
    "watch": {"checkpoint", "model", "parallel", "config", "errors"},
    "train": {
        "watch",
        "checkpoint",
        "stream.feed",
        "model",
        "data",
        "moe",
        "metrics",
        "plan",
        "parallel",
        "config",
        "errors",
    },
    "verify": {"watch.guard", "train", "checkpoint", "model", "moe", "data", "parallel", "config", "errors"},
    "evaluation": {"hub", "train", "checkpoint", "model", "moe", "data", "config", "errors"},
    "surgery": {"evaluation", "hub", "archive", "checkpoint", "data", "plan", "config", "errors"},
    "hub": {"archive", "checkpoint", "model", "instruct.template", "data", "plan", "config", "errors"},
    "archive": {"checkpoint", "model", "metrics", "plan", "config", "errors"},
    "checkpoint": {"parallel", "config", "errors"},
    "plan": {"config", "parallel.topology", "errors"},
    "model": {"moe", "parallel", "config", "errors"},
    "moe": {"parallel", "errors"},
    "prepare": {"data", "sources", "tokenization", "parallel.pool", "errors"},
    "instruct": {"prepare", "data", "sources", "tokenization", "errors"},
    "stream": {
        "prepare",
        "sources",
        "tokenization",
        "data",
        "parallel.pool",
        "parallel.lifeline",
        "parallel.seeds",
        "config",
        "errors",
    },
    "sources": {"errors"},
    "tokenization": {"data", "errors"},
    "data": {"config", "errors"},
    "metrics": {"errors"},
    "parallel": {"errors"},
    "config": {"errors"},
    "errors": set(),
}
NO_TORCH = ("cli", "compose", "config", "plan", "launch", "report", "sweep", "page", "data", "prepare", "instruct",
            "sources", "stream", "tokenization", "errors",
            "checkpoint.store", "checkpoint.certificate", "checkpoint.remote", "parallel.topology",
            "parallel.lifeline", "parallel.pool", "parallel.seeds", "train.schedule",
            "watch.incidents", "watch.board", "watch.progress", "watch.hang",
            "metrics.log", "metrics.speed", "metrics.console", "metrics.live", "bench.settings",
            "preflight.seen", "preflight.links",
            "preflight.checks", "preflight.rules", "preflight.verdict",
            "verify.layouts", "verify.shrink", "verify.spec")  # fmt: skip
ONLY_IN = {
    "hydra": {"compose"},
    "omegaconf": {"compose"},
    # a contestant in benchmarks, the engine everywhere else
    "deepspeed": {"train.adopted.experts", "train.adopted.stage3", "bench.peers"},
    # held against our models
    "transformers": {"bench.peers", "hub.parity"},
    "gguf": {"hub.gguf.export"},
    "wandb": {"metrics.log"},
    "datasets": {"sources.hub"},
    "fsspec": {"checkpoint.remote"},
    "matplotlib": {"report.figures", "page.static"},
    "plotly": {"page.html"},
    "scipy": {"sweep.laws", "sweep.answer"},
    "optuna": {"cli.running.search"},
}
LONGEST_FILE, LONGEST_FUNCTION, FILES_IN_ROOM = 400, 60, 8


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()


def room(module: str) -> str:
    return module.split(".")[0]


def is_under(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name in imports(MODULES[module]):
        if name.startswith("moetrain.") and (target := name.removeprefix("moetrain.")) != "__version__":
            allowed = MAY_IMPORT[room(module)] | {room(module)}
            assert any(is_under(target, each) for each in allowed), f"{module} imports {name}"


def test_the_table_has_no_circle():
    seen: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        if name not in seen:
            for each in MAY_IMPORT[name]:
                visit(room(each), (*path, name)) if room(each) != name else None
            seen.add(name)

    # parts of a room that others may reach (parallel.lifeline) point no further up than the room itself
    for name in MAY_IMPORT:
        visit(name, ())


@pytest.mark.parametrize("module", [name for name in MODULES if any(is_under(name, each) for each in NO_TORCH)])
def test_a_login_node_needs_no_torch(module):
    assert not [name for name in imports(MODULES[module]) if is_under(name, "torch") or is_under(name, "deepspeed")]


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_foreign_library_has_one_door(library):
    users = {module for module, tree in MODULES.items() if any(is_under(name, library) for name in imports(tree))}
    assert users == ONLY_IN[library]


def test_pickle_is_read_in_one_place_only():
    users = {module for module, tree in MODULES.items() if "pickle" in set(imports(tree))}
    assert users == {"checkpoint.state"}


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module):
    tree = MODULES[module]
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if path.is_file():
        assert len(path.read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, f"{module}.{node.name}"


def test_rooms_stay_small():
    for directory in PACKAGE.rglob("*"):
        if directory.is_dir() and directory.name != "__pycache__":
            files = [path for path in directory.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
            assert len(files) < FILES_IN_ROOM, directory.name
