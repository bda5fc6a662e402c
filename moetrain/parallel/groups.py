"""Process groups: made once, handed around as values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moetrain.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's groups.

    Attributes:
        topology: where this rank stands.
        device: what it computes on.
        world: all ranks.
        expert: the ranks it exchanges tokens with; None when it holds every expert.
        control: all ranks, over gloo: small messages between hosts that must not wait for the device.
        writer: the same ranks and backend again, for the thread that writes checkpoints while the others are in use.
    """

    topology: Topology
    device: torch.device
    world: dist.ProcessGroup
    expert: dist.ProcessGroup | None
    control: dist.ProcessGroup
    writer: dist.ProcessGroup


def start(*, expert_parallel: int, timeout_seconds: float) -> Groups:
    """Join the other ranks (environment RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and make the groups.

    NCCL and one GPU per local rank where CUDA is available, gloo on CPU elsewhere.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    topology = Topology(world_size=world_size, rank=rank, expert_parallel=expert_parallel)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, timeout=timeout)
    return make(topology, device=device, timeout=timeout)


def make(topology: Topology, *, device: torch.device, timeout: timedelta | None = None) -> Groups:
    """The groups of a topology, in a process group that is already initialised.

    Args:
        timeout: how long a collective may wait; a new group does not inherit it. None: torch's default.
    """
    expert = None
    if topology.expert_parallel > 1:
        # every rank must take part in the making of every group, in the same order
        for ranks in topology.expert_groups:
            group = dist.new_group(ranks, timeout=timeout)
            if topology.rank in ranks:
                expert = group
    world = dist.group.WORLD
    assert world is not None
    return Groups(
        topology=topology,
        device=device,
        world=world,
        expert=expert,
        control=dist.new_group(backend="gloo", timeout=timeout),
        writer=dist.new_group(backend="gloo", timeout=timeout),
    )


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
