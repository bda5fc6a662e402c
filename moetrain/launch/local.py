"""This machine: start the N processes of a run, watch them, and tell of the one that failed.

rank 0     stdout -> our terminal (its progress bar stays interactive)   stderr -> RUN_DIR/log/rank_00000.log
rank n     stdout and stderr -> RUN_DIR/log/rank_0000n.log

a worker fails      SIGTERM to the others, SIGKILL after the grace, one LaunchError about the cause
we get a signal     once: SIGTERM to all, they save and exit with 75; twice: SIGKILL to all
we are killed       the kernel kills the workers (parallel/lifeline.py, at the worker's side)
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from moetrain.errors import LaunchError
from moetrain.launch.fault import Ended, find_fault, remove_old_errors
from moetrain.parallel.lifeline import HUNG, PARENT_PID, STOPPED

_POLL_SECONDS = 0.1
# Ctrl-C; kill and most schedulers; SLURM's usual warning before a limit; the terminal was closed.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run without a fault ended."""

    stopped: bool
    """Stopped on request before its last step: the same command resumes. False: it is complete."""


def run_local(
    run_dir: Path,
    *,
    processes: int,
    command: list[str] | None = None,
    on_cpu: bool = False,
    on_poll: Callable[[], None] = lambda: None,
    grace_seconds: float = 10.0,
) -> Outcome:
    """Start one process per rank, and wait for all of them. Nothing of the run is alive afterwards.

    Call it from the main thread (it handles SIGINT and SIGTERM meanwhile) and hold the run directory's ``RunLock``.

    Args:
        run_dir: where run.yaml lies and log/ goes.
        processes: ranks to start.
        command: what each rank runs; None: ``python -m moetrain.train.worker RUN_DIR``.
        on_cpu: hide the GPUs from the ranks.
        on_poll: called about ten times a second meanwhile.
        grace_seconds: time between SIGTERM and SIGKILL for the others when one rank has failed. A stop on request
            has no such limit: saving may take long, and a second signal ends it.

    Raises:
        LaunchError: a process could not be started, failed, or was killed by a second signal.
        MoetrainError: a worker met a fault that the user can mend; its own type and message.
    """
    if processes < 1:
        raise LaunchError(f"launch.processes is {processes}, but a run needs at least 1")
    gpus = 0 if on_cpu else visible_gpus(os.listdir("/dev"), os.environ)
    if 0 < gpus < processes:
        raise LaunchError(f"launch.processes is {processes}, but must be at most the {gpus} GPUs to be seen here")
    log_dir = run_dir / "log"
    log_dir.mkdir(parents=True, exist_ok=True)
    remove_old_errors(log_dir)
    command = command or [sys.executable, "-m", "moetrain.train.worker", str(run_dir)]
    workers: list[_Worker] = []
    with _StopRequests() as requests:
        try:
            _start(workers, command, environment=_environment(processes, on_cpu=on_cpu), log_dir=log_dir)
            never_ready = _watch(workers, requests, on_poll=on_poll, grace_seconds=grace_seconds)
        finally:
            _send(workers, signal.SIGKILL)
            for worker in workers:
                worker.process.wait()
    ended = [worker.ended() for worker in workers]
    if any(e.badly for e in ended) and not never_ready:
        raise find_fault(ended, log_dir=log_dir)
    if requests.count > 1 and any(e.code == -signal.SIGKILL for e in ended):
        raise LaunchError("killed at the second request, before all was saved: the same command resumes an older save")
    return Outcome(stopped=any(e.code != 0 for e in ended))


def default_processes() -> int:
    """Processes for this machine: one per visible NVIDIA GPU, or 2 without GPUs."""
    return visible_gpus(os.listdir("/dev"), os.environ) or 2


def visible_gpus(device_files: Sequence[str], environment: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs a process started with this environment would see, without asking the driver.

    Args:
        device_files: names in /dev.
        environment: CUDA_VISIBLE_DEVICES counts as in CUDA: indices or UUIDs, read up to the first that is not valid.
    """
    present = sum(re.fullmatch(r"nvidia[0-9]+", name) is not None for name in device_files)
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or present == 0:
        return present
    count = 0
    for entry in (part.strip() for part in chosen.split(",")):
        valid = int(entry) < present if entry.isdecimal() else entry.startswith(("GPU-", "MIG-"))
        if not valid:
            break
        count += 1
    return count


@dataclass(kw_only=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    seen: float | None = None
    sent: set[int] = field(default_factory=set)

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None and self.seen is None:
            self.seen = time.time()
        return code

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            self.sent.add(number)
            self.process.send_signal(number)

    def ended(self) -> Ended:
        code = self.poll()
        assert code is not None
        assert self.seen is not None
        return Ended(
            rank=self.rank,
            code=code,
            by_us=-code in self.sent,
            seen=self.seen,
            log=self.log,
            log_start=self.log_start,
        )


class _StopRequests:
    """Counts the SIGINT and SIGTERM that come in a ``with`` block, instead of what they did before."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> _StopRequests:
        self._old = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _start(workers: list[_Worker], command: list[str], *, environment: dict[str, str], log_dir: Path) -> None:
    # A Ctrl-C goes to every process of the terminal. The workers are to get it once, from us, as SIGTERM; they
    # inherit the mask, and a SIGINT that comes meanwhile waits for us.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for rank in range(int(environment["WORLD_SIZE"])):
            log = log_dir / f"rank_{rank:05d}.log"
            with log.open("ab") as file:
                start = file.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    stdout=None if rank == 0 else file,
                    stderr=file,
                )
            workers.append(_Worker(rank=rank, process=process, log=log, log_start=start))
    except OSError as error:
        raise LaunchError(f"rank {rank} could not be started with {command[0]!r}: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _environment(processes: int, *, on_cpu: bool) -> dict[str, str]:
    environment = dict(os.environ)
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # `python -m` puts the working directory first on the path: a user's own secrets.py would be imported by the ranks
    environment["PYTHONSAFEPATH"] = "1"
    # One pool of threads per rank, or all ranks together ask for more cores than there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if visible_gpus(os.listdir("/dev"), environment) == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with warnings
    return environment | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        PARENT_PID: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _watch(
    workers: list[_Worker], requests: _StopRequests, *, on_poll: Callable[[], None], grace_seconds: float
) -> bool:
    """Wait until all have ended, seeing to it that they do.

    Returns:
        Whether a stop was asked for so early that a worker did not yet listen and died of our SIGTERM. The others,
        waiting for it, then fail or are killed: no fault of the run, and there was nothing to save.
    """
    forwarded = never_ready = False
    deadline: float | None = None
    while True:
        codes = [worker.poll() for worker in workers]
        if deadline is None and any(code not in (None, 0, STOPPED) for code in codes):
            never_ready = forwarded and -signal.SIGTERM in codes
            # ranks that hang have said so, and left their stacks: they do not listen any more
            deadline = time.monotonic() + (0.0 if HUNG in codes else grace_seconds)
            _send(workers, signal.SIGTERM)
        if all(code is not None for code in codes):
            return never_ready
        if requests.count > 0 and not forwarded:
            forwarded = True
            _send(workers, signal.SIGTERM)
        if requests.count > 1 or (deadline is not None and time.monotonic() > deadline):
            _send(workers, signal.SIGKILL)
        on_poll()
        time.sleep(_POLL_SECONDS)


def _send(workers: list[_Worker], number: signal.Signals) -> None:
    for worker in workers:
        worker.send(number)
