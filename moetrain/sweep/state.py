"""What a sweep has done so far: SWEEP_DIR/sweep.json, written in one step after every change.

SWEEP_DIR/
  sweep.json  lock  report.html
  runs/POINT_seed-1/      a run directory like any other
  log/POINT_seed-1.log    what its command printed
  array/001/              a job array of SLURM: script, commands, what each printed
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moetrain.config.freeze import freeze_section
from moetrain.errors import ConfigError, DataError
from moetrain.metrics.log import read_metrics
from moetrain.sweep.grid import Point
from moetrain.sweep.settings import SweepConfig

STATE_FILE = "sweep.json"
WAITING, QUEUED, RUNNING, DONE, FAILED, STOPPED = "waiting", "queued", "running", "done", "failed", "stopped"


@dataclass(kw_only=True)
class Run:
    """One run of a sweep: a point with a seed."""

    name: str
    point: str
    seed: int
    status: str = WAITING
    """waiting, queued (given to SLURM; ``work.array`` knows what became of it), running, done, failed (its retries are
    used up) or stopped (by successive halving)."""
    attempts: int = 0
    """Starts that failed."""
    note: str = ""
    """Why it failed or was stopped."""
    rungs: dict[str, float] = field(default_factory=dict)
    """Rung -> training loss there."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run reached, out of its metrics.jsonl."""

    loss: float
    """Held-out loss at the end, nats per token, on all held-out text."""
    bits_per_byte: float
    seconds: float
    """Of training steps alone."""
    tokens: int
    max_over_mean: float | None
    """Fullest expert's load over the mean on held-out text, of the worst layer; None: dense."""
    dead_experts: int


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file has it."""

    directory: Path
    config: SweepConfig
    points: dict[str, Point]
    runs: list[Run]

    @staticmethod
    def read(directory: Path) -> Sweep:
        """The sweep in a directory.

        Raises:
            ConfigError: none is there, or its file is damaged.
        """
        path = directory / STATE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            points = [_point(entry) for entry in content["points"]]
            runs = [Run(**entry) for entry in content["runs"]]
            config = freeze_section(SweepConfig, content["config"])
        except FileNotFoundError:
            raise ConfigError([f"{path} does not exist: name the directory of a sweep, e.g. sweeps/sweep"]) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError([f"{path} cannot be read ({error}): mend it, or move it away to begin anew"]) from None
        return Sweep(directory, config, {point.name: point for point in points}, runs)

    def write(self) -> None:
        """Write the file in one step."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {
            "config": asdict(self.config),
            "points": [asdict(point) for point in self.points.values()],
            "runs": [asdict(run) for run in self.runs],
        }
        partial = self.directory / (STATE_FILE + ".partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(partial, self.directory / STATE_FILE)

    def run_dir(self, run: Run) -> Path:
        """The directory of a run."""
        return self.directory / "runs" / run.name

    def log(self, run: Run) -> Path:
        """Where the output of its command goes."""
        return self.directory / "log" / f"{run.name}.log"

    def results(self) -> dict[str, Result]:
        """What the finished runs reached, by name."""
        found = {}
        for run in self.runs:
            if run.status == DONE and (result := read_result(self.run_dir(run))):
                found[run.name] = result
        return found


def find_sweep(named: Sequence[str], *, root: Path = Path("sweeps")) -> Path:
    """The directory of the sweep that is named, by a path or by its name in sweeps/; of the only one there, if none is.

    Raises:
        ConfigError: several are named, or none where there is not exactly one.
    """
    there = sorted(path.parent.name for path in root.glob(f"*/{STATE_FILE}"))
    if len(named) == 1:
        return root / named[0] if named[0] in there and not (Path(named[0]) / STATE_FILE).is_file() else Path(named[0])
    if not named and len(there) == 1:
        return root / there[0]
    told = f"one of {', '.join(there)}" if there else f"none is in {root}"
    raise ConfigError([f"{len(named) or 'no'} sweeps are named, but it must be one: {told}"])


def open_sweep(directory: Path, config: SweepConfig, points: Sequence[Point]) -> Sweep:
    """A new sweep, or the one that is there with what it has done: then points may be added, but none changed.

    Runs that an earlier start left as running or failed wait again.

    Raises:
        ConfigError: a point of this name had other settings.
    """
    runs: list[Run] = []
    known: dict[str, Point] = {}
    if (directory / STATE_FILE).is_file():
        earlier = Sweep.read(directory)
        known, runs = dict(earlier.points), earlier.runs
        changed = [point for point in points if point.name in known and _trained(known[point.name]) != _trained(point)]
        if changed:
            was, now = _trained(known[changed[0].name]), _trained(changed[0])
            told = f"{' '.join(sorted(set(was) - set(now))) or 'without'} -> {' '.join(sorted(set(now) - set(was)))}"
            raise ConfigError(
                [
                    f"{len(changed)} points of {directory} have other settings than before, such as {changed[0].name}, "
                    f"{told}: set them back, or choose another name=… for another sweep"
                ]
            )
    known |= {point.name: point for point in points}
    there = {run.name for run in runs}
    for point in points:
        for seed in config.seeds:
            name = f"{point.name}_seed-{seed}"
            if name not in there:
                runs.append(Run(name=name, point=point.name, seed=seed))
    for run in runs:
        if run.status in (RUNNING, FAILED):
            run.status, run.attempts, run.note = WAITING, 0, ""
    return Sweep(directory, config, known, runs)


def _trained(point: Point) -> list[str]:
    """What it trains; where it does may change from start to start."""
    return [override for override in point.overrides if not override.startswith(("launch=", "launch."))]


def _point(entry: dict[str, Any]) -> Point:
    """JSON has no tuples."""
    whole: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return Point(**whole)


def read_result(run_dir: Path) -> Result | None:
    """What the run reached; None where it is not at its end."""
    try:
        lines = read_metrics(run_dir / "metrics.jsonl")
    except DataError:
        return None
    final = next((line for line in reversed(lines) if line.get("final")), None)
    if final is None or final.get("held_out_loss") is None:
        return None
    fullest: list[Any] = [each for each in final.get("held_out_max_over_mean") or [] if each is not None]
    return Result(
        loss=final["held_out_loss"],
        bits_per_byte=final["bits_per_byte"],
        seconds=seconds_of(lines)[-1] if lines else 0.0,
        tokens=final["tokens"],
        max_over_mean=max(fullest) if fullest else None,
        dead_experts=sum(map(len, final.get("held_out_dead_experts") or [])),
    )


def seconds_of(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of training behind each line: its stretch of tokens over its pace, added up."""
    total, tokens, seconds = 0.0, 0, []
    for line in lines:
        if line.get("tokens_per_second"):
            total += (line["tokens"] - tokens) / line["tokens_per_second"]
            tokens = line["tokens"]
        seconds.append(total)
    return seconds
