"""One rank of the preflight: ``python -m moetrain.preflight.node PLACE``, started as the worker is.

    the first rank of each node   reads its facts, knocks at every other node
    rank 0                        hears them all, names who is missing or cannot be reached, and says whether to go on
    all ranks                     join as in training, and measure

The first part needs a store and plain sockets alone: where gloo or NCCL would hang, it can still say why.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from moetrain.parallel.lifeline import die_with_parent, end_as_rank

if __name__ == "__main__":
    # before torch is imported, which takes seconds: a launcher that dies meanwhile must not leave this rank behind
    die_with_parent()

import platform
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from moetrain.config.freeze import freeze_section, read_run
from moetrain.config.schema import RunConfig
from moetrain.errors import LaunchError
from moetrain.parallel import groups as process_groups
from moetrain.preflight.measure import Exchanged, measure
from moetrain.preflight.seen.facts import (
    Clock,
    Found,
    Measured,
    NodeFacts,
    Port,
    Unreachable,
    node_of_json,
    to_json,
    write_found,
)
from moetrain.preflight.seen.knock import Listener, knock_all, own_address
from moetrain.preflight.seen.read import read_facts, read_ports, this_host
from moetrain.preflight.verdict import in_the_way

JOIN_SECONDS = 120.0
"""From the first rank to the last: a container may have to be fetched."""
MEASURE_SECONDS = 90
"""A collective that waits longer has lost somebody."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a node finds out once it knows the others."""

    clock: Clock | None
    sees_run_dir: bool
    unreachable: list[Unreachable]


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """Where this process stands, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    per_node: int
    store: dist.TCPStore
    patience: float
    """Seconds from the first rank to the last."""

    @property
    def node(self) -> int:
        return self.rank // self.per_node

    @property
    def nodes(self) -> int:
        return self.world_size // self.per_node

    @staticmethod
    def join(patience: float) -> _Rank:
        """Reach the store at MASTER_ADDR:MASTER_PORT; rank 0 keeps it, unless torchrun does."""
        environment = os.environ
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        per_node = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        try:
            store = process_groups.open_store(timeout=timedelta(seconds=patience))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise LaunchError(
                f"rank {rank} on {this_host().name} cannot reach rank 0 at {where} ({str(error).splitlines()[0]}): is "
                "that address one that this node has a route to, and is the port open?"
            ) from error
        local_rank = int(environment.get("LOCAL_RANK", rank % per_node))
        return _Rank(rank=rank, world_size=world_size, local_rank=local_rank, per_node=per_node, store=store,
                     patience=patience)  # fmt: skip

    def tell(self, what: str, text: str) -> None:
        self.store.set(f"preflight/{what}", text)

    def hear(self, what: str, *, times: int = 1) -> str:
        """What another rank has told, waited for at most ``times`` the patience."""
        key = f"preflight/{what}"
        self.store.wait([key], timedelta(seconds=times * self.patience))
        return bytes(self.store.get(key)).decode()


def run_rank(place: Path, *, patience: float = JOIN_SECONDS) -> None:
    """One rank's part.

    Args:
        patience: seconds from the first rank to the last; who comes later is missing.
    """
    me = _Rank.join(patience)
    ports: list[Port] = []
    found: Found | None = None
    if me.rank % me.per_node == 0:
        with Listener() as listener:
            facts = _own_facts(me, place=place, knock_port=listener.port)
            ports = facts.ports
            me.tell(f"facts/{me.node}", to_json(facts))
            found = _look_around(me, place=place)
    if found is not None:
        write_found(found, place)
        me.tell("go", in_the_way(found) or "go")
    # rank 0 waits for missing nodes and for the knocking first
    if me.hear("go", times=3) == "go":
        measured = _measure(read_run(place), me, ports=ports)
        if found is not None:
            write_found(replace(found, measured=measured), place)
    me.tell(f"bye/{me.rank}", "")
    if found is not None:
        # who keeps the store leaves last
        here = [facts.node * me.per_node + n for facts in found.nodes for n in range(me.per_node)]
        _arrived(me, "bye", here, seconds=10.0)


def _own_facts(me: _Rank, *, place: Path, knock_port: int) -> NodeFacts:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl,
                "python": platform.python_version()}  # fmt: skip
    facts = read_facts(this_host(), node=me.node, place=place, versions=versions)
    return replace(facts, address=own_address(os.environ["MASTER_ADDR"]), knock_port=knock_port)


def _look_around(me: _Rank, *, place: Path) -> Found | None:
    """Knock at the other nodes; on rank 0, hear what each has found."""
    roll: list[NodeFacts] = []
    mark = place / f"seen-{uuid.uuid4().hex}"
    if me.rank == 0:
        here = _arrived(me, "facts", range(me.nodes), seconds=me.patience)
        roll = [node_of_json(me.hear(f"facts/{node}")) for node in here]
        mark.touch()
        me.tell("roll", json.dumps({"mark": mark.name, "doors": [[f.node, f.address, f.knock_port] for f in roll]}))
    told = json.loads(me.hear("roll", times=2))
    clock, silent = knock_all(told["doors"], me.node)
    report = _Report(
        clock=clock,
        sees_run_dir=_sees(place / told["mark"]),
        unreachable=[Unreachable(source=me.node, target=node, reason=reason) for node, reason in silent.items()],
    )
    me.tell(f"report/{me.node}", json.dumps(asdict(report)))
    try:
        # my door stays open until all have knocked: rank 0 says when
        if me.rank != 0:
            me.hear("go", times=3)
            return None
        heard = _arrived(me, "report", [f.node for f in roll], seconds=me.patience)
        reports = {node: freeze_section(_Report, json.loads(me.hear(f"report/{node}"))) for node in heard}
        roll = [f for f in roll if f.node in reports]
        return Found(
            world_size=me.world_size,
            ranks_per_node=me.per_node,
            nodes=[
                replace(f, clock=reports[f.node].clock, sees_run_dir=reports[f.node].sees_run_dir)
                for f in roll
            ],
            missing=sorted(set(range(me.nodes)) - {f.node for f in roll}),
            unreachable=[each for report in reports.values() for each in report.unreachable],
            measured=None,
        )  # fmt: skip
    finally:
        mark.unlink(missing_ok=True)


def _arrived(me: _Rank, what: str, numbers: Iterable[int], *, seconds: float) -> list[int]:
    """Which of them have told this, waiting at most so long for all of them."""
    missing, here = list(numbers), []
    deadline = time.monotonic() + seconds
    while missing:
        now = [number for number in missing if me.store.check([f"preflight/{what}/{number}"])]
        here += now
        missing = [number for number in missing if number not in now]
        if missing and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return sorted(here)


def _sees(mark: Path) -> bool:
    """A name nobody asked for before: no cache of a network file system has an older answer."""
    for _ in range(3):
        if mark.is_file():
            return True
        time.sleep(0.5)
    return False


def _measure(run: RunConfig, me: _Rank, *, ports: list[Port]) -> Measured:
    groups = process_groups.start(
        expert_parallel=run.parallel.expert_parallel or 1,
        timeout_seconds=MEASURE_SECONDS,
        two_level=run.parallel.two_level_all_to_all,
    )
    measured = measure(groups, ranks_per_node=me.per_node, dtype=_DTYPES[run.model.dtype], exchanged=_exchanged(run))
    if ports:
        me.tell(f"grown/{me.node}", json.dumps(_grown(ports, read_ports(this_host()))))
    dist.barrier(group=groups.control)
    grown = {}
    for node in range(me.nodes) if me.rank == 0 else ():
        if me.store.check([f"preflight/grown/{node}"]):
            grown[str(node)] = json.loads(me.hear(f"grown/{node}"))
    process_groups.stop()
    return replace(measured, grown={node: counters for node, counters in grown.items() if counters})


def _exchanged(run: RunConfig) -> Exchanged | None:
    moe = run.model.moe
    if moe is None or (run.parallel.expert_parallel or 1) == 1:
        return None
    tokens = (run.batch.micro_batch or 1) * run.sequence_length
    return Exchanged(rows=tokens * moe.top_k, width=run.model.d_model, num_experts=moe.num_experts)


def _grown(before: list[Port], after: list[Port]) -> dict[str, int]:
    """Error counters that are higher than they were."""
    old = {(port.name, name): count for port in before for name, count in port.counters.items()}
    now = {(port.name, name): count for port in after for name, count in port.counters.items()}
    return {f"{port} {name}": count - old[port, name] for (port, name), count in now.items()
            if count > old.get((port, name), count)}  # fmt: skip


def main(place: Path) -> int:
    """Run a rank; returns the exit code."""
    torch.set_num_threads(1)
    run_rank(place)
    return 0


if __name__ == "__main__":
    end_as_rank(main, Path(sys.argv[1]))
