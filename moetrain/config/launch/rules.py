"""Rules of ``launch.*``: field, value, rule, a way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moetrain.config.launch.settings import LaunchConfig

_HOST = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_TIME = r"\d+(:\d{1,2}){0,2}|\d+-\d+(:\d{1,2}){0,2}"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?"
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_RESOURCE = r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"


def broken_rules(launch: LaunchConfig) -> Iterator[str]:
    """Every broken rule of the launchers, each a sentence."""
    yield from _kind(launch)
    yield from _words(launch)
    if launch.kind == "slurm":
        yield from _slurm(launch)
    if launch.kind == "kubernetes":
        yield from _kubernetes(launch)


def _kind(launch: LaunchConfig) -> Iterator[str]:
    if launch.kind == "local" and (launch.nodes or 1) > 1:
        yield (
            f"launch.nodes is {launch.nodes}, but launch.kind=local is this machine alone: use launch=hostfile, "
            "launch=slurm or launch=kubernetes, or launch.nodes=1"
        )
    named = [name for name in ("hostfile", "hosts") if getattr(launch, name)]
    if launch.kind != "hostfile":
        for name in named:
            yield f"launch.{name} is set, but launch.kind is {launch.kind}, which does not read it: use launch=hostfile"
    elif len(named) != 1:
        told = "both set" if named else "both null"
        yield f"launch.hostfile and launch.hosts are {told}, but one must name the nodes, e.g. launch.hosts=[a,b]"
    for interface_of in launch.interfaces or {}:
        if launch.hosts and interface_of not in launch.hosts:
            yield (
                f"launch.interfaces names the host '{interface_of}', which is not in launch.hosts, "
                f"{', '.join(launch.hosts)}: use one of them"
            )


def _words(launch: LaunchConfig) -> Iterator[str]:
    """What ends up in a command or a file of others must have no second meaning there."""
    checked: list[tuple[str, str, str]] = []
    checked += [("launch.hosts", each, _HOST) for each in launch.hosts or []]
    checked += [("launch.export", each, r"[A-Za-z_*?][A-Za-z0-9_*?]*") for each in launch.export or []]
    checked += [("launch.interfaces", each, r"[\w.:,=^-]+") for each in (launch.interfaces or {}).values()]
    checked += [("launch.interface", launch.interface or "x", r"[\w.:,=^-]+")]
    checked += [("launch.master_addr", launch.master_addr or "x", r"[A-Za-z0-9._:-]+")]
    for name, value, pattern in checked:
        if not re.fullmatch(pattern, value, re.ASCII):
            yield f"{name} has {value!r}, but must match {pattern}: write it without spaces and signs of a shell"
    if launch.hosts and len(set(launch.hosts)) < len(launch.hosts):
        yield f"launch.hosts is {launch.hosts}, but each host may be named once: use launch.processes for more on each"
    for name in ("master_port", "ssh_port"):
        port = getattr(launch, name)
        if port is not None and not 0 < port < 65536:
            yield f"launch.{name} is {port}, but must lie between 1 and 65535"


def _slurm(launch: LaunchConfig) -> Iterator[str]:
    slurm = launch.slurm
    if slurm.time is not None and not re.fullmatch(_TIME, slurm.time, re.ASCII):
        yield (
            f"launch.slurm.time is '{slurm.time}', but must be MINUTES, HOURS:MINUTES:SECONDS or "
            "DAYS-HOURS:MINUTES:SECONDS, e.g. 1-12:00:00"
        )
    if slurm.save_seconds > 65535:
        yield f"launch.slurm.save_seconds is {slurm.save_seconds}, but must be at most 65535, which is SLURM's limit"
    for name in ("partition", "account", "qos", "memory"):
        value = getattr(slurm, name)
        if value is not None and not re.fullmatch(r"[\w.,:+@-]+", value, re.ASCII):
            yield f"launch.slurm.{name} is {value!r}, but must be a word of letters, digits and . , : + @ _ -"
    for line in slurm.extra or []:
        if not re.fullmatch(r"--?[A-Za-z][\x20-\x7e]*", line):
            yield f"launch.slurm.extra has {line!r}, but each text must be an option of sbatch, e.g. '--exclusive'"
    for line in slurm.setup or []:
        if "\n" in line or "\0" in line:
            yield f"launch.slurm.setup has {line!r}, but each text must be one line"


def _kubernetes(launch: LaunchConfig) -> Iterator[str]:
    given = launch.kubernetes
    for name, why in (("image", "an image with moetrain in it"), ("volume_claim", "a claim that all nodes can write")):
        if not getattr(given, name):
            yield f"launch.kubernetes.{name} is null, but must name {why}"
    patterns = (("namespace", _LABEL), ("volume_claim", _LABEL), ("secret", _LABEL), ("mount", r"/[\w./-]*[\w-]"),
                ("gpu_resource", _RESOURCE), ("rdma_resource", _RESOURCE), ("shared_memory", _QUANTITY),
                ("cpu", _QUANTITY), ("memory", _QUANTITY), ("image", r"[\w.:/@-]+"))  # fmt: skip
    for name, pattern in patterns:
        value = getattr(given, name)
        if value and not re.fullmatch(pattern, value, re.ASCII):
            yield f"launch.kubernetes.{name} is {value!r}, but must match {pattern}"
