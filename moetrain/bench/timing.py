"""Time and peak memory of contestants that take turns in one process, so that a noisy machine is noisy for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moetrain.bench.settings import YARDSTICK
from moetrain.bench.table import Row, row_of

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
