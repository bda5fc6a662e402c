"""Process groups on real processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.errors import LaunchError
from moetrain.parallel.groups import Groups, make, start, stop
from moetrain.parallel.topology import Topology

WORLD_SIZE = 4


def _describe(groups: Groups) -> dict[str, Any]:
    return {
        "world": dist.get_process_group_ranks(groups.world),
        "expert": None if groups.expert is None else dist.get_process_group_ranks(groups.expert),
        "control": dist.get_process_group_ranks(groups.control),
        "control backend": dist.get_backend(groups.control),
        "device": groups.device.type,
    }


def _groups(rank: int) -> dict[str, Any]:
    answers = {}
    for expert_parallel in (1, 2, 4):
        topology = Topology(world_size=WORLD_SIZE, rank=rank, expert_parallel=expert_parallel)
        groups = make(topology, device=torch.device("cpu"))
        answers[str(expert_parallel)] = _describe(groups)
        if groups.expert is not None:
            total = torch.tensor(rank)
            dist.all_reduce(total, group=groups.expert)
            answers[f"sum {expert_parallel}"] = total.item()
    # each rank leaves, and starts over as the only one of its own world; port 0: the system picks a free one
    dist.barrier()
    stop()
    answers["left"] = not dist.is_initialized()
    stop()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    answers["alone"] = _describe(start(expert_parallel=1, timeout_seconds=30.0))
    stop()
    return answers


@pytest.mark.parametrize(
    ("environment", "expert_parallel", "told"),
    [
        # as srun --distribution=cyclic would have it
        ({"RANK": "1", "LOCAL_RANK": "0"}, 1, "rank 1 is number 0 on its node of 2 processes, but must be number 1"),
        ({"WORLD_SIZE": "3"}, 1, "the world size is 3, but must be a multiple of the processes of a node, 2"),
        ({"WORLD_SIZE": "6"}, 3, "parallel.expert_parallel is 3, but must divide the processes of a node, 2"),
    ],
)
def test_ranks_that_do_not_lie_on_the_nodes_as_they_must_are_refused(monkeypatch, environment, expert_parallel, told):
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (defaults | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=told):
        start(expert_parallel=expert_parallel, timeout_seconds=1.0)


def test_each_rank_is_in_the_groups_of_its_place(ranks) -> None:
    answers = ranks(WORLD_SIZE, _groups)
    everyone = [0, 1, 2, 3]
    for rank, answer in enumerate(answers):
        pair = [0, 1] if rank < 2 else [2, 3]
        common = {"world": everyone, "control": everyone, "control backend": "gloo", "device": "cpu"}
        assert answer["1"] == {**common, "expert": None}
        assert answer["2"] == {**common, "expert": pair}
        assert answer["4"] == {**common, "expert": everyone}
        assert answer["sum 2"] == sum(pair)
        assert answer["sum 4"] == 6
        assert answer["left"]
        # a test machine may have GPUs; the groups then lie on them
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert answer["alone"] == {**common, "world": [0], "control": [0], "device": device, "expert": None}
