"""What the terminal shows of a sweep: its grid before it runs, and how far it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetrain.errors import DataError
from moetrain.metrics.log import read_metrics
from moetrain.plan.flops import format_count
from moetrain.sweep.grid import Point
from moetrain.sweep.settings import SweepConfig
from moetrain.sweep.state import DONE, FAILED, RUNNING, STOPPED, WAITING, Sweep

_MARKS = {DONE: "green", RUNNING: "cyan", FAILED: "red", STOPPED: "yellow", WAITING: "dim"}


def grid_text(directory: Path, config: SweepConfig, points: Sequence[Point]) -> str:
    """The points, what each costs, and what was adjusted."""
    rows = [
        (
            point.name,
            f"{format_count(point.parameters)}",
            f"{format_count(point.active)}",
            f"{point.flops:.3g}",
            f"{point.off:+.1%}" if config.keep != "none" else "",
            " ".join(point.adjusted),
        )
        for point in points
    ]
    head = ("point", "parameters", "active", "FLOPs", "off" if config.keep != "none" else "", "adjusted")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    kept = f", {config.keep} kept by {config.free}" if config.keep != "none" else ""
    runs, flops = len(points) * len(config.seeds), sum(point.flops for point in points) * len(config.seeds)
    lines = [f"{directory}: {len(points)} points x {len(config.seeds)} seeds = {runs} runs, {flops:.3g} FLOPs{kept}"]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if column in (0, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def status_table(sweep: Sweep) -> None:
    """Print a line for each run, and how many are in which state."""
    # soft_wrap: a narrow terminal, or none at all, must not cut names short
    console = Console(highlight=False, soft_wrap=True)
    counts = Counter(run.status for run in sweep.runs)
    told = ", ".join(f"{counts[status]} {status}" for status in _MARKS if counts[status])
    console.print(f"[bold]{escape(str(sweep.directory))}[/bold]: {len(sweep.runs)} runs: {told}")
    table = Table("run", "status", "step", "loss", "seconds", "", box=None, pad_edge=False, header_style="dim")
    for column in table.columns[2:5]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    results = sweep.results()
    for run in sweep.runs:
        result = results.get(run.name)
        step = _last_step(sweep.run_dir(run))
        table.add_row(
            escape(run.name),
            f"[{_MARKS[run.status]}]{run.status}[/]",
            "" if step is None else f"{step:,}",
            "" if result is None else f"{result.loss:.4f}",
            "" if result is None else f"{result.seconds:,.0f}",
            escape(run.note or (f"tried {run.attempts + 1} times" if run.attempts else "")),
        )
    console.print(table)


def _last_step(run_dir: Path) -> int | None:
    try:
        lines = read_metrics(run_dir / "metrics.jsonl")
    except DataError:
        return None
    return int(lines[-1]["step"]) if lines else None
