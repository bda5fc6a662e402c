"""The launcher with real processes; the workers are small scripts, so no test imports torch."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moetrain
from moetrain.errors import DataError, LaunchError
from moetrain.launch.local import Outcome, run_local

PRELUDE = """
import json, os, pathlib, signal, sys, time
from moetrain.parallel.lifeline import die_with_parent
held = die_with_parent()  # so a test that fails leaves no process behind
rank, run_dir = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])

def fail(code, **entry):
    entry = {"rank": rank, "user": False, "time": time.time()} | entry
    (run_dir / "log" / f"rank_{rank:05d}.error.json").write_text(json.dumps(entry))
    sys.exit(code)

def ready():
    (run_dir / f"pid_{rank}.tmp").write_text(str(os.getpid()))
    (run_dir / f"pid_{rank}.tmp").rename(run_dir / f"pid_{rank}")

def sleep_until_killed():
    while True:
        time.sleep(1)

def wait_for(rank):
    while not (run_dir / f"pid_{rank}").exists():
        time.sleep(0.01)
"""

# What a rank does (train/loop.py, StopRequest): the signal is noted, the state saved, and the exit code says so.
STOPS_ON_REQUEST = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nready()\nsleep_until_killed()"
IGNORES_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\nsleep_until_killed()"

Workers = Callable[[str], list[str]]
Launcher = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def workers(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    """The command of a worker with this body."""
    monkeypatch.setenv("PYTHONPATH", str(Path(moetrain.__file__).parents[1]))

    def command(body: str) -> list[str]:
        script = run_dir.parent / "worker.py"
        script.write_text(PRELUDE + body)
        return [sys.executable, "-S", str(script), str(run_dir)]  # -S: starts in half the time

    return command


@pytest.fixture
def launcher(run_dir: Path) -> Iterator[Launcher]:
    """Starts a launcher of two ranks in a process of its own, which prints what came of it."""
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], *, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        body = f"""
import pathlib
from moetrain.launch.local import run_local
try:
    print(run_local(pathlib.Path({str(run_dir)!r}), processes=2, command={command!r}), flush=True)
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
"""
        process = subprocess.Popen([sys.executable, "-c", body], stdout=stdout, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def pids(run_dir: Path) -> list[int]:
    """Process ids of both ranks, once both are ready."""
    files = [run_dir / "pid_0", run_dir / "pid_1"]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    # A process killed together with its parent may stay a zombie where nothing adopts orphans.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_every_rank_is_told_its_place_and_its_threads(
    run_dir: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    body = '(run_dir / f"env_{rank}.json").write_text(json.dumps(dict(os.environ)))'
    assert run_local(run_dir, processes=2, command=workers(body)) == Outcome(stopped=False)
    told = [json.loads((run_dir / f"env_{rank}.json").read_text()) for rank in range(2)]
    for rank, env in enumerate(told):
        assert env["RANK"] == env["LOCAL_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "2"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert env["DS_ACCELERATOR"] == "cpu"
        assert env["MOETRAIN_PARENT_PID"] == str(os.getpid())
    assert told[0]["MASTER_PORT"] == told[1]["MASTER_PORT"]
    assert ["MOETRAIN_MEETING_SOCKET" in env for env in told] == [True, False]


def test_the_port_where_the_ranks_meet_is_held_before_rank_0_is_ready(run_dir: Path, workers: Workers) -> None:
    """Another process that takes it in the seconds in which rank 0 imports torch would end the run (EADDRINUSE)."""
    body = """
import errno, socket
where = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
if rank == 1:
    try:
        socket.create_server(where)
    except OSError as error:
        (run_dir / "bind").write_text(errno.errorcode[error.errno])
    socket.create_connection(where, timeout=5).sendall(b"hello")
    ready()
else:
    wait_for(1)
    server = socket.socket(fileno=int(os.environ["MOETRAIN_MEETING_SOCKET"]))
    (run_dir / "heard").write_bytes(server.accept()[0].recv(5))
