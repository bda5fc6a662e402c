"""Nodes knock at each other's doors, over plain sockets: who answers, and what its clock says. No torch.

Where a node cannot be reached, gloo and NCCL wait for minutes and then name a rank that is not at fault.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from moetrain.preflight.seen.facts import Clock

KNOCK_SECONDS = 5.0
CLOCK_TRIES = 5
_TIME = struct.Struct("!d")


class Listener:
    """Answers every knock with this node's time, for the length of a ``with`` block.

    Args:
        now: the time, in Unix seconds.
    """

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Listener:
        threading.Thread(target=self._answer, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return  # the door was closed
            with visitor, contextlib.suppress(OSError):
                visitor.settimeout(KNOCK_SECONDS)
                visitor.sendall(_TIME.pack(self._now()))


def own_address(master: str) -> str:
    """The address of this host on the way to ``master``: the one that others on that network reach it at."""
    family, kind, protocol, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def knock(address: str, port: int) -> Clock:
    """How far the clock there is ahead of ours.

    Raises:
        OSError: nobody answers.
    """
    sent = time.time()
    with socket.create_connection((address, port), timeout=KNOCK_SECONDS) as door:
        answer = b""
        while len(answer) < _TIME.size:
            part = door.recv(_TIME.size - len(answer))
            if not part:
                raise ConnectionResetError("it hung up")
            answer += part
    now = time.time()
    return Clock(ahead_seconds=_TIME.unpack(answer)[0] - (sent + now) / 2, uncertain_seconds=(now - sent) / 2)


def knock_all(doors: Sequence[tuple[int, str, int]], node: int) -> tuple[Clock | None, dict[int, str]]:
    """Knock at every other node.

    Args:
        doors: number, address and port of each node.
        node: our own number.

    Returns:
        Our clock against that of node 0, None where that is us or does not answer; and why others did not answer.
    """
    silent: dict[int, str] = {}

    def try_one(number: int, address: str, port: int) -> Clock | None:
        try:
            return min((knock(address, port) for _ in range(CLOCK_TRIES if number == 0 else 1)),
                       key=lambda clock: clock.uncertain_seconds)  # fmt: skip
        except OSError as error:
            silent[number] = f"{address}: {error.strerror or error}"
            return None

    # each begins with its neighbour: all at once at node 0 would be a crowd
    others = sorted((door for door in doors if door[0] != node), key=lambda door: (door[0] - node) % (len(doors) + 1))
    with ThreadPoolExecutor(max_workers=16) as pool:
        clocks = list(pool.map(lambda door: try_one(*door), others))
    first = next((clock for door, clock in zip(others, clocks, strict=True) if door[0] == 0), None)
    # the knock says how far node 0 is ahead of us
    own = (
        None if first is None else Clock(ahead_seconds=-first.ahead_seconds, uncertain_seconds=first.uncertain_seconds)
    )
    return own, silent
