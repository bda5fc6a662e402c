"""The processes of a run on one machine: started, watched, and never left behind.

a worker fails      SIGTERM to the others here, SIGKILL after the grace
an order comes      STOP: SIGTERM, they save and exit with 75; END: as if one had failed; KILL: SIGKILL at once
we are killed       the kernel kills the workers (parallel/lifeline.py, at the worker's side)
"""

from __future__ import annotations

import enum
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from moetrain.errors import LaunchError
from moetrain.launch.fault import Ended
from moetrain.launch.machine.cores import bind
from moetrain.parallel.lifeline import HUNG, MEETING_SOCKET, PARENT_PID, STOPPED

POLL_SECONDS = 0.1
# Ctrl-C; kill and most schedulers; SLURM's usual warning before a limit; the terminal was closed.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Order(enum.IntEnum):
    """What the workers are to do now, whatever they are doing."""

    GO_ON = 0
    STOP = 1
    """Save, then exit."""
    END = 2
    """The run has failed elsewhere: exit, or be killed after the grace."""
    KILL = 3
    """Be killed now."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which ranks of a run are on this machine, and where all of them meet."""

    processes: int
    first_rank: int = 0
    world_size: int
    master_addr: str = "127.0.0.1"
    master_port: int
    listener: socket.socket | None = None
    """Listens on that port, if rank 0 is on this machine: it gets it, and here it is closed."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the workers of this machine ended."""

    ended: list[Ended]
    never_ready: bool
    """A stop was asked for so early that a worker did not yet listen and died of our SIGTERM. The others, waiting for
    it, then fail or are killed: no fault of the run, and there was nothing to save."""

    @property
    def badly(self) -> bool:
        """Whether a worker here failed, and not for having been stopped too early."""
        return any(e.badly for e in self.ended) and not self.never_ready


def run_ranks(
    place: Place,
    command: list[str],
    *,
    environment: dict[str, str],
    log_dir: Path,
    console: Path | None = None,
    bind_cores: bool = False,
    order: Callable[[], Order],
    on_fault: Callable[[], None] = lambda: None,
    on_poll: Callable[[], None] = lambda: None,
    grace_seconds: float = 10.0,
) -> Result:
    """Start the workers of this machine and wait for all of them. None of them is alive afterwards.

    Args:
        command: what each of them runs.
        environment: of each, without what tells it its rank.
        log_dir: gets a file for the output of each; of rank 0 stdout goes elsewhere.
        console: where stdout of rank 0 is appended to; None: it is ours.
        bind_cores: each gets cores of its own.
        order: asked about ten times a second.
        on_fault: called once when the first of them fails.
        on_poll: called as often.
        grace_seconds: time between SIGTERM and SIGKILL for the others when one has failed. A stop on request has no
            such limit: saving may take long, and a second request ends it.

    Raises:
        LaunchError: a process could not be started.
    """
    workers: list[_Worker] = []
    try:
        _start(workers, place, command, environment=environment, log_dir=log_dir, console=console)
        if bind_cores:
            bind([worker.process.pid for worker in workers])
        never_ready = _watch(workers, order, on_fault=on_fault, on_poll=on_poll, grace_seconds=grace_seconds)
    finally:
        _send(workers, signal.SIGKILL)
        for worker in workers:
            worker.process.wait()
    return Result(ended=[worker.ended() for worker in workers], never_ready=never_ready)


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


class StopRequests:
    """Counts the signals that ask for a stop in a ``with`` block, instead of what they did before."""

    def __init__(self) -> None:
        self.count = 0
        self.last: int | None = None
        """Number of the last one."""

    def __enter__(self) -> StopRequests:
        self._old = {number: signal.signal(number, self._note) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def order(self) -> Order:
        """One request: stop; more: kill."""
        return (Order.GO_ON, Order.STOP, Order.KILL)[min(2, self.count)]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = number


def listen(address: str) -> tuple[socket.socket, int]:
    """A socket for ``Place.listener`` and its port, of the system's choice; with address "" open to other machines.

    A port that is only looked up, and listened on seconds later, some other process may have taken by then.
    """
    listener = socket.create_server((address, 0), backlog=socket.SOMAXCONN)
    port: int = listener.getsockname()[1]
    return listener, port


def _start(
    workers: list[_Worker],
    place: Place,
    command: list[str],
    *,
    environment: dict[str, str],
    log_dir: Path,
    console: Path | None,
) -> None:
    environment = environment | {
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.processes),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        PARENT_PID: str(os.getpid()),
    }
    # A Ctrl-C goes to every process of the terminal. The workers are to get it once, from us, as SIGTERM; they
    # inherit the mask, and a SIGINT that comes meanwhile waits for us.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for local in range(place.processes):
            rank = place.first_rank + local
            log = log_dir / f"rank_{rank:05d}.log"
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(local)}
            listener = place.listener if rank == 0 else None
            workers.append(_start_one(rank, command, environment=own, log=log, console=console, listener=listener))
    except OSError as error:
        raise LaunchError(f"rank {rank} could not be started with {command[0]!r}: {error.strerror}") from error
    finally:
        if place.listener is not None:
            # were it open here, the others would wait for an answer from a rank 0 that is dead
            place.listener.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _start_one(
    rank: int,
    command: list[str],
    *,
    environment: dict[str, str],
    log: Path,
    console: Path | None,
    listener: socket.socket | None,
) -> _Worker:
    handed = () if listener is None else (listener.fileno(),)
    if listener is not None:
        environment = environment | {MEETING_SOCKET: str(listener.fileno())}
    with log.open("ab") as file, (console or Path(os.devnull)).open("ab") as shown:
        start = file.seek(0, os.SEEK_END)
        ours = None if console is None else shown
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=None if rank == 0 and console is None else subprocess.DEVNULL,
            stdout=ours if rank == 0 else file,
            stderr=file,
            pass_fds=handed,
        )
    return _Worker(rank=rank, process=process, log=log, log_start=start)


def _watch(
    workers: Sequence[_Worker],
    order: Callable[[], Order],
    *,
    on_fault: Callable[[], None],
    on_poll: Callable[[], None],
    grace_seconds: float,
) -> bool:
    """Wait until all have ended, seeing to it that they do.

    Returns:
        As ``Result.never_ready``.
    """
    forwarded = never_ready = False
    deadline: float | None = None
    while True:
        codes = [worker.poll() for worker in workers]
        wanted = order()
        if deadline is None and (wanted is Order.END or any(code not in (None, 0, STOPPED) for code in codes)):
            never_ready = forwarded and -signal.SIGTERM in codes
            # ranks that hang have said so, and left their stacks: they do not listen any more
            deadline = time.monotonic() + (0.0 if HUNG in codes else grace_seconds)
            _send(workers, signal.SIGTERM)
            on_fault()
        if all(code is not None for code in codes):
            return never_ready
        if wanted is not Order.GO_ON and not forwarded:
            forwarded = True
            _send(workers, signal.SIGTERM)
        if wanted is Order.KILL or (deadline is not None and time.monotonic() > deadline):
            _send(workers, signal.SIGKILL)
        on_poll()
        time.sleep(POLL_SECONDS)


def _send(workers: Sequence[_Worker], number: signal.Signals) -> None:
    for worker in workers:
        worker.send(number)