"""
    assert run_local(run_dir, processes=2, command=workers(body)) == Outcome(stopped=False)
    assert (run_dir / "bind").read_text() == "EADDRINUSE"
    assert (run_dir / "heard").read_bytes() == b"hello"


def test_ranks_on_cpu_see_no_gpu_and_the_launcher_may_look_on_meanwhile(
    run_dir: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    body = (
        'assert os.environ["CUDA_VISIBLE_DEVICES"] == ""\n'
        'assert os.environ["DS_ACCELERATOR"] == "cpu"\n'
        "ready()\nwhile not (run_dir / 'seen').exists(): time.sleep(0.01)"
    )
    # the ranks end only when the launcher has looked on and seen both of them
    seen = lambda: (run_dir / "seen").touch() if len(list(run_dir.glob("pid_?"))) == 2 else None  # noqa: E731
    done = run_local(run_dir, processes=2, command=workers(body), on_cpu=True, on_poll=seen)
    assert done == Outcome(stopped=False)


def test_the_users_own_thread_count_wins(run_dir: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_local(run_dir, processes=1, command=workers('assert os.environ["OMP_NUM_THREADS"] == "7"'))


def test_only_rank_0_speaks_to_the_terminal(run_dir: Path, workers: Workers, capfd: pytest.CaptureFixture[str]) -> None:
    command = workers('print(f"out {rank}"); print(f"err {rank}", file=sys.stderr)')
    run_local(run_dir, processes=2, command=command)
    run_local(run_dir, processes=2, command=command)
    assert capfd.readouterr() == ("out 0\nout 0\n", "")
    assert (run_dir / "log" / "rank_00000.log").read_text() == "err 0\n" * 2
    assert sorted((run_dir / "log" / "rank_00001.log").read_text().split("\n")) == [
        "",
        "err 1",
        "err 1",
        "out 1",
        "out 1",
    ]


def test_rank_0_keeps_an_interactive_terminal(run_dir: Path, workers: Workers, launcher: Launcher) -> None:
    ours, theirs = pty.openpty()
    process = launcher(workers('(run_dir / f"tty_{rank}").write_text(str(sys.stdout.isatty()))'), stdout=theirs)
    assert process.wait(10) == 0
    os.close(theirs)
    os.close(ours)
    assert [(run_dir / f"tty_{rank}").read_text() for rank in range(2)] == ["True", "False"]


def test_the_rank_that_failed_first_is_named_alone_and_all_come_down(run_dir: Path, workers: Workers) -> None:
    body = """
if rank == 1:
    wait_for(0)
    fail(3, type="ValueError", message="the real cause")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready()
while not (run_dir / "log" / "rank_00001.error.json").exists():
    time.sleep(0.01)
time.sleep(0.3)
fail(1, type="RuntimeError", message="connection closed by peer")
"""
    start = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        run_local(run_dir, processes=2, command=workers(body))
    assert time.monotonic() - start < 3
    assert (run_dir / "log" / "rank_00000.error.json").exists()
    assert "rank 1 failed with ValueError: the real cause" in str(caught.value)
    assert "exit code 3" in str(caught.value)
    assert "connection closed" not in str(caught.value)
    assert not alive(int((run_dir / "pid_0").read_text()))


def test_a_rank_killed_from_outside_is_told_with_its_signal(run_dir: Path, workers: Workers) -> None:
    body = """
if rank == 1:
    wait_for(0)
    os.kill(os.getpid(), signal.SIGKILL)
ready()
sleep_until_killed()
"""
    with pytest.raises(LaunchError, match=r"rank 1 ended with SIGKILL \(often out of memory"):
        run_local(run_dir, processes=2, command=workers(body))
    assert not alive(int((run_dir / "pid_0").read_text()))


def test_a_worker_that_ignores_sigterm_is_killed_after_the_grace(run_dir: Path, workers: Workers) -> None:
    command = workers(f"if rank == 1:\n    wait_for(0)\n    sys.exit('no room left')\n{IGNORES_SIGTERM}")
    start = time.monotonic()
    with pytest.raises(LaunchError, match=r"(?s)rank 1 ended with exit code 1; its log .* no room left"):
        run_local(run_dir, processes=2, command=command, grace_seconds=0.5)
    assert 0.5 < time.monotonic() - start < 3
    assert not alive(int((run_dir / "pid_0").read_text()))


def test_a_users_fault_in_a_worker_is_raised_as_such(run_dir: Path, workers: Workers) -> None:
    body = 'fail(2, type="DataError", message="data.text: no such file", user=True)'
    with pytest.raises(DataError) as caught:
        run_local(run_dir, processes=2, command=workers(body))
    assert str(caught.value) == "data.text: no such file"


def test_the_others_of_a_failed_rank_are_asked_before_they_are_killed(run_dir: Path, workers: Workers) -> None:
    body = """
def note(*_):
    (run_dir / "asked").touch()
    sys.exit(1)
if rank == 1:
    wait_for(0)
    sys.exit(4)
