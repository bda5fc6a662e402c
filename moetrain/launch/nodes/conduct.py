"""The launcher's side of a run on several nodes: start the agents, follow them, and tell how it ended.

It starts one command (the deepspeed launcher, srun) that starts an agent on each node, and then talks to the agents
itself: what they are started with neither passes signals on as needed nor tells which node was at fault.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import ConfigError, LaunchError
from moetrain.launch.fault import NodeLost, find_fault, remove_old_errors
from moetrain.launch.local import Outcome
from moetrain.launch.machine.ranks import POLL_SECONDS, Order, StopRequests
from moetrain.launch.nodes.agent import PROBLEM
from moetrain.launch.nodes.channel import LAUNCHER, Other
from moetrain.launch.nodes.spec import CONSOLE, NodeEnd, Spec, read_ends, request, requested

LAUNCHER_LOG = "launcher.log"
DEFAULT_PORT = 29400
_GRACE_SECONDS = 15.0
"""Besides launch.lost_after_seconds: for what is left of a run that has failed."""
_END_SECONDS = 2.0
"""For the command that started the agents, when they have all ended."""

_HINTS = (
    (r"Permission denied \(", "ssh must work without a password: ssh-copy-id, or an agent; try `ssh HOST true`"),
    (r"Could not resolve hostname|Name or service not known", "the name is known neither to DNS nor to ~/.ssh/config"),
    (r"Host key verification failed", "accept the host's key once: `ssh HOST true`"),
    (r"Connection (refused|timed out)|No route to host", "no sshd answers there: is it up, is launch.ssh_port right"),
    (r"command not found|No such file or directory", "the same virtual environment must lie on every node, same path"),
    (r"ModuleNotFoundError|No module named", "moetrain must be importable on every node, at the same path"),
    (r"not reachable via ssh", "ssh must work without a password from here to every node; try `ssh HOST true`"),
)  # fmt: skip
_FATAL = re.compile(
    rf"ssh exited with exit code 255|not reachable via ssh|{re.escape(PROBLEM)}|launcher .* not installed"
)


def make_spec(
    run_dir: Path,
    launch: LaunchConfig,
    *,
    module: str,
    hosts: Sequence[str],
    master_addr: str,
    environment: Mapping[str, str],
    node_variable: str,
    dropped: Sequence[str] = (),
) -> Spec:
    """What the agents of a run are to do.

    Args:
        launch: resolved.
        hosts: names of the nodes; empty: known only there.
        environment: of the ranks, over what the agents find.
        node_variable: environment variable in which whatever starts the agents tells each its number.
        dropped: variables of the agents that must not reach the ranks.
    """
    return Spec(
        run_dir=str(run_dir.resolve()),
        module=module,
        directory=os.getcwd(),
        hosts=list(hosts),
        nodes=launch.nodes or 1,
        processes=launch.processes or 1,
        bind_cores=launch.bind_cores,
        master_addr=master_addr,
        master_port=launch.master_port or DEFAULT_PORT,
        token=secrets.token_hex(16),
        environment=dict(environment),
        interface=launch.interface,
        interfaces=dict(launch.interfaces or {}),
        lost_after_seconds=launch.lost_after_seconds,
        start_seconds=launch.start_seconds,
        node_variable=node_variable,
        dropped=list(dropped),
    )


def conduct(
    spec: Spec,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    in_job: bool = False,
    on_poll: Callable[[], None] = lambda: None,
) -> Outcome:
    """Start the agents by a command, and wait until nothing of the run is alive any more.

    Args:
        command: starts an agent on each node, and ends after them. Its output goes to RUN_DIR/log/launcher.log.
        environment: of the command.
        in_job: a scheduler sends the signals, and may send them more than once; it kills by itself.
        on_poll: called about ten times a second.

    Raises:
        NodeLost, LaunchError, MoetrainError: as ``start.start``.
    """
    run_dir = Path(spec.run_dir)
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    remove_old_errors(run_dir / "log")
    spec.write()
    log = run_dir / "log" / LAUNCHER_LOG
    with StopRequests() as requests, log.open("wb") as output:
        try:
            # a session of its own: Ctrl-C is for us alone. The working directory: DeepSpeed writes it into a shell line
            process = subprocess.Popen(list(command), env=dict(environment), cwd="/", stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise LaunchError(f"{command[0]} could not be started: {error.strerror}") from error
        follower = _Follower(spec, process, requests, log=log, most=Order.STOP if in_job else Order.KILL)
        try:
            while follower.goes_on():
                on_poll()
                time.sleep(POLL_SECONDS)
        finally:
            follower.end()
            spec.remove()
    return _judge(spec, asked=requests.count, log=log)


class _Follower:
    """Watches the command and the agents until there is nothing left to wait for."""

    def __init__(
        self, spec: Spec, process: subprocess.Popen[bytes], requests: StopRequests, *, log: Path, most: Order
    ) -> None:
        self._spec, self._process, self._requests, self._log, self._most = spec, process, requests, log, most
        self._run_dir = Path(spec.run_dir)
        self._console = Console(self._run_dir / "log" / CONSOLE)
        self._channel: Other | None = None
        self._tried = 0.0
        self._told = Order.GO_ON
        self._looked = 0.0
        self._deadline: float | None = None

    def goes_on(self) -> bool:
        """Look once at everything; false: it is over."""
        self._console.show()
        self._connect()
        self._pass_on()
        now = time.monotonic()
        if self._process.poll() is not None:
            return False
        if now > self._looked + 1.0:
            self._looked = now
            self._look(now)
        return self._deadline is None or now < self._deadline

    def end(self) -> None:
        """Leave nothing behind on this machine, and show what is left to show."""
        # the whole session, and by SIGKILL: at SIGTERM, DeepSpeed's pdsh runner would run `pkill -f` on every host,
        # which ends other runs of this user too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._channel is not None:
            self._channel.tell(Order.END)  # a node that still waits for others would do so for launch.start_seconds
            self._channel.close()
        self._console.show()

    def _connect(self) -> None:
        if self._channel is not None or time.monotonic() < self._tried + 1.0:
            return
        self._tried = time.monotonic()
        try:
            self._channel = Other((self._spec.master_addr, self._spec.master_port), node=LAUNCHER,
                                  token=self._spec.token, lost_after=self._spec.lost_after_seconds,
                                  seconds=0.0, give_up=lambda: True)  # fmt: skip
        except LaunchError:
            return

    def _pass_on(self) -> None:
        order = min(self._most, self._requests.order())
        if order > self._told:
            self._told = order
            if self._channel is not None:
                self._channel.tell(order)
            else:
                request(self._run_dir, kill=order is Order.KILL)
            if order is Order.KILL:
                self._wait_at_most(_GRACE_SECONDS)

    def _look(self, now: float) -> None:
        ends = read_ends(self._spec)
        if 0 in ends:
            # all are done or lost; ssh to a lost one would wait for many minutes
            self._wait_at_most(_END_SECONDS if ends[0].lost else _GRACE_SECONDS)
        elif any(end.lost or end.problem or any(e.badly for e in end.ended) for end in ends.values()):
            self._wait_at_most(self._spec.lost_after_seconds + _GRACE_SECONDS)
        if self._channel is not None and self._channel.lost:
            self._wait_at_most(self._spec.lost_after_seconds + _GRACE_SECONDS)
        has_begun = self._channel is not None and self._channel.port_of_ranks is not None
        if not has_begun and not ends and _FATAL.search(_text(self._log)):
            self._wait_at_most(1.0)

    def _wait_at_most(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)


class Console:
    """Shows what is added to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.is_file() else 0

    def show(self) -> None:
        """Print what has come since."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                new = file.read()
        except OSError:
            return
        if new:
            self._place += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()


def _judge(spec: Spec, *, asked: int, log: Path) -> Outcome:
    """How the run ended, from what the agents have left."""
    ends = read_ends(spec)
    if not any(end.ended or end.lost or end.problem for end in ends.values()):
        if asked or requested(Path(spec.run_dir)) is not Order.GO_ON:
            return Outcome(stopped=True)
        raise LaunchError(f"no node has started; {log} {_last_lines(log)}")
    problems = [end for end in ends.values() if end.user]
    if problems:
        raise ConfigError([f"{problems[0].problem} (on {problems[0].host})"])
    _raise_lost(spec, ends, log=log)
    ended = [each for end in ends.values() for each in end.ended]
    if any(each.badly for each in ended) and not any(end.never_ready for end in ends.values()):
        raise find_fault(ended, log_dir=Path(spec.run_dir) / "log")
    if any(end.killed for end in ends.values()) and any(each.code == -signal.SIGKILL for each in ended):
        raise LaunchError("killed at the second request, before all was saved: the same command resumes an older save")
    return Outcome(stopped=not ended or any(each.code != 0 for each in ended))


def _raise_lost(spec: Spec, ends: Mapping[int, NodeEnd], *, log: Path) -> None:
    first = ends.get(0)
    if first is not None:
        lost = first.lost
    else:
        lost = [0]
    if not lost:
        return
    names = {node: spec.hosts[node] if spec.hosts else f"node {node}" for node in range(spec.nodes)}
    names |= {node: end.host for node, end in ends.items()}
    hosts = [names[node] for node in lost]
    if first is not None and first.problem:
        raise NodeLost(f"{first.problem}; {log} {_last_lines(log)}", hosts=hosts)
    raise NodeLost(
        f"{', '.join(hosts)} is lost: nothing was heard from there for {spec.lost_after_seconds:g} s "
        "(launch.lost_after_seconds), or its part of the run was killed; the other nodes have ended theirs. "
        "The same command goes on from the newest checkpoint, also on fewer nodes (launch.hosts, launch.nodes)",
        hosts=hosts,
    )


def _last_lines(log: Path, *, count: int = 12) -> str:
    text = _text(log)
    hints = [hint for pattern, hint in _HINTS if re.search(pattern, text)]
    lines = [line for line in text.splitlines() if line.strip()][-count:]
    told = "\n    ".join(["ends with:", *lines]) if lines else "is empty"
    return f"{told}\n{hints[0]}" if hints else told


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
