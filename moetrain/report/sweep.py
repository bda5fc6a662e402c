"""What the terminal shows of a sweep: its grid before it runs, and how far it is."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moetrain.errors import DataError
from moetrain.metrics.log import read_metrics
from moetrain.plan.flops import format_count
from moetrain.sweep.grid import Point
from moetrain.sweep.settings import SweepConfig
from moetrain.sweep.state import DONE, FAILED, QUEUED, RUNNING, STOPPED, WAITING, Run, Sweep, seconds_of

_WATCH_SECONDS, _ASK_SECONDS = 2.0, 10.0
"""Between two looks; where a queue is asked, which others use too."""
_WIDEST, _LONGEST_NOTE = 1_000, 60
_MARKS = {DONE: "green", RUNNING: "cyan", FAILED: "red", STOPPED: "yellow", QUEUED: "blue", WAITING: "dim"}


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
    console, table = Console(highlight=False), _table(sweep, sweep.runs)
    console.print(_headline(sweep), soft_wrap=True)
    if console.is_terminal:
        console.print(table)
        return
    # for whoever reads the lines: each run is one, whatever its length
    console.width = Measurement.get(console, console.options.update(width=_WIDEST), table).maximum
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def watch(read: Callable[[], Sweep], *, console: Console | None = None) -> None:
    """The table on a terminal, drawn anew until nothing runs or waits in a queue, or Ctrl-C.

    Args:
        read: the sweep as it is now.
    """
    console = console or Console(highlight=False)
    sweep = read()
    with Live(console=console, auto_refresh=False, transient=True) as live, contextlib.suppress(KeyboardInterrupt):
        while is_at_work(sweep):
            live.update(_fitting(sweep, height=console.height), refresh=True)
            time.sleep(_ASK_SECONDS if any(run.note.startswith("SLURM") for run in sweep.runs) else _WATCH_SECONDS)
            sweep = read()
    status_table(sweep)


def is_at_work(sweep: Sweep) -> bool:
    """Whether something runs, or waits in a queue."""
    return any(run.status in (RUNNING, QUEUED) for run in sweep.runs)


def _headline(sweep: Sweep) -> str:
    counts = Counter(run.status for run in sweep.runs)
    told = ", ".join(f"{counts[status]} {status}" for status in _MARKS if counts[status])
    return f"[bold]{escape(str(sweep.directory))}[/bold]: {len(sweep.runs)} runs: {told}"


def _fitting(sweep: Sweep, *, height: int) -> Group:
    """What a terminal of this height holds: those at work first, then those that failed."""
    order = (RUNNING, FAILED, QUEUED, STOPPED, WAITING, DONE)
    rows = max(1, height - 5)
    shown = sorted(sweep.runs, key=lambda run: order.index(run.status))[:rows] if len(sweep.runs) > rows else sweep.runs
    left = len(sweep.runs) - len(shown)
    foot = f"… and {left} more; " if left else ""
    return Group(
        Text.from_markup(_headline(sweep)),
        _table(sweep, shown, longest=_LONGEST_NOTE),
        Text(f"{foot}Ctrl-C ends this view, not the runs", "dim"),
    )


def _table(sweep: Sweep, runs: Sequence[Run], *, longest: int | None = None) -> Table:
    """A line for each of some runs; the loss of one that is not at its end is that of training, in brackets."""
    table = Table("run", "status", "", "step", "loss", "seconds", "", box=None, pad_edge=False, header_style="dim")
    for column in table.columns[2:6]:
        column.justify = "right"
    # where it is narrow, it is the note that goes on in the next line
    for column in table.columns[:6]:
        column.no_wrap = True
    table.columns[6].overflow = "fold"
    results = sweep.results()
    for run in runs:
        result, lines = results.get(run.name), _lines(sweep.run_dir(run))
        told = ("", "", "", "")
        if lines:
            losses = [line["loss"] for line in lines if line.get("loss") is not None]
            share = min(1.0, lines[-1]["tokens"] / sweep.points[run.point].tokens)
            told = (
                f"{share:.0%}",
                f"{lines[-1]['step']:,}",
                f"{result.loss:.4f}" if result else f"({losses[-1]:.3f})" if losses else "",
                f"{seconds_of(lines)[-1]:,.0f}",
            )
        note = run.note or (f"tried {run.attempts + 1} times" if run.attempts else "")
        if longest is not None and len(note) > longest:
            note = f"{note[: longest - 1]}…"
        table.add_row(escape(run.name), f"[{_MARKS[run.status]}]{run.status}[/]", *told, escape(note))
    return table


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run_dir / "metrics.jsonl")
    except DataError:
        return []
