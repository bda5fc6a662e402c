"""The runs of a sweep, n at a time, each in a process group of its own, on cores or hosts of its own.

a run fails        it waits again, until its retries are used up; the others go on
nodes are unfit    preflight says no-go: the run fails without being tried again
we get a signal    once: every run saves and stops, and the same command goes on; twice: they are killed
we are killed      a run that is at work goes on to its end; the next start finds its directory locked and waits for it
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import DataError, LaunchError
from moetrain.launch.lock import is_running
from moetrain.launch.machine.cores import visible_gpus
from moetrain.launch.nodes.hosts import hosts_of
from moetrain.launch.record import forget, read_record
from moetrain.metrics.log import read_metrics
from moetrain.sweep.state import DONE, FAILED, RUNNING, STOPPED, WAITING, Run, Sweep, read_result

_SAVED = 75  # exit code of train after a stop on request
_POLL_SECONDS = 0.2
_SMOOTHED_LINES = 3

Command = Callable[[Run], list[str]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Slot:
    """Where one run at a time works."""

    cores: tuple[int, ...]
    """Of this machine; empty: not bound."""
    gpus: str | None
    """For CUDA_VISIBLE_DEVICES; None: there are none."""
    words: tuple[str, ...] = ()
    """Overrides that a run has here."""


@dataclass
class _Job:
    run: Run
    slot: Slot
    process: subprocess.Popen[bytes] | None
    """None: it was started by a sweep that is no more."""
    halted: bool = False
    """Whether successive halving has asked it to stop."""
    told: bool = False
    """Whether it was asked to stop at all."""


def run_queue(
    sweep: Sweep,
    *,
    command: Command,
    steps: Mapping[str, int],
    say: Say,
    places: Sequence[Slot] | None = None,
    poll_seconds: float = _POLL_SECONDS,
) -> bool:
    """Work off every run that waits. Nothing that was started here is alive afterwards.

    Args:
        sweep: its file is written after every change.
        command: what starts a run, or goes on with it.
        steps: point -> steps of its runs, for the rungs of successive halving.
        say: shows a line to the user.
        places: one for each run at a time; None: this machine in ``sweep.config.jobs`` parts.

    Returns:
        Whether it was stopped on request.
    """
    jobs: list[_Job] = []
    free = slots(sweep.config.at_once) if places is None else list(places)
    with _StopRequests() as requests:
        try:
            while jobs or (not requests.count and any(run.status == WAITING for run in sweep.runs)):
                while free and not requests.count and (run := _next(sweep)):
                    jobs.append(_begin(sweep, run, free.pop(0), command=command, say=say))
                if requests.count:
                    _stop(jobs, signal.SIGTERM if requests.count == 1 else signal.SIGKILL)
                for job in list(jobs):
                    if _has_ended(sweep, job):
                        jobs.remove(job)
                        free.append(job.slot)
                        _settle(sweep, job, stopping=requests.count > 0, say=say)
                    elif sweep.config.halving and job.process is not None and not job.halted:
                        _hold_rungs(sweep, job, steps=steps[job.run.point], say=say)
                    elif job.process is None and requests.count:
                        jobs.remove(job)  # not ours to stop
                time.sleep(poll_seconds)
        finally:
            _stop(jobs, signal.SIGKILL)
            for job in jobs:
                if job.process is not None:
                    job.process.wait()
                job.run.status = WAITING
            sweep.write()
    return requests.count > 0


def slots(jobs: int, *, cores: Sequence[int] | None = None, environment: Mapping[str, str] | None = None) -> list[Slot]:
    """This machine in ``jobs`` equal parts; cores or GPUs that are too few for that are shared by all.

    Args:
        cores: those to divide; None: all that this process may use.
        environment: CUDA_VISIBLE_DEVICES counts; None: that of this process.
    """
    environment = os.environ if environment is None else environment
    if cores is None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = visible_gpus(os.listdir("/dev"), environment)
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(gpus)] if chosen is None else [part.strip() for part in chosen.split(",")][:gpus]
    each_cores, each_gpus = len(cores) // jobs, len(names) // jobs
    return [
        Slot(
            cores=tuple(cores[i * each_cores : (i + 1) * each_cores]),
            gpus=",".join(names[i * each_gpus : (i + 1) * each_gpus] if each_gpus else names) if names else None,
        )
        for i in range(jobs)
    ]


def host_slots(launch: LaunchConfig, *, jobs: int, directory: Path) -> list[Slot]:
    """The hosts of ``launch=hostfile`` in ``jobs`` groups of ``launch.nodes`` each.

    Args:
        launch: as one of the runs has it, ``nodes.hosts.shared``.
        directory: gets a hostfile for each group.
    """
    nodes = launch.nodes or 1
    hosts = hosts_of(replace(launch, nodes=None))
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(jobs):
        path = directory.resolve() / f"hosts_{number}"
        group = hosts[number * nodes : (number + 1) * nodes]
        lines = [host.name + ("" if host.slots is None else f" slots={host.slots}") for host in group]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = (f"launch.hostfile={json.dumps(str(path))}", "launch.hosts=null", "launch.nodes=null")
        found.append(Slot(cores=(), gpus=None, words=words))
    return found


def _next(sweep: Sweep) -> Run | None:
    # those that have failed go last: what is wrong with one may be wrong with the machine for a while
    waiting = sorted((run for run in sweep.runs if run.status == WAITING), key=lambda run: run.attempts)
    return waiting[0] if waiting else None


def _begin(sweep: Sweep, run: Run, slot: Slot, *, command: Command, say: Say) -> _Job:
    run.status = RUNNING
    sweep.write()
    if is_running(sweep.run_dir(run)):
        say(f"waits    {run.name}: another process is at work in {sweep.run_dir(run)}")
        return _Job(run, slot, None)
    log = sweep.log(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    # not the working directory first on the path: a user's own secrets.py would be imported
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    if slot.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpus
    words = [*command(run), *slot.words]
    forget(sweep.run_dir(run))
    try:
        with log.open("ab") as file, _bound(slot.cores):
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C is for us, and we tell the runs
            )
    except OSError as error:
        raise LaunchError(f"{run.name} could not be started with {words[0]!r}: {error.strerror}") from error
    return _Job(run, slot, process)


@contextlib.contextmanager
def _bound(cores: Sequence[int]) -> Iterator[None]:
    """What is started inside inherits these cores: from its first instruction on, threads of libraries too."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _has_ended(sweep: Sweep, job: _Job) -> bool:
    if job.process is not None:
        return job.process.poll() is not None
    return not is_running(sweep.run_dir(job.run))


