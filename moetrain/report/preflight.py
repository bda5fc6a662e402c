"""What the terminal shows of a preflight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moetrain.config.schema import RunConfig
from moetrain.preflight.verdict import GO, NOT_MEASURED, REPORT_FILE, Line, overall

_COLOURS = {GO: "green", "warn": "yellow", "no-go": "bold red", NOT_MEASURED: "dim"}


def opening(run: RunConfig, *, cluster: str | None) -> str:
    """A line on what is about to be looked at."""
    against = "each other" if cluster is None else f"what the plan counts on ({cluster})"
    return (
        f"preflight of {run.run_dir}: launch={run.launch.kind}, {run.launch.processes} processes on each node, expert "
        f"parallel {run.parallel.expert_parallel}; speeds are held against {against}"
    )


def preflight_screen(lines: Sequence[Line], *, run_dir: Path, hostfile: Path | None) -> None:
    """A row for each line, with its way out below, and what it all comes to."""
    # soft_wrap: a row longer than the terminal is the terminal's to wrap, so that a path can be copied whole
    console = Console(highlight=False, soft_wrap=True)
    what, where = (max(len(getattr(line, name)) for line in lines) for name in ("what", "where"))
    where = min(where, 40)
    for line in lines:
        colour = _COLOURS[line.verdict]
        row = f"{line.what:<{what}}  {line.where:<{where}}  {line.found}".rstrip()
        console.print(f"[{colour}]{line.verdict:<12}[/{colour}]  {escape(row)}")
        if line.verdict not in (GO, NOT_MEASURED):
            console.print(f"{'':<14}[dim]{escape(line.reason)}:[/dim] {escape(line.remedy)}")
    many = Counter(line.verdict for line in lines)
    verdict = overall(lines)
    counts = ", ".join(f"{many[each]} {each}" for each in ("no-go", "warn", NOT_MEASURED, GO) if many[each])
    console.print(f"\npreflight: [{_COLOURS[verdict]}]{verdict}[/{_COLOURS[verdict]}] ({counts})")
    if (run_dir / REPORT_FILE).is_file():
        console.print(f"all of it    {run_dir / REPORT_FILE}", markup=False)
    if hostfile is not None:
        console.print(f"good nodes   {hostfile}", markup=False)
    if verdict == "no-go":
        console.print("mend it and try again; preflight=skip trains all the same")
