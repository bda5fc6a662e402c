from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import moetrain
from moetrain.errors import LaunchError
from moetrain.launch.lock import RunLock

# The child says that it is up, so it is past exec and has what it inherits.
HOLDER = """
import pathlib, subprocess, sys, time
from moetrain.launch.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    child = [sys.executable, "-S", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    subprocess.run(child, close_fds=False)
"""


def test_a_run_directory_is_refused_while_another_process_holds_it_and_free_after_its_death(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as holder:
        assert holder.stdout is not None
        its_child = int(holder.stdout.readline())
        expected = f"{tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(LaunchError, match=expected), RunLock(tmp_path / "run"):
            pass
        holder.kill()
        holder.wait()
        with (tmp_path / "run" / "lock").open("a") as file:
            file.write("a long name of a host that is not ours")
        try:
            os.kill(its_child, 0)  # still there, so it did not inherit the lock
            with RunLock(tmp_path / "run"):
                assert (tmp_path / "run" / "lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"
        finally:
            os.kill(its_child, signal.SIGKILL)


def test_a_lock_can_be_taken_again_after_the_block(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    for _ in range(2):
        with lock, pytest.raises(LaunchError, match="in use"), RunLock(tmp_path):
            pass


def test_a_file_system_that_cannot_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LaunchError, match=r"cannot be locked \(Function not implemented\)"), RunLock(tmp_path):
        pass
