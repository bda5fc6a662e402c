"""One node of a run on several: ``python -m moetrain.launch.nodes.agent SPEC``, one process on each.

Whatever starts it (the deepspeed launcher, srun, Kubernetes), it meets the other nodes (channel.py), starts this node's
ranks as ``launch=local`` does, ends them when a rank fails or a node is lost anywhere, and writes how they ended.
Exit codes: 0 finished, 75 stopped on request and saved, 1 failed.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moetrain.errors import LaunchError
from moetrain.launch.fault import remove_old_errors
from moetrain.launch.local import machine_environment
from moetrain.launch.machine.cores import visible_gpus
from moetrain.launch.machine.ranks import POLL_SECONDS, Order, Place, Result, StopRequests, listen, run_ranks
from moetrain.launch.nodes.channel import First, Other
from moetrain.launch.nodes.spec import (
    CONSOLE,
    SPEC_FILE,
    NodeEnd,
    Spec,
    from_word,
    launch_directory,
    read_spec,
    remove_old_ends,
    requested,
)
from moetrain.parallel.lifeline import STOPPED

PROBLEM = "moetrain node: "
"""What a line begins with that tells why a node could not begin."""

_FILE_SECONDS = 1.0


def main(words: Sequence[str]) -> int:
    """Run this node's part of a run; returns the exit code."""
    try:
        spec = read_spec(from_word(words[0]))
        node = _number(os.environ, spec)
        if spec.unattended and node == 0:
            remove_old_ends(Path(spec.run_dir))
            remove_old_errors(Path(spec.run_dir) / "log")
        spec = replace(spec, master_addr=spec.master_addr or os.environ["MASTER_ADDR"])
        with StopRequests() as requests:
            end = _Node(spec, node=node, requests=requests).run()
    except LaunchError as error:
        print(f"{PROBLEM}{socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return 1
    if end.problem:
        print(f"{PROBLEM}{end.host}: {end.problem}", file=sys.stderr, flush=True)
    codes = {each.code for each in end.ended}
    if end.problem or end.lost or not codes <= {0, STOPPED}:
        return 1
    if STOPPED in codes and not (spec.unattended and requested(Path(spec.run_dir)) is not Order.GO_ON):
        return STOPPED
    return 0


@dataclass(kw_only=True)
class _Order:
    """What this node is to do: its own signals, the others' word, and on the first node the request file."""

    spec: Spec
    channel: First | Other
    requests: StopRequests
    told: Order = Order.GO_ON
    read_at: float = 0.0
    in_file: Order = Order.GO_ON

    def __call__(self) -> Order:
        if isinstance(self.channel, First) and time.monotonic() > self.read_at + _FILE_SECONDS:
            self.in_file, self.read_at = requested(Path(self.spec.run_dir)), time.monotonic()
        # a scheduler that ends a job sends SIGTERM to every node, and more than once: only the file and the launcher
        # can ask for a kill
        own = min(Order.STOP, self.requests.order())
        order = max(self.channel.order, own, self.in_file)
        if order > self.told:
            self.told = order
            self.channel.tell(order)
        return order


class _Node:
    def __init__(self, spec: Spec, *, node: int, requests: StopRequests) -> None:
        self._spec, self._node, self._requests = spec, node, requests
        self._host = spec.hosts[node] if spec.hosts else os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._run_dir = Path(spec.run_dir)
        self._log_dir = self._run_dir / "log"
        self._looked_at, self._is_off = time.monotonic(), False
        self._listener: socket.socket | None = None

    def run(self) -> NodeEnd:
        """Meet the others, run the ranks, part, and leave word of it."""
        channel = self._connect()
        try:
            end = self._run(channel)
            if isinstance(channel, Other):
                end.write(self._spec)
                channel.done()
                return end
            if end.problem or any(each.code not in (0, STOPPED) for each in end.ended):
                channel.tell(Order.END)
            # the first node's word is the last: it knows of all the others
            channel.wait_for_others()
            if not end.never_ready:
                end = replace(end, lost=sorted(channel.lost | set(end.lost)))
            end.write(self._spec)
            return end
        finally:
            channel.close()

    def _connect(self) -> First | Other:
        spec = self._spec
        if self._node == 0:
            self._listener, port = listen("")
            try:
                return First(spec.master_port, nodes=spec.nodes, token=spec.token, lost_after=spec.lost_after_seconds,
                             port_of_ranks=port)  # fmt: skip
            except LaunchError as error:
                self._end(problem=str(error), user=True).write(self._spec)
                raise
        return Other((spec.master_addr, spec.master_port), node=self._node, token=spec.token,
                     lost_after=spec.lost_after_seconds, seconds=spec.start_seconds,
                     give_up=lambda: self._requests.count > 0 or self._called_off())  # fmt: skip

    def _run(self, channel: First | Other) -> NodeEnd:
        spec, order = self._spec, _Order(spec=self._spec, channel=channel, requests=self._requests)
        port = self._meet(channel, order)
        if port is None:
            has_time = order() is Order.GO_ON and not self._called_off()
            missing = channel.give_up() if isinstance(channel, First) else []
            if missing and has_time:
                named = ", ".join(self._name(node) for node in missing)
                told = f"{named} did not start within {spec.start_seconds:g} s (launch.start_seconds)"
                return self._end(problem=told, lost=missing)
            # a stop that comes before all are here: nobody is lost, and there is nothing to save
            return self._end(never_ready=True) if not has_time else self._end(lost=sorted(channel.lost))
        environment = self._environment()
        gpus = visible_gpus(os.listdir("/dev"), environment)
        if 0 < gpus < spec.processes:
            channel.tell(Order.END)
            told = f"launch.processes is {spec.processes}, but must be at most the {gpus} GPUs of {self._host}"
            return self._end(problem=told, user=True)
        try:
            os.chdir(spec.directory)
            result = self._ranks(channel, order, port=port, environment=environment)
        except (LaunchError, OSError) as error:
            channel.tell(Order.END)
            return self._end(problem=str(error), user=True)
        ended = [replace(each, ahead=channel.ahead) for each in result.ended]
        return replace(
            self._end(lost=sorted(channel.lost), never_ready=result.never_ready),
            ended=ended,
            killed=order() is Order.KILL,
        )

    def _meet(self, channel: First | Other, order: _Order) -> int | None:
        """Wait for all nodes; returns the port on which the ranks meet, or None when it did not come to that."""
        deadline = time.monotonic() + self._spec.start_seconds + (0 if self._node == 0 else 30)
        while time.monotonic() < deadline and order() is Order.GO_ON and not self._called_off():
            if isinstance(channel, First) and not channel.missing():
                channel.begin()
                return channel.port_of_ranks
            if isinstance(channel, Other) and channel.port_of_ranks is not None:
                return channel.port_of_ranks
            time.sleep(POLL_SECONDS)
        return None

    def _called_off(self) -> bool:
        """Whether the launcher, which takes its file away when it ends, has given up before all were here."""
        if time.monotonic() > self._looked_at + _FILE_SECONDS and not self._spec.unattended:
            self._looked_at = time.monotonic()
            try:
                self._is_off = read_spec(launch_directory(self._run_dir) / SPEC_FILE).token != self._spec.token
            except LaunchError:
                self._is_off = True
        return self._is_off

    def _ranks(self, channel: First | Other, order: _Order, *, port: int, environment: dict[str, str]) -> Result:
        spec = self._spec
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return run_ranks(
            Place(
                processes=spec.processes,
                first_rank=self._node * spec.processes,
                world_size=spec.nodes * spec.processes,
                master_addr=spec.master_addr,
                master_port=port,
                listener=self._listener,
            ),
            [sys.executable, "-m", spec.module, spec.run_dir],
            environment=environment,
            log_dir=self._log_dir,
            console=self._log_dir / CONSOLE,
            bind_cores=spec.bind_cores,
            order=order,
            on_fault=lambda: channel.tell(Order.END),
        )

    def _environment(self) -> dict[str, str]:
        spec = self._spec
        for name in spec.dropped:
            os.environ.pop(name, None)
        os.environ.update(spec.environment)
        interface = spec.interfaces.get(self._host, spec.interface)
        if interface is not None:
            os.environ.update({"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface})
        return machine_environment(spec.processes)

    def _name(self, node: int) -> str:
        return self._spec.hosts[node] if self._spec.hosts else f"node {node}"

    def _end(
        self, *, problem: str = "", user: bool = False, lost: Sequence[int] = (), never_ready: bool = False
    ) -> NodeEnd:
        return NodeEnd(node=self._node, host=self._host, ended=[], never_ready=never_ready, lost=list(lost),
                       problem=problem, user=user)  # fmt: skip


def _number(environment: Mapping[str, str], spec: Spec) -> int:
    told = environment.get(spec.node_variable, "")
    if not (told.isdecimal() and int(told) < spec.nodes):
        raise LaunchError(
            f"{spec.node_variable} is '{told}', but must be the number of this node, below launch.nodes, {spec.nodes}: "
            "it was started by something else than moetrain's launcher"
        )
    return int(told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
