"""What passes between the command and its ranks: which layouts to run, and what was found on each. No torch.

DIR/run.yaml        the shrunk run
DIR/layouts.json    names of the layouts of this start, all of the same number of ranks
DIR/results.jsonl   a line for each finished layout, from rank 0
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moetrain.config.freeze import read_run, write_run
from moetrain.config.schema import RunConfig
from moetrain.verify.layouts import Layout, parse

COLUMNS = ("loss", "aux", "norm", "dense", "router", "expert", "params")
"""Classes of what is compared: language loss, routers' losses, gradient norm, gradients of the three kinds of
parameters, and what training left (weights, both moments, routers' state)."""

BOUNDS = {
    "fp32": {"loss": 2e-6, "aux": 5e-6, "norm": 5e-6, "dense": 2e-5, "router": 2e-5, "expert": 2e-5, "params": 5e-5},
    "bf16": {"loss": 1e-2, "aux": 5e-2, "norm": 1e-1, "dense": 5e-2, "router": 5e-2, "expert": 5e-2, "params": 1e-1},
}
"""Largest relative error that passes."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first tensor or number, in the order of the computation, that is not what one process has.

    Attributes:
        what: e.g. ``gradient of blocks.0.feed_forward.experts.w_in, expert 3``.
        step: after which it was compared, from 1; 0: before the first.
        error: relative.
        hint: the likely cause; empty when nothing clean was found.
    """

    what: str
    step: int
    error: float
    bound: float
    hint: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was found on one layout.

    Attributes:
        layout: its name.
        errors: column -> the largest relative error.
        difference: None: trained as one process does.
    """

    layout: str
    errors: dict[str, float]
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the ranks of one start do."""

    run: RunConfig
    layouts: list[Layout]


def write_spec(directory: Path, *, run: RunConfig, layouts: Sequence[Layout]) -> None:
    """Leave the work where the ranks look for it."""
    write_run(run, directory)
    (directory / "layouts.json").write_text(json.dumps([layout.name for layout in layouts]), encoding="utf-8")


def read_spec(directory: Path) -> Spec:
    """The work of this start."""
    names = json.loads((directory / "layouts.json").read_text(encoding="utf-8"))
    return Spec(run=read_run(directory), layouts=[parse(name) for name in names])


def add_result(directory: Path, result: Result) -> None:
    """Add a line."""
    with (directory / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read_results(directory: Path) -> list[Result]:
    """The whole lines so far."""
    path = directory / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    results = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        found = json.loads(line)
        difference = found.pop("difference")
        results.append(Result(**found, difference=Difference(**difference) if difference else None))
    return results
