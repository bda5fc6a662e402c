"""Where the runs of a sweep get their processes: this machine, hosts reached by ssh, SLURM's queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config.launch.settings import LaunchConfig
    from moetrain.config.schema import RunConfig
    from moetrain.sweep.settings import SweepConfig
    from moetrain.sweep.state import Run, Sweep
    from moetrain.sweep.work.queue import Slot

Compose = Callable[[Sequence[str]], "RunConfig"]
"""Overrides -> the checked settings of a run."""


def launch_of(config: SweepConfig, launches: Sequence[LaunchConfig]) -> LaunchConfig:
    """How all runs of a sweep are launched, which is one way.

    Raises:
        ConfigError: there are several, or one that a sweep does not know.
    """
    kinds = sorted({launch.kind for launch in launches})
    problems = []
    if len(kinds) > 1:
        problems.append(f"launch.kind is {' and '.join(kinds)} in one sweep: name one launch=… for all runs")
    elif kinds[0] == "kubernetes":
        problems.append("launch.kind is kubernetes, but a sweep knows local, hostfile and slurm: use one of them")
    elif kinds[0] == "slurm" and config.halving:
        problems.append(
            f"halving is {config.halving}, but in SLURM's queue nobody compares the runs: set halving=0, or use "
            "launch=local or launch=hostfile"
        )
    if problems:
        raise ConfigError(problems)
    return launches[0]


def slots_of(opened: Sweep, launch: LaunchConfig) -> list[Slot]:
    """A place for each run at a time."""
    from moetrain.sweep.work.queue import host_slots, slots

    if launch.kind == "hostfile":
        return host_slots(launch, jobs=opened.config.at_once, directory=opened.directory / "hosts")
    return slots(opened.config.at_once)


def queue_runs(
    opened: Sweep, compose: Callable[[Run], RunConfig], *, prepare: Callable[[RunConfig, Path], object]
) -> int:
    """Give what waits to SLURM, an array for all runs that ask for the same; returns how many runs those were."""
    from moetrain.launch.lock import RunLock
    from moetrain.launch.nodes.spec import no_requests
    from moetrain.sweep.state import WAITING
    from moetrain.sweep.work.array import submit

    alike: dict[str, tuple[LaunchConfig, list[Run]]] = {}
    waiting = [run for run in opened.runs if run.status == WAITING]
    for run in waiting:
        settings = compose(run)
        with RunLock(opened.run_dir(run)):
            no_requests(opened.run_dir(run))
            prepare(settings, opened.run_dir(run))
        alike.setdefault(repr(settings.launch), (settings.launch, []))[1].append(run)
    for launch, runs in alike.values():
        job = submit(opened, runs, launch)
        print(f"SLURM job {job}: an array of {len(runs)} runs", flush=True)
    return len(waiting)
