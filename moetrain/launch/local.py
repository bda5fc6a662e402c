"""This machine: start the N processes of a run, watch them, and tell of the one that failed.

rank 0     stdout -> our terminal (its progress bar stays interactive)   stderr -> RUN_DIR/log/rank_00000.log
rank n     stdout and stderr -> RUN_DIR/log/rank_0000n.log

a worker fails      SIGTERM to the others, SIGKILL after the grace, one LaunchError about the cause
we get a signal     once: SIGTERM to all, they save and exit with 75; twice: SIGKILL to all
we are killed       the kernel kills the workers (parallel/lifeline.py, at the worker's side)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moetrain.errors import LaunchError
from moetrain.launch.fault import find_fault, remove_old_errors
from moetrain.launch.machine.cores import usable_cores, visible_gpus
from moetrain.launch.machine.ranks import Order, Place, StopRequests, listen, run_ranks

WORKER = "moetrain.train.worker"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run without a fault ended."""

    stopped: bool
    """Stopped on request before its last step: the same command resumes. False: it is complete."""
    queued: str = ""
    """Not run yet: what was handed over for later, e.g. ``SLURM job 123``."""


def run_local(
    run_dir: Path,
    *,
    processes: int,
    command: list[str] | None = None,
    on_cpu: bool = False,
    bind_cores: bool = False,
    order: Callable[[], Order] = lambda: Order.GO_ON,
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
        bind_cores: each rank keeps to cores of its own.
        order: what else may ask for a stop, beside signals; asked about ten times a second.
        on_poll: called as often.
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
    listener, port = listen("127.0.0.1")
    with StopRequests() as requests, listener:
        result = run_ranks(
            Place(processes=processes, world_size=processes, master_port=port, listener=listener),
            command or [sys.executable, "-m", WORKER, str(run_dir)],
            environment=machine_environment(processes, on_cpu=on_cpu),
            log_dir=log_dir,
            bind_cores=bind_cores,
            order=lambda: max(order(), requests.order()),
            on_poll=on_poll,
            grace_seconds=grace_seconds,
        )
        asked_twice = max(order(), requests.order()) is Order.KILL
    if result.badly:
        raise find_fault(result.ended, log_dir=log_dir)
    if asked_twice and any(e.code == -signal.SIGKILL for e in result.ended):
        raise LaunchError("killed at the second request, before all was saved: the same command resumes an older save")
    return Outcome(stopped=any(e.code != 0 for e in result.ended))


def machine_environment(processes: int, *, on_cpu: bool = False) -> dict[str, str]:
    """Our environment, as each of so many ranks on this machine should have it."""
    environment = dict(os.environ)
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # `python -m` puts the working directory first on the path: a user's own secrets.py would be imported by the ranks
    environment["PYTHONSAFEPATH"] = "1"
    # One pool of threads per rank, or all ranks together ask for more cores than there are.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(usable_cores()) // processes)))
    if visible_gpus(os.listdir("/dev"), environment) == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with warnings
    return environment
