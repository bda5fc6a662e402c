"""The nodes of a run, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import ConfigError

_LINE = re.compile(r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:\s+slots=(?P<slots>\d+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int | None
    """Processes it takes; None: not said."""


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file in DeepSpeed's form, ``host slots=n``; # begins a comment, ``slots`` may be left out.

    Raises:
        ConfigError: it cannot be read, is empty, or has lines of another form or a host twice; all of them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"launch.hostfile is '{path}', which cannot be read: {error}"]) from None
    hosts: list[Host] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or match["slots"] == "0":
            problems.append(f"{path}, line {number}, is '{text}', but must be `host slots=n`, e.g. node1 slots=8")
        elif match["host"] in [host.name for host in hosts]:
            problems.append(f"{path}, line {number}, names {match['host']} again: one line for each host")
        else:
            hosts.append(Host(name=match["host"], slots=int(match["slots"]) if match["slots"] else None))
    if not hosts and not problems:
        problems.append(f"{path} names no host: write a line `host slots=n` for each")
    if problems:
        raise ConfigError(problems)
    return hosts


def hosts_of(launch: LaunchConfig) -> list[Host]:
    """The first ``launch.nodes`` of the hosts that ``launch.hostfile`` or ``launch.hosts`` names, or all of them.

    Raises:
        ConfigError: as ``read_hostfile``; or more nodes are asked for than there are.
    """
    if launch.hostfile is not None:
        hosts, source = read_hostfile(Path(launch.hostfile)), launch.hostfile
    else:
        hosts, source = [Host(name=name, slots=None) for name in launch.hosts or []], "launch.hosts"
    if launch.nodes is not None and launch.nodes > len(hosts):
        raise ConfigError([f"launch.nodes is {launch.nodes}, but {source} names {len(hosts)} hosts: use at most those"])
    return hosts[: launch.nodes]


def with_hosts(launch: LaunchConfig) -> LaunchConfig:
    """``launch.nodes`` and ``launch.processes`` filled in from the hosts, where there are any.

    Raises:
        ConfigError: as ``hosts_of``; or the hosts offer different numbers of slots, and no number was given.
    """
    if launch.kind != "hostfile" or bool(launch.hostfile) == bool(launch.hosts):
        return launch
    hosts = hosts_of(launch)
    slots = {host.slots for host in hosts} - {None}
    processes = launch.processes
    if processes is None and len(slots) > 1:
        told = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        raise ConfigError(
            [f"{launch.hostfile} has different slots ({told}), but each node runs as many: set launch.processes"]
        )
    if processes is None and slots:
        processes = slots.pop()
    few = [host for host in hosts if host.slots is not None and processes is not None and host.slots < processes]
    if few:
        raise ConfigError(
            [f"launch.processes is {processes}, but {few[0].name} has slots={few[0].slots} in {launch.hostfile}"]
        )
    return replace(launch, nodes=len(hosts), processes=processes)


def shared(launch: LaunchConfig, *, jobs: int) -> LaunchConfig:
    """As ``with_hosts``, for each of ``jobs`` runs at a time: it has ``launch.nodes`` hosts, or an equal part of all.

    Raises:
        ConfigError: as ``with_hosts``; or there are too few hosts for that.
    """
    if jobs == 1:
        return with_hosts(launch)
    if launch.kind != "hostfile" or bool(launch.hostfile) == bool(launch.hosts):
        return launch
    whole = with_hosts(replace(launch, nodes=None))
    hosts = whole.nodes or 1
    nodes = max(1, hosts // jobs) if launch.nodes is None else launch.nodes
    if jobs * nodes > hosts:
        raise ConfigError(
            [
                f"jobs is {jobs}, each on {nodes} {'host' if nodes == 1 else 'hosts'}, but {hosts} are named: use "
                f"jobs={max(1, hosts // nodes)}, or name more hosts"
            ]
        )
    if launch.master_addr is not None:
        raise ConfigError(
            [
                f"launch.master_addr is {launch.master_addr}, but jobs is {jobs}, and each of so many runs at a time "
                "has a first host of its own: leave it null, or set jobs=1"
            ]
        )
    return replace(whole, nodes=nodes)
