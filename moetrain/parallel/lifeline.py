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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from moetrain.errors import MoetrainError

PARENT_PID = "MOETRAIN_PARENT_PID"
"""Environment variable in which a launcher tells its workers its own process id."""

MEETING_SOCKET = "MOETRAIN_MEETING_SOCKET"
"""Environment variable with the number of the socket on which rank 0 is to keep the store for all ranks: its launcher
has listened on it from the moment it chose the port, so that no other process could take it meanwhile."""

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


def end_as_rank(work: Callable[[Path], int], directory: Path) -> NoReturn:
    """Do a rank's work, leave its error, if there is one, where the launcher looks for it, and end this process.

    Args:
        work: gets the directory; its exit code is the process's. After an error that is 2 where the user can mend the
            fault, else 1.
        directory: RUN_DIR; the error goes to its log/.
    """
    try:
        code = work(directory)
    except BaseException as error:  # some of torch.distributed's are no Exception
        write_error(directory / "log", rank=int(os.environ.get("RANK", "0")), error=error)
        traceback.print_exc()
        code = 2 if isinstance(error, MoetrainError) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: threads that a library left behind, or a process group that waits for a dead rank, would keep us
    # alive, or abort the interpreter's own clean-up
    os._exit(code)


def write_error(log_dir: Path, *, rank: int, error: BaseException) -> None:
    """Leave the error of a rank where the launcher looks for it.

    Args:
        log_dir: RUN_DIR/log.
    """
    content = {"rank": rank, "type": type(error).__name__, "message": str(error),
               "user": isinstance(error, MoetrainError), "time": time.time()}  # fmt: skip
    path = error_path(log_dir, rank=rank)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)
