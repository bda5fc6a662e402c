"""The runs below a directory, whoever started them: how far they are, what they print, and how to stop them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint.store import step_of, whole_checkpoints
from moetrain.config.checks import steps_in_run
from moetrain.config.freeze import RUN_FILE, read_run
from moetrain.errors import LaunchError, MoetrainError
from moetrain.launch.cluster import slurm
from moetrain.launch.lock import is_running
from moetrain.launch.nodes.spec import CONSOLE, request
from moetrain.launch.record import read_record
from moetrain.metrics.log import read_metrics


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands."""

    run_dir: Path
    kind: str
    """As ``launch.kind``."""
    state: str
    """running, queued, finished, stopped, failed, or new: nothing of it has run."""
    step: int
    """The newest in metrics.jsonl."""
    steps: int
    tokens_per_second: float | None
    checkpoint: int | None
    """Step of the newest whole checkpoint."""
    note: str
    """The job, or the first line of the error."""


def find_runs(root: Path) -> list[Path]:
    """Run directories right below ``root``, or ``root`` itself; the one that changed last comes first."""
    places = [root, *root.iterdir()] if root.is_dir() else []
    found = [place for place in places if (place / RUN_FILE).is_file()]
    return sorted(found, key=lambda place: (place / RUN_FILE).stat().st_mtime, reverse=True)


def named(word: str) -> Path:
    """The run that a word means: a directory, or the name of one in runs/.

    Raises:
        LaunchError: there is none.
    """
    for place in (Path(word), Path("runs") / word):
        if (place / RUN_FILE).is_file():
            return place
    there = ", ".join(path.name for path in find_runs(Path("runs"))) or "none"
    raise LaunchError(f"'{word}' is no run: name a run directory, or one of runs/: {there}")


def status(run_dir: Path) -> Status:
    """Where a run stands.

    Raises:
        ConfigError, DataError: its files cannot be read.
    """
    run = read_run(run_dir)
    steps = steps_in_run(run.schedule, tokens_per_step=run.batch.global_batch * run.sequence_length)
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.is_file() else []
    step = max((line["step"] for line in lines), default=0)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    saved = [step_of(each) for each in whole_checkpoints(run_dir / "checkpoints")]
    finished = any(line.get("final") and line["step"] >= steps for line in lines)
    state, note = _state(run_dir, finished=finished)
    return Status(
        run_dir=run_dir,
        kind=run.launch.kind,
        state=state,
        step=step,
        steps=steps,
        tokens_per_second=speeds[-1] if speeds else None,
        checkpoint=max(saved, default=None),
        note=note,
    )


def log_file(run_dir: Path, *, rank: int | None) -> Path:
    """What a rank has printed; None: the run itself, as its terminal has it, or what stands for that; of a job that
    never came to it, what the job has printed.

    Raises:
        LaunchError: there is no such file.
    """
    directory = run_dir / "log"
    names = [CONSOLE, "rank_00000.log"] if rank is None else [f"rank_{rank:05d}.log"]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    jobs = sorted(directory.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime) if rank is None else []
    if jobs:
        return jobs[-1]
    there = sorted(path.name for path in directory.glob("rank_*.log")) if directory.is_dir() else []
    told = f"there are {there[0]} to {there[-1]}" if there else "it has not started yet"
    raise LaunchError(f"{directory} has no {' or '.join(names)}: {told}")


def cancel(run_dir: Path, *, now: bool) -> str:
    """Ask a run to save and stop, or take it out of the queue.

    Args:
        now: do not wait for it to save.

    Returns:
        What was done.

    Raises:
        LaunchError: it neither runs nor waits.
    """
    job = slurm.job_of(run_dir)
    state = None if job is None else slurm.state_of(job)
    if job is not None and state is not None and (now or state != "RUNNING"):
        slurm.cancel(job)
        return f"SLURM job {job} ({state}) was cancelled"
    if state is None and not is_running(run_dir) and not _may_run_elsewhere(run_dir):
        raise LaunchError(f"{run_dir} does not run: there is nothing to cancel (moetrain status tells how it ended)")
    request(run_dir, kill=now)
    return f"{run_dir} was asked to {'end at once' if now else 'save and stop'}"


def _may_run_elsewhere(run_dir: Path) -> bool:
    """Kubernetes runs it without us."""
    try:
        return read_run(run_dir).launch.kind == "kubernetes"
    except MoetrainError:
        return False


def _state(run_dir: Path, *, finished: bool) -> tuple[str, str]:
    if is_running(run_dir):
        job = slurm.job_of(run_dir)
        return "running", "" if job is None or slurm.state_of(job) is None else f"SLURM job {job}"
    if finished:
        return "finished", ""
    job = slurm.job_of(run_dir)
    told = None if job is None else slurm.state_of(job)
    if told is not None:
        return ("running" if told == "RUNNING" else "queued"), f"SLURM job {job}, {told}"
    record = read_record(run_dir)
    if record is None:
        return "new", ""
    if record.state == "running":
        return "failed", "its launcher is gone: killed, or the machine went down"
    lines = record.message.splitlines()
    return record.state, lines[0] if lines else ""
