"""Time and peak memory of contestants that take turns in one process, so that a noisy machine is noisy for all.

Their rows make a table for people and JSON for programs.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moetrain.bench.settings import YARDSTICK

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one contestant took. None: it was not measured, and the note says why."""

    dtype: str
    routing: str
    experts: int
    top_k: int
    contestant: str
    ms: float | None = None
    """Median of the timed turns."""
    spread_ms: float | None = None
    """Third less first quartile; None for a single turn."""
    turns: int = 0
    ratio: float | None = None
    """Median over the dense block's median."""
    peak_mib: float | None = None
    """Peak of memory above what was held before (``observe``)."""
    mfu: float | None = None
    """Share of the rate of a large matmul in the same run."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole benchmark."""

    title: str
    about: dict[str, Any]
    """Versions, machine and settings, by name."""
    rows: list[Row]
    remarks: list[str]
    """Lines under the tables."""


def row_of(seconds: Sequence[float], *, yardstick: Sequence[float], peak_bytes: int, **what: Any) -> Row:
    """The row of a contestant that took ``seconds`` in its timed turns."""
    median = statistics.median(seconds)
    spread = None
    if len(seconds) > 1:
        quarters = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = (quarters[2] - quarters[0]) * 1e3
    return Row(
        ms=median * 1e3,
        spread_ms=spread,
        turns=len(seconds),
        ratio=median / statistics.median(yardstick),
        peak_mib=peak_bytes / MIB,
        **what,
    )


def text(report: Report) -> str:
    """All tables, one for each dtype and routing."""
    about = ", ".join(f"{name} {value}" for name, value in report.about.items() if not isinstance(value, dict))
    lines = [report.title, about]
    for dtype, routing in dict.fromkeys((row.dtype, row.routing) for row in report.rows):
        rows = [row for row in report.rows if (row.dtype, row.routing) == (dtype, routing)]
        lines += ["", f"{dtype}, {routing} routing", *_aligned(rows)]
    return "\n".join([*lines, *([""] if report.remarks else []), *report.remarks])


def write_json(report: Any, path: Path) -> None:
    """Write in one step: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _aligned(rows: Sequence[Row]) -> list[str]:
    with_mfu = any(row.mfu is not None for row in rows)
    head = ["experts", "top_k", "contestant", "ms", "[spread]", "ratio", "peak MiB", *(["MFU"] if with_mfu else []), ""]
    cells, before = [head], (0, 0)
    for row in rows:
        shape = (row.experts, row.top_k)
        spread = "" if row.ms is None else f"[{_number(row.spread_ms, 1)}]"
        line = [*map(str, shape if shape != before else ("", "")), row.contestant, _number(row.ms, 1), spread]
        line += [
            _number(row.ratio, 2),
            _number(row.peak_mib, 1),
            *([_number(row.mfu, 2)] if with_mfu else []),
            row.note,
        ]
        cells.append(line)
        before = shape
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    to_the_left = {head.index("contestant"), len(head) - 1}
    return [
        "  ".join(
            cell.ljust(width) if column in to_the_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


SLOW = 10
"""A contestant that takes more than this many times as long as the first, and more than SLOW_SECONDS, runs once."""
SLOW_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A piece of work to be timed."""

    name: str
    run: Callable[[], object]
    """The work; what it returns is dropped."""
    clear: Callable[[], None]
    """Brings back the state before the work, outside of the time."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one contestant took."""

    seconds: list[float]
    """Of each timed turn."""
    peak_bytes: int
    """See ``observe``."""
    is_slow: bool
    """It ran once only, with its memory watched."""


@dataclass(frozen=True)
class Observed:
    """One run with its memory watched."""

    seconds: float
    peak_bytes: int


def measure(
    contestants: Sequence[Contestant],
    *,
    repeats: int,
    device: torch.device,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, Measured]:
    """Two turns to warm up, in the first of which memory is watched, then ``repeats`` timed ones.

    Args:
        contestants: the yardstick first.
        tick: called with the contestant's name before each run.
    """
    first: dict[str, Observed] = {}
    for each in contestants:
        tick(each.name)
        each.clear()
        first[each.name] = observe(each.run, device=device)
    bar = max(SLOW_SECONDS, SLOW * first[contestants[0].name].seconds)
    slow = {name for name, once in first.items() if once.seconds > bar}
    seconds: dict[str, list[float]] = {each.name: [] for each in contestants}
    for turn in range(repeats + 1):
        for each in contestants:
            tick(each.name)
            if each.name in slow:
                continue
            each.clear()
            took = _seconds(each.run, device=device)
            if turn:
                seconds[each.name].append(took)
    for each in contestants:
        each.clear()
    return {
        name: Measured(
            seconds=[once.seconds] if name in slow else seconds[name],
            peak_bytes=once.peak_bytes,
            is_slow=name in slow,
        )
        for name, once in first.items()
    }


def runs_of(contestants: int, *, repeats: int) -> int:
    """How often ``measure`` ticks."""
    return contestants * (repeats + 2)


def rows_of(
    names: Sequence[str], *, found: dict[str, Measured], notes: dict[str, str], what: dict[str, Any]
) -> list[Row]:
    """A row for each name, in order; one that was not measured has its note alone."""
    rows = []
    for name in names:
        if name not in found:
            rows.append(Row(contestant=name, note=notes[name], **what))
            continue
        once = "one run, with its memory watched" if found[name].is_slow else ""
        rows.append(
            row_of(
                found[name].seconds,
                yardstick=found[YARDSTICK].seconds,
                peak_bytes=found[name].peak_bytes,
                contestant=name,
                note="; ".join(filter(None, [notes.get(name, ""), once])),
                **what,
            )
        )
    return rows


def observe(run: Callable[[], object], *, device: torch.device) -> Observed:
    """Run once and tell the peak of bytes that torch's allocator had handed out, above what it had before.

    On CUDA that is ``max_memory_allocated``. On CPU it is the running sum of the allocations and frees that the
    allocator reports to the profiler, those inside of kernels included; what a library allocates by itself (oneDNN's
    scratch space) is in neither. Frees of what was there before do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = _seconds(run, device=device)
        return Observed(seconds, torch.cuda.max_memory_allocated(device) - before)
    # kineto tells of its starts and stops on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        seconds = _seconds(run, device=device)
    events = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    live = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        peak = max(peak, live)
    return Observed(seconds, peak)


def _seconds(run: Callable[[], object], *, device: torch.device) -> float:
    _wait(device)
    since = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - since


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
