"""The worker's side of the contract with its launcher: it does not outlive it, and tells it how it ended.

A launcher that is killed outright cannot stop its workers: they would go on holding GPUs, or wait for each other in
a collective. So the kernel does it. Uses no torch: a worker calls this before it imports anything slow.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

PARENT_PID = "MOETRAIN_PARENT_PID"
"""Environment variable in which a launcher tells its workers its own process id."""

STOPPED = 75
"""Exit code of a worker that stopped on request, its state saved (EX_TEMPFAIL of sysexits.h: try again later)."""

HUNG = 71
"""Exit code of a worker that stopped because nobody made progress (EX_OSERR of sysexits.h)."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> bool:
    """Have the kernel send SIGKILL to this process when the launcher dies.

    Only Linux can do this (prctl(2), PR_SET_PDEATHSIG), and only a worker whose launcher set MOETRAIN_PARENT_PID and
    started it directly is held: without the variable (started by hand, or by another launcher) and on other systems
    nothing is changed. The tie is to the launcher's thread that started the worker, and it is not passed on to the
    worker's own children.

    Returns:
        Whether this process is now held.

    Raises:
        SystemExit: the launcher is already gone.
        OSError: the kernel refused.
    """
    expected = os.environ.get(PARENT_PID)
    if expected is None or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The launcher may have died before the call above; its death sends no signal any more.
    if os.getppid() != int(expected):
        raise SystemExit(f"the launcher, process {expected}, is not this worker's parent any more: the worker ends")
    return True


def error_path(log_dir: Path, *, rank: int) -> Path:
    """Where a rank leaves its error."""
    return log_dir / f"rank_{rank:05d}.error.json"


def write_error(log_dir: Path, *, rank: int, error: BaseException, user: bool) -> None:
    """Leave the error of a rank where the launcher looks for it.

    Args:
        log_dir: RUN_DIR/log.
        user: whether the fault is one the user can mend.
    """
    content = {"rank": rank, "type": type(error).__name__, "message": str(error), "user": user, "time": time.time()}
    path = error_path(log_dir, rank=rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)
