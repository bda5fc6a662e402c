"""Small programs in the place of train, for what would take minutes with it: each writes the metrics of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from moetrain.sweep.grid import Point
from moetrain.sweep.settings import SweepConfig
from moetrain.sweep.state import Run, Sweep, open_sweep

_WRITE = """
import json, os, signal, sys, time
place, loss, seconds, steps = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
os.makedirs(place, exist_ok=True)
path = os.path.join(place, "metrics.jsonl")
begun = sum(1 for _ in open(path)) if os.path.exists(path) else 0
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
with open(path, "a") as file:
    for step in range(begun + 1, steps + 1):
        time.sleep(seconds / steps)
        line = {"step": step, "tokens": 10 * step, "loss": loss + 1 / step, "tokens_per_second": 5.0}
        file.write(json.dumps(line) + "\\n")
        file.flush()
        if asked:
            sys.exit(75)
    end = {"step": steps, "tokens": 10 * steps, "final": True, "held_out_loss": loss, "bits_per_byte": loss / 2,
           "held_out_max_over_mean": [1.5, None], "held_out_dead_experts": [[3], []]}
    file.write(json.dumps(end) + "\\n")
"""


def writes(place: Path, *, loss: float, seconds: float = 0.0, steps: int = 10) -> list[str]:
    """A program that writes the metrics of a run, goes on with one that is there, and stops on SIGTERM with code 75."""
    return [sys.executable, "-c", _WRITE, str(place), str(loss), str(seconds), str(steps)]


def fails(message: str = "moetrain: the disk is full") -> list[str]:
    return [sys.executable, "-c", f"print({message!r}); raise SystemExit(2)"]


def point(name: str, *, labels: dict[str, str] | None = None) -> Point:
    return Point(name=name, labels=labels or {"seed": name}, overrides=(f"name={name}",), flops=1e9, tokens=100,
                 parameters=1000, active=500, memory_bytes=1e6)  # fmt: skip


def sweep_of(directory: Path, *names: str, **settings: object) -> Sweep:
    opened = open_sweep(directory, SweepConfig(**settings), [point(name) for name in names])  # type: ignore[arg-type]
    opened.write()
    return opened


def statuses(sweep: Sweep) -> dict[str, str]:
    return {run.point: run.status for run in Sweep.read(sweep.directory).runs}


def by_point(sweep: Sweep, run: Run, **programs: list[str]) -> list[str]:
    return programs.get(run.point) or writes(sweep.run_dir(run), loss=3.0)
