"""One launcher at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from moetrain.errors import LaunchError


class RunLock:
    """Holds RUN_DIR/lock for the length of a ``with`` block.

    The kernel owns the lock (flock(2)) and lets go of it however the process ends, so a crash leaves nothing to clean
    up. The file stays: removing it would let a third process lock a new file while a second one still holds the old.
    Its text, "PID HOST", is only for the message.

    Raises:
        LaunchError: on entering, when another process holds the lock or the file system cannot lock.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        assert self._file is None, "a RunLock is entered once at a time"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # Not inheritable (Python's default), or a worker left behind would hold the lock of a launcher long gone.
        file = os.open(self.run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(file)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        # Closing alone would not do: a child between fork and exec still has the file open.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)
        self._file = None

    def _take(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, host = os.pread(file, 1024, 0).decode(errors="replace").strip().partition(" ")
            holder = f"process {pid} on {host}" if host else "another process"
            raise LaunchError(
                f"{self.run_dir} is in use by {holder}: wait for it, stop it, or choose another run_dir"
            ) from None
        except OSError as error:
            raise LaunchError(
                f"{self.run_dir / 'lock'} cannot be locked ({error.strerror}), so nothing would keep a second launcher "
                "out: put run_dir on a file system with flock (on Lustre, the mount option 'flock')"
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def is_running(run_dir: Path) -> bool:
    """Whether a launcher holds the run, on this machine or on one that shares the file system."""
    try:
        file = os.open(run_dir / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