signal.signal(signal.SIGTERM, note)
ready()
sleep_until_killed()
"""
    with pytest.raises(LaunchError, match="rank 1 ended with exit code 4"):
        run_local(run_dir, processes=2, command=workers(body))
    assert (run_dir / "asked").exists()


def test_a_sigterm_from_elsewhere_is_a_fault(run_dir: Path, workers: Workers) -> None:
    body = "if rank == 0:\n    os.kill(os.getpid(), signal.SIGTERM)\nsleep_until_killed()"
    with pytest.raises(LaunchError, match="rank 0 ended with SIGTERM; its log"):
        run_local(run_dir, processes=2, command=workers(body))


def test_what_an_earlier_start_left_is_not_told_again(run_dir: Path, workers: Workers) -> None:
    body = 'print("the first time", file=sys.stderr)\nfail(1, type="ValueError", message="the first time")'
    with pytest.raises(LaunchError, match="the first time"):
        run_local(run_dir, processes=1, command=workers(body))
    with pytest.raises(LaunchError, match="rank 0 ended with exit code 4") as caught:
        run_local(run_dir, processes=1, command=workers("sys.exit(4)"))
    assert "the first time" not in str(caught.value)


def test_the_callers_signal_handlers_come_back(run_dir: Path, workers: Workers) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_local(run_dir, processes=1, command=workers(""))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_cannot_be_started_is_told(run_dir: Path) -> None:
    with pytest.raises(LaunchError, match=r"rank 0 could not be started with '/no/such/python': No such file"):
        run_local(run_dir, processes=2, command=["/no/such/python"])
    with pytest.raises(LaunchError, match="at least 1"):
        run_local(run_dir, processes=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_lets_the_workers_save_and_is_no_error(
    run_dir: Path, workers: Workers, launcher: Launcher, number: signal.Signals
) -> None:
    process = launcher(workers(STOPS_ON_REQUEST))
    pids(run_dir)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "Outcome(stopped=True, queued='')\n"


def test_ctrl_c_reaches_the_workers_once_and_as_sigterm(run_dir: Path, workers: Workers, launcher: Launcher) -> None:
    body = """
got = []
def note(number, frame):
    got.append(number)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
ready()
while not got:
    time.sleep(0.01)
time.sleep(0.3)
(run_dir / f"got_{rank}").write_text(" ".join(signal.Signals(n).name for n in got))
sys.exit(75)
"""
    process = launcher(workers(body))
    pids(run_dir)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=20)[0] == "Outcome(stopped=True, queued='')\n"
    assert [(run_dir / f"got_{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]


def test_a_stop_before_the_workers_listen_is_no_error(run_dir: Path, workers: Workers, launcher: Launcher) -> None:
    # Rank 0 waits for rank 1, which SIGTERM ended at once, and fails when the connection breaks.
    body = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    other = None
    while other is None:
        wait_for(1)
        other = int((run_dir / "pid_1").read_text())
    while pathlib.Path(f"/proc/{other}").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    fail(1, type="RuntimeError", message="connection closed by peer")
ready()
sleep_until_killed()
"""
    process = launcher(workers(body))
    pids(run_dir)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "Outcome(stopped=True, queued='')\n"


def test_a_run_that_completes_in_spite_of_a_stop_request_is_complete(
    run_dir: Path, workers: Workers, launcher: Launcher
) -> None:
    process = launcher(workers("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nready()\nsleep_until_killed()"))
    pids(run_dir)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "Outcome(stopped=False, queued='')\n"


def test_a_fault_while_saving_after_a_stop_request_is_told(run_dir: Path, workers: Workers, launcher: Launcher) -> None:
    body = """
def save(*_):
    if rank == 1:
        fail(1, type="OSError", message="disk full")
    time.sleep(0.5)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
ready()
sleep_until_killed()
"""
    process = launcher(workers(body))
    pids(run_dir)
    process.send_signal(signal.SIGTERM)
    assert "LaunchError: rank 1 failed with OSError: disk full" in process.communicate(timeout=20)[0]


def test_a_second_request_kills_at_once(run_dir: Path, workers: Workers, launcher: Launcher) -> None:
    process = launcher(workers(IGNORES_SIGTERM))
    started = pids(run_dir)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "LaunchError: killed at the second request" in process.communicate(timeout=20)[0]
    assert not any(map(alive, started))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a process to its parent")
def test_workers_vanish_with_a_launcher_that_is_killed(run_dir: Path, workers: Workers, launcher: Launcher) -> None:
    process = launcher(workers(f"assert held\n{IGNORES_SIGTERM}"))
    started = pids(run_dir)
    assert all(map(alive, started))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, started)), seconds=2)
