"""The runs of a sweep in SLURM's queue: an array of jobs that needs nobody here, and what became of it.

SLURM starts them, a failed one is started again in its job (not where preflight says no-go), one at its time limit goes
back into the queue. What became of each is told by squeue and by what it left in its run directory, whenever somebody
asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moetrain.config.launch.settings import LaunchConfig
from moetrain.launch.cluster import slurm
from moetrain.launch.lock import is_running
from moetrain.launch.record import forget, read_record
from moetrain.sweep.state import DONE, FAILED, QUEUED, RUNNING, WAITING, Run, Sweep, read_result


def submit(sweep: Sweep, runs: Sequence[Run], launch: LaunchConfig) -> str:
    """Put runs into the queue as one array, and write down that they are there.

    Args:
        runs: their directories hold what is to run; SLURM gives each what ``launch`` asks for.
        launch: of every one of them.

    Returns:
        Number of the job.

    Raises:
        LaunchError: sbatch refuses; then nothing was changed.
    """
    for run in runs:
        forget(sweep.run_dir(run))
    job = slurm.submit_array([slurm.run_words(sweep.run_dir(run)) for run in runs], _array(sweep, launch))
    for task, run in enumerate(runs):
        slurm.remember(sweep.run_dir(run), f"{job}_{task}")
        run.status, run.note = QUEUED, f"SLURM job {job}_{task}"
    sweep.write()
    return job


def script(sweep: Sweep, runs: int, launch: LaunchConfig) -> str:
    """The script of an array of so many runs, to look at."""
    return slurm.array_script(runs, _array(sweep, launch))


def _array(sweep: Sweep, launch: LaunchConfig) -> slurm.Array:
    return slurm.Array(
        directory=next_directory(sweep),
        slurm=launch.slurm,
        name=sweep.config.name,
        nodes=launch.nodes or 1,
        gpus=launch.processes or 1,
        at_once=sweep.config.jobs,
        retries=sweep.config.retries,
    )


def next_directory(sweep: Sweep) -> Path:
    """Of an array of its own: tasks of an earlier one that still wait read their commands later."""
    there = [int(path.name) for path in (sweep.directory / "array").glob("*") if path.name.isdecimal()]
    return sweep.directory / "array" / f"{max(there, default=0) + 1:03d}"


def settle(sweep: Sweep) -> None:
    """What became of the queued runs: they wait there, run, are done, have failed, or wait for us after a stop.

    Nor does a run go on that a killed sweep has left as running, if nobody holds it. The sweep's file is left alone.

    Raises:
        LaunchError: some are queued, and squeue does not answer.
    """
    for run in sweep.runs:
        if run.status == RUNNING and not is_running(sweep.directory) and not is_running(sweep.run_dir(run)):
            run.status, run.note = WAITING, "its sweep is gone: the same command goes on"
    # one that waits may be there too: submitted by a sweep that was killed before it wrote that down, or by hand
    jobs = {run.name: slurm.job_of(sweep.run_dir(run)) for run in sweep.runs if run.status in (QUEUED, WAITING)}
    states = slurm.states_of({job for job in jobs.values() if job is not None})
    for run in sweep.runs:
        if run.status == QUEUED or jobs.get(run.name) in states:
            run.status, run.note = _became(sweep, run, job=jobs[run.name], states=states)


def take_up(sweep: Sweep) -> None:
    """Before more is started: what failed in the queue waits again, what is still there is left there.

    Raises:
        LaunchError: as ``settle``.
    """
    settle(sweep)
    for run in sweep.runs:
        if run.status == FAILED:
            run.status, run.note = WAITING, ""
        elif run.status == RUNNING:
            run.status = QUEUED
    sweep.write()


def _became(sweep: Sweep, run: Run, *, job: str | None, states: Mapping[str, str]) -> tuple[str, str]:
    place = sweep.run_dir(run)
    if read_result(place) is not None:
        return DONE, ""
    state = None if job is None else states.get(job)
    if state is not None:
        return (RUNNING if state in ("RUNNING", "COMPLETING") else QUEUED), f"SLURM job {job}, {state}"
    record = read_record(place)
    if record is None:
        return FAILED, f"it left the queue before anything ran: cancelled, or see {sweep.directory / 'array'}"
    if record.state == "stopped":
        return WAITING, "stopped on request"
    if record.state == "running":
        return FAILED, "its launcher is gone: killed, or the node went down"
    lines = record.message.splitlines()
    return FAILED, lines[0] if lines else f"see {place / 'log'}"