def _settle(sweep: Sweep, job: _Job, *, stopping: bool, say: Say) -> None:
    """Write down how a run ended."""
    run = job.run
    result = read_result(sweep.run_dir(run))
    code = None if job.process is None else job.process.returncode
    if result is not None and code in (0, None):
        run.status, run.note = DONE, ""
        done = sum(each.status == DONE for each in sweep.runs)
        told = f"loss {result.loss:.4f}, {result.seconds:,.0f} s of training ({done}/{len(sweep.runs)})"
        say(f"done     {run.name}: {told}")
    elif job.halted and code == _SAVED:
        run.status = STOPPED
    elif stopping or code is None:
        run.status = WAITING
    else:
        run.attempts += 1
        run.note = _last_words(sweep, run, code=code)
        record = read_record(sweep.run_dir(run))
        is_last = run.attempts > sweep.config.retries or (record is not None and record.final)
        run.status = FAILED if is_last else WAITING
        say(f"{'failed   ' if is_last else 'retried  '}{run.name}: {run.note}")
    sweep.write()


def _hold_rungs(sweep: Sweep, job: _Job, *, steps: int, say: Say) -> None:
    """Ask a run to stop that is worse at a rung than most of those that have come there."""
    run = job.run
    due = [rung for rung in sweep.config.rungs if f"{rung:g}" not in run.rungs]
    if not due:
        return
    loss = loss_at(_lines(sweep, run), step=math.ceil(due[0] * steps))
    if loss is None:
        return
    run.rungs[f"{due[0]:g}"] = loss
    sweep.write()
    within = [sweep.points[run.point].labels[axis] for axis in sweep.config.within]
    rivals = [
        each.rungs[f"{due[0]:g}"]
        for each in sweep.runs
        if f"{due[0]:g}" in each.rungs
        and [sweep.points[each.point].labels[axis] for axis in sweep.config.within] == within
    ]
    staying = max(1, len(rivals) // sweep.config.halving)
    if len(rivals) >= sweep.config.halving and loss > sorted(rivals)[staying - 1]:
        job.halted = True
        run.note = f"loss {loss:.4f} after {due[0]:.0%} of its steps is not among the best {staying} of {len(rivals)}"
        say(f"stopped  {run.name}: {run.note}")
        _stop([job], signal.SIGTERM)


def loss_at(lines: Sequence[dict[str, Any]], *, step: int) -> float | None:
    """Training loss at a step, the mean of the last few lines up to it; None: it is not there yet."""
    trained = [line for line in lines if line.get("loss") is not None]
    if not trained or trained[-1]["step"] < step:
        return None
    before = [line["loss"] for line in trained if line["step"] <= step][-_SMOOTHED_LINES:]
    return sum(before) / len(before) if before else float(trained[0]["loss"])


def _lines(sweep: Sweep, run: Run) -> list[dict[str, Any]]:
    try:
        return read_metrics(sweep.run_dir(run) / "metrics.jsonl")
    except DataError:
        return []


def _last_words(sweep: Sweep, run: Run, *, code: int) -> str:
    """What its log says of the failure, in a line."""
    try:
        lines = sweep.log(run).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [number for number, line in enumerate(lines) if line.startswith("moetrain: ")]
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    if not said:
        return f"{ending}; see {sweep.log(run)}"
    return " ".join(line.strip() for line in lines[said[-1] : said[-1] + 3]).removeprefix("moetrain: ")[:300]


def _stop(jobs: Sequence[_Job], number: signal.Signals) -> None:
    for job in jobs:
        if job.process is None or job.process.poll() is not None:
            continue
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(job.process.pid, number)  # its group: the launcher and whatever it has started
            elif not job.told:
                # the launcher alone, once: it tells its ranks, and a second signal would have it kill them
                job.process.send_signal(number)
                job.told = True


class _StopRequests:
    """Counts SIGINT and SIGTERM in a ``with`` block, instead of what they did before."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _StopRequests:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
