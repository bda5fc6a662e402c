"""The agents of a run hear each other: every node is connected to the first, and each says once a second that it lives.

    agents 1, 2, …  --hello, alive, order, done-->   agent 0   --start, alive, order-->  agents 1, 2, …
    launcher        --hello, order, bye-->           agent 0

JSON, a message a line, over TCP. Whoever connects must show the token of the run first. A node that is not heard for
``lost_after`` seconds, or whose connection breaks before it is done, is lost, and the others end the run: the ranks
themselves would wait in a collective until its own time limit. A launcher that vanishes makes the run save and stop.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from moetrain.errors import LaunchError
from moetrain.launch.machine.ranks import Order

LAUNCHER = -1
_BEAT_SECONDS = 1.0
_LONGEST_LINE = 4096


class Peer:
    """One connection, read in a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.heard = time.monotonic()
        self._socket = connection
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = connection.makefile("rb")
        self._lock = threading.Lock()

    def receive(self) -> dict[str, Any] | None:
        """The next message; None: the connection is gone, or what comes is none of ours."""
        try:
            line = self._file.readline(_LONGEST_LINE)
            message = json.loads(line)
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        return message if isinstance(message, dict) else None

    def send(self, **message: Any) -> None:
        """Send a message; one to a peer that is gone goes nowhere, and its silence tells."""
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class First:
    """The side of node 0.

    Args:
        nodes: how many there are.
        lost_after: seconds of silence after which a node is lost.
        port_of_ranks: where the ranks are to meet on this machine.

    Raises:
        LaunchError: the port is in use.
    """

    def __init__(self, port: int, *, nodes: int, token: str, lost_after: float, port_of_ranks: int) -> None:
        self.order = Order.GO_ON
        self.lost: set[int] = set()
        self.port_of_ranks = port_of_ranks
        self.ahead = 0.0
        self._token, self._nodes, self._lost_after = token, nodes, lost_after
        self._peers: dict[int, Peer] = {}
        self._done: set[int] = set()
        self._started = self._closed = False
        self._lock = threading.Lock()
        try:
            self._server = socket.create_server(("", port), backlog=nodes + 8)
        except OSError as error:
            raise LaunchError(
                f"launch.master_port is {port}, which the first node cannot listen on ({error.strerror}): if an "
                "earlier run still holds it, end that one; or choose another port"
            ) from error
        for work in (self._accept, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def missing(self) -> list[int]:
        """Nodes that have not come yet."""
        with self._lock:
            return [node for node in range(1, self._nodes) if node not in self._peers]

    def give_up(self) -> list[int]:
        """Count those that have not come as lost, and end the run on the others; returns them."""
        missing = self.missing()
        for node in missing:
            self._lose(node)
        return missing

    def begin(self) -> None:
        """Tell all that all are here."""
        self._started = True
        self._send_all(start=self.port_of_ranks)

    def tell(self, order: Order) -> None:
        """Order all nodes, this one too."""
        with self._lock:
            if order <= self.order:
                return
            self.order = order
        self._send_all(order=int(order))

    def wait_for_others(self) -> None:
        """Return when every other node is done or lost."""
        while True:
            with self._lock:
                if len(self._done | self.lost) >= self._nodes - 1:
                    return
            time.sleep(0.05)

    def close(self) -> None:
        """Part from all."""
        self._closed = True
        self._server.close()
        for peer in list(self._peers.values()):
            peer.close()

    def _send_all(self, **message: Any) -> None:
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.send(**message)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(Peer(connection),), daemon=True).start()

    def _serve(self, peer: Peer) -> None:
        hello = peer.receive() or {}
        node = hello.get("hello")
        if not isinstance(node, int) or not hmac.compare_digest(str(hello.get("token")), self._token):
            peer.close()
            return
        with self._lock:
            self._peers[node] = peer
        peer.send(welcome=time.time())
        if self._started:
            peer.send(start=self.port_of_ranks)
        said_bye = False
        while (message := peer.receive()) is not None:
            if "order" in message:
                self.tell(Order(message["order"]))
            said_bye = said_bye or "bye" in message
            if "done" in message:
                with self._lock:
                    self._done.add(node)
        if self._closed or said_bye:
            return
        if node == LAUNCHER:
            self.tell(Order.STOP)
        elif node not in self._done:
            self._lose(node)

    def _beat(self) -> None:
        while not self._closed:
            self._send_all(alive=1)
            with self._lock:
                silent = [
                    node
                    for node, peer in self._peers.items()
                    if node not in self._done | self.lost | {LAUNCHER}
                    and time.monotonic() - peer.heard > self._lost_after
                ]
            for node in silent:
                self._lose(node)
            time.sleep(_BEAT_SECONDS)

    def _lose(self, node: int) -> None:
        with self._lock:
            self.lost.add(node)
        self.tell(Order.END)


class Other:
    """The side of every other node, and of the launcher.

    Args:
        node: number of this node; ``LAUNCHER``: none.
        seconds: how long to try to reach the first node.
        give_up: asked meanwhile; true: do not try any longer.

    Raises:
        LaunchError: the first node cannot be reached.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        node: int,
        token: str,
        lost_after: float,
        seconds: float,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.order = Order.GO_ON
        self.lost: set[int] = set()
        self.port_of_ranks: int | None = None
        self.ahead = 0.0
        self._node, self._lost_after = node, lost_after
        self._done = self._closed = False
        self._peer = Peer(_reach(address, seconds=seconds, give_up=give_up))
        sent = time.time()
        self._peer.send(hello=node, token=token)
        self._sent = sent
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, order: Order) -> None:
        """Order all nodes, by way of the first."""
        self.order = max(self.order, order)
        self._peer.send(order=int(order))

    def done(self) -> None:
        """Tell that nothing of the run is alive on this node."""
        self._done = True
        self._peer.send(done=self._node)

    def close(self) -> None:
        """Part from the first node."""
        self._closed = True
        self._peer.send(bye=1)
        self._peer.close()

    def _listen(self) -> None:
        while (message := self._peer.receive()) is not None:
            if "welcome" in message:
                self.ahead = (self._sent + time.time()) / 2 - message["welcome"]
            if "start" in message:
                self.port_of_ranks = message["start"]
            if "order" in message:
                self.order = max(self.order, Order(message["order"]))
        self._lose()

    def _beat(self) -> None:
        while not (self._closed or self._done):
            self._peer.send(alive=1)
            if time.monotonic() - self._peer.heard > self._lost_after:
                self._lose()
            time.sleep(_BEAT_SECONDS)

    def _lose(self) -> None:
        if not (self._closed or self._done):
            self.lost.add(0)
            self.order = max(self.order, Order.END)


def _reach(address: tuple[str, int], *, seconds: float, give_up: Callable[[], bool]) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, timeout=5.0)
        except OSError as error:
            if time.monotonic() > deadline or give_up():
                raise LaunchError(
                    f"the first node cannot be reached at {address[0]}, port {address[1]} ({error}): set "
                    "launch.master_addr to an address that all nodes reach, and let them talk to each other"
                ) from error
        time.sleep(0.2)
