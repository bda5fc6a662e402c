"""What preflight has seen, as data. No torch: the command judges it, on a login node too.

None always means "could not look", never "nothing wrong".

PLACE/run.yaml      the run that is about to start (PLACE is RUN_DIR/preflight)
PLACE/found.json    what was seen and measured, from rank 0
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moetrain.config.freeze import freeze_section
from moetrain.errors import LaunchError

FOUND_FILE = "found.json"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as nvidia-smi tells of it."""

    index: int
    name: str
    memory_total_mib: float | None = None
    memory_used_mib: float | None = None
    utilization: float | None = None
    """Per cent."""
    celsius: float | None = None
    ecc_uncorrected: int | None = None
    """Since the driver was loaded; None also for GPUs without ECC."""
    remap_pending: bool | None = None
    """A row of memory waits for a reset to be replaced."""
    remap_failed: bool | None = None
    """A row could not be replaced: no spare is left."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port of an InfiniBand or RoCE adapter, from /sys/class/infiniband."""

    device: str
    """E.g. mlx5_0."""
    port: int
    state: str
    """ACTIVE, INIT, ARMED or DOWN."""
    physical: str
    """LinkUp, Polling, Disabled, …"""
    gbits: float | None
    """Rate, 10^9 bit/s."""
    lanes: int | None
    link_layer: str
    """InfiniBand or Ethernet (RoCE)."""
    counters: dict[str, int]
    """Errors since the counters were last cleared."""

    @property
    def name(self) -> str:
        """As NCCL_IB_HCA names it."""
        return f"{self.device}:{self.port}"

    @property
    def is_active(self) -> bool:
        """Whether data can pass."""
        return self.state == "ACTIVE"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of this process. None: no limit."""

    locked_bytes: int | None
    open_files: int | None


@dataclass(frozen=True, kw_only=True)
class StaleLock:
    """A lock of torch's extension builder."""

    path: str
    minutes: float
    """Since it was made."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """This node's clock against that of node 0."""

    ahead_seconds: float
    uncertain_seconds: float
    """Half of the round trip: the two may be nearer to each other by as much."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node before anything runs on it."""

    node: int
    """Its place among the nodes, from 0."""
    host: str
    address: str = ""
    """Where the other nodes knock."""
    knock_port: int = 0
    software: dict[str, str | None] = field(default_factory=dict)
    """driver, torch, cuda (torch was built with), nccl, python."""
    gpus: list[Gpu] | None = None
    """None: nvidia-smi did not answer."""
    ports: list[Port] = field(default_factory=list)
    """Empty: no InfiniBand or RoCE adapter."""
    gpudirect: str | None = None
    """peermem, dmabuf or none; None: could not look."""
    near_port: dict[str, str] | None = None
    """GPU index -> how it reaches its nearest active port: PIX, PXB, PHB, NODE or SYS, as ``nvidia-smi topo -m``."""
    limits: Limits | None = None
    shm_bytes: int | None = None
    """Size of /dev/shm."""
    interfaces: dict[str, str] | None = None
    """Network interface -> its state."""
    host_address: str | None = None
    """What the host's own name stands for: where gloo listens unless told otherwise."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of NCCL, UCX, gloo and CUDA."""
    disk_free_bytes: int | None = None
    """Where the checkpoints go."""
    sees_run_dir: bool | None = None
    """Whether this node sees in the run directory what node 0 wrote there."""
    code_digest: str | None = None
    run_digest: str | None = None
    stale_locks: list[StaleLock] = field(default_factory=list)
    clock: Clock | None = None


@dataclass(frozen=True, kw_only=True)
class Unreachable:
    """A node that did not answer another one's knock."""

    source: int
    target: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """Two units, nodes or the ranks of one node, sending to each other at the same time."""

    a: int
    b: int
    lanes: list[float]
    """Bytes per second in one direction between the ranks of each place: 0 of a with 0 of b, 1 with 1, … The slower of
    the two ends."""

    @property
    def rate(self) -> float:
        """Bytes per second of all lanes."""
        return sum(self.lanes)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of one group of ranks."""

    ranks: list[int]
    sent_bytes: int
    """By each rank, its own share not counted."""
    seconds: float
    """Of the slowest rank, best of several tries."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the ranks have measured."""

    device: str
    """E.g. NVIDIA H100 80GB HBM3, or cpu."""
    ranks_per_node: int
    matmul: list[float]
    """FLOP/s of each rank, in the run's dtype."""
    all_reduce: Collective | None
    all_to_all: list[Collective]
    """Of each expert-parallel group; empty: the experts are not spread."""
    units: str
    """What the links join: nodes, or ranks where there is one node."""
    links: list[Link]
    rounds: int
    """Of the tournament, as many as were played."""
    rounds_of: int
    grown: dict[str, dict[str, int]]
    """Error counters that grew meanwhile: node -> port and counter -> by how many."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """All of it."""

    world_size: int
    ranks_per_node: int
    nodes: list[NodeFacts]
    missing: list[int]
    """Nodes that did not report."""
    unreachable: list[Unreachable]
    measured: Measured | None
    """None: nothing was measured."""


def to_json(facts: NodeFacts | Found) -> str:
    """The facts as JSON."""
    return json.dumps(asdict(facts))


def node_of_json(text: str) -> NodeFacts:
    """The other way round."""
    return freeze_section(NodeFacts, json.loads(text))


def write_found(found: Found, place: Path) -> None:
    """Leave it where the command looks, in one step."""
    partial = place / f"{FOUND_FILE}.partial"
    partial.write_text(to_json(found), encoding="utf-8")
    os.replace(partial, place / FOUND_FILE)


def read_found(place: Path) -> Found:
    """What rank 0 left.

    Raises:
        LaunchError: it left nothing.
    """
    path = place / FOUND_FILE
    if not path.is_file():
        raise LaunchError(f"{path} was not written: rank 0 did not come so far; the logs are in {place / 'log'}")
    return freeze_section(Found, json.loads(path.read_text(encoding="utf-8")))
