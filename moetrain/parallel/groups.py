"""Process groups: made once, handed around as values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moetrain.errors import LaunchError
from moetrain.parallel.collectives import AllToAll, OneLevel, TwoLevel, Watcher
from moetrain.parallel.host import keep_freed_memory
from moetrain.parallel.lifeline import MEETING_SOCKET
from moetrain.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's groups.

    Attributes:
        topology: where this rank stands.
        device: what it computes on.
        world: all ranks.
        expert: the ranks it exchanges tokens with; None when it holds every expert.
        two_level: how it exchanges them by way of its node; None: directly.
        watcher: told of every exchange; None: nobody watches.
        control: all ranks, over gloo: small messages between hosts that must not wait for the device.
        writer: the same ranks and backend again, for the thread that writes checkpoints while the others are in use.
    """

    topology: Topology
    device: torch.device
    world: dist.ProcessGroup
    expert: dist.ProcessGroup | None
    control: dist.ProcessGroup
    writer: dist.ProcessGroup
    two_level: TwoLevel | None = None
    watcher: Watcher | None = None

    @property
    def all_to_all(self) -> AllToAll | None:
        """How tokens are exchanged; None when this rank holds every expert."""
        if self.two_level is not None:
            return self.two_level
        return None if self.expert is None else OneLevel(self.expert, watcher=self.watcher)


def start(
    *, expert_parallel: int, timeout_seconds: float, two_level: bool = False, watcher: Watcher | None = None
) -> Groups:
    """Join the other ranks (environment RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and make the groups.

    NCCL and one GPU per local rank where CUDA is available, gloo on CPU elsewhere.

    Raises:
        LaunchError: the ranks do not lie on the nodes as ``Topology`` needs them (LOCAL_WORLD_SIZE, LOCAL_RANK).
    """
    topology = _topology(os.environ, expert_parallel=expert_parallel)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
    timeout = timedelta(seconds=timeout_seconds)
    # rank 0's must be there first: init_process_group then takes it instead of listening on the port itself
    store = open_store(timeout=timeout) if MEETING_SOCKET in os.environ else None
    dist.init_process_group(backend, timeout=timeout)
    del store
    return make(topology, device=device, timeout=timeout, two_level=two_level, watcher=watcher)


def open_store(*, timeout: timedelta) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which rank 0 keeps, unless torchrun does.

    Raises:
        DistNetworkError, DistStoreError: it cannot be reached in this time, or rank 0 cannot listen.
    """
    environment = os.environ
    keeps = environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    socket = environment.get(MEETING_SOCKET)
    return dist.TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=keeps,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,  # who opens it again in this process gets this one, and not a port in use
        master_listen_fd=None if socket is None else int(socket),
    )


def _topology(environment: Mapping[str, str], *, expert_parallel: int) -> Topology:
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    per_node = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    local_rank = int(environment.get("LOCAL_RANK", rank % per_node))
    if local_rank != rank % per_node:
        raise LaunchError(
            f"rank {rank} is number {local_rank} on its node of {per_node} processes, but must be number "
            f"{rank % per_node}: ranks of a node must be neighbours, and every node must have as many; with SLURM: "
            "srun --distribution=block"
        )
    try:
        return Topology(world_size=world_size, rank=rank, expert_parallel=expert_parallel, processes_per_node=per_node)
    except ValueError as error:
        raise LaunchError(f"parallel.{error}" if str(error).startswith("expert_parallel") else str(error)) from error


def make(
    topology: Topology,
    *,
    device: torch.device,
    timeout: timedelta | None = None,
    two_level: bool = False,
    watcher: Watcher | None = None,
) -> Groups:
    """The groups of a topology, in a process group that is already initialised.

    Args:
        two_level: exchange tokens inside the node first, where expert groups cross nodes.
        timeout: how long a collective may wait; a new group does not inherit it. None: torch's default.
        watcher: told of every exchange of tokens; None: nobody watches.
    """
    expert = _own(topology.expert_groups, topology, timeout) if topology.expert_parallel > 1 else None
    levels = None
    if two_level and topology.crosses_nodes:
        levels = TwoLevel(
            inside=_own(topology.inside_groups, topology, timeout),
            across=_own(topology.across_groups, topology, timeout),
            watcher=watcher,
        )
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        topology=topology,
        device=device,
        world=world,
        expert=expert,
        control=dist.new_group(backend="gloo", timeout=timeout),
        writer=dist.new_group(backend="gloo", timeout=timeout),
        two_level=levels,
        watcher=watcher,
    )


def _own(all_ranks: list[list[int]], topology: Topology, timeout: timedelta | None) -> dist.ProcessGroup:
    own = None
    # every rank must take part in the making of every group, in the same order
    for ranks in all_ranks:
        group = dist.new_group(ranks, timeout=timeout)
        if topology.rank in ranks:
            own = group
    assert own is not None
    return own


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
