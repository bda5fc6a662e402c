"""Collectives, each row and gradient written out by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.parallel.collectives import AllToAll, OneLevel, TwoLevel, all_to_all_rows
from moetrain.parallel.groups import make
from moetrain.parallel.topology import Topology

SENT = [[1, 2], [2, 0]]
"""Rank 0 keeps one row and sends two; rank 1 sends both of its rows to rank 0 and keeps none."""
RECEIVED = [[1, 2], [2, 0]]
ROWS = [[[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]], [[10.0, 10.5], [11.0, 11.5]]]
UPSTREAM = [[[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]], [[4.0, -4.0], [5.0, -5.0]]]


def _there_and_back(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    world = dist.group.WORLD
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.tensor(ROWS[rank], dtype=dtype, requires_grad=True)
        out = all_to_all_rows(x, sent=SENT[rank], received=RECEIVED[rank], group=world)
        out.backward(torch.tensor(UPSTREAM[rank], dtype=dtype))
        answers[str(dtype)] = [out.detach(), x.grad]

    # neither the rows nor the gradient are one block of memory
    columns = torch.tensor(ROWS[rank]).T.contiguous().requires_grad_()
    out = all_to_all_rows(columns.T, sent=SENT[rank], received=RECEIVED[rank], group=world)
    (out.sum() * (rank + 1)).backward()
    answers["strided"] = [out.detach(), columns.grad]

    nothing = torch.zeros(0, 2, requires_grad=True)
    out = all_to_all_rows(nothing, sent=[0, 0], received=[0, 0], group=world)
    out.sum().backward()
    answers["nothing"] = [out.detach(), nothing.grad]

    one_way = torch.ones(3 if rank == 0 else 0, 2, requires_grad=True)
    sent, received = ([0, 3], [0, 0]) if rank == 0 else ([0, 0], [3, 0])
    out = all_to_all_rows(one_way, sent=sent, received=received, group=world)
    (out.sum() * 7).backward()
    answers["one way"] = [out.detach(), one_way.grad]
    return answers


def test_rows_travel_to_their_ranks_and_gradients_the_way_back(ranks) -> None:
    # rank 0 gets its own first row and then rank 1's two; rank 1 gets rank 0's other two
    rows = [[[0.0, 0.5], [10.0, 10.5], [11.0, 11.5]], [[1.0, 1.5], [2.0, 2.5]]]
    # the gradient of rank 0's rows: its own, then rank 1's two; of rank 1's rows: rank 0's other two
    gradients = [[[1.0, -1.0], [4.0, -4.0], [5.0, -5.0]], [[2.0, -2.0], [3.0, -3.0]]]
    factors = [[[1.0, 2.0, 2.0]] * 2, [[1.0, 1.0]] * 2]
    answers = ranks(2, _there_and_back)
    for rank, answer in enumerate(answers):
        for dtype in (torch.float64, torch.bfloat16):
            _assert_equal(answer[str(dtype)], rows[rank], gradients[rank], dtype=dtype)
        _assert_equal(answer["strided"], rows[rank], factors[rank])
        assert [each.shape for each in answer["nothing"]] == [(0, 2), (0, 2)]
    assert [tuple(each.shape) for each in answers[0]["one way"]] == [(0, 2), (3, 2)]
    assert [tuple(each.shape) for each in answers[1]["one way"]] == [(3, 2), (0, 2)]
    assert (answers[1]["one way"][0] == 1).all()
    assert (answers[0]["one way"][1] == 7).all()


NODES_OF_TWO = 4
"""Ranks, two on each of two nodes."""
COUNTS = {
    "uneven": [[[3, 1], [0, 2], [5, 0], [1, 1]], [[0, 0], [2, 2], [0, 1], [4, 0]], [[1, 0], [1, 0], [1, 0], [1, 0]],
               [[0, 7], [0, 0], [2, 0], [0, 3]]],
    "a rank that sends nothing": [[[0, 0]] * 4, [[1, 2]] * 4, [[3, 0]] * 4, [[0, 1]] * 4],
    "a rank that receives nothing": [[[2, 1], [1, 0], [0, 0], [4, 4]]] * 4,
    "a node that receives nothing": [[[2, 1], [1, 3], [0, 0], [0, 0]]] * 4,
    "inside the nodes alone": [[[1, 2], [3, 0], [0, 0], [0, 0]]] * 2 + [[[0, 0], [0, 0], [1, 0], [2, 5]]] * 2,
    "nothing at all": [[[0, 0]] * 4] * 4,
}  # fmt: skip
"""Case -> for each rank, its rows for the two experts of each rank."""


def _round_trip(way: AllToAll, counts: list[list[int]], rank: int) -> dict[str, Any]:
    sent_Pe = torch.tensor(counts)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(int(sent_Pe.sum()), 3, generator=generator, requires_grad=True)
    trip = way.plan(sent_Pe)
    there = way.there(x, trip)
    back = way.back(there * (rank + 2), trip)
    back.backward(torch.randn(back.shape, generator=generator))
    return {"x": x.detach(), "received": trip.received_Pe, "there": there.detach(), "back": back.detach(),
            "gradient": x.grad}  # fmt: skip


def _both_ways(rank: int) -> dict[str, list[dict[str, Any]]]:
    topology = Topology(world_size=NODES_OF_TWO, rank=rank, expert_parallel=4, processes_per_node=2)
    groups = make(topology, device=torch.device("cpu"), two_level=True)
    assert groups.expert is not None
    assert groups.two_level is not None
    ways = (OneLevel(groups.expert), groups.two_level)
    return {case: [_round_trip(way, counts[rank], rank) for way in ways] for case, counts in COUNTS.items()}


def test_two_levels_bring_the_same_rows_in_the_same_order_as_one(ranks) -> None:
    answers = ranks(NODES_OF_TWO, _both_ways)
    for case, counts in COUNTS.items():
        for rank, answer in enumerate(answers):
            one, two = answer[case]
            for name, tensor in one.items():
                assert torch.equal(two[name], tensor), f"{case}, rank {rank}: {name}"
            # by hand: what each rank has for this one, in the order of the ranks
            came = []
            for other, mine in enumerate(counts):
                before = sum(sum(each) for each in mine[:rank])
                came.append(answers[other][case][0]["x"][before : before + sum(mine[rank])])
            assert torch.equal(two["there"], torch.cat(came)), case
            assert two["received"].tolist() == [mine[rank] for mine in counts]


def _messages(rank: int) -> list[list[int]]:
    topology = Topology(world_size=NODES_OF_TWO, rank=rank, expert_parallel=4, processes_per_node=2)
    way = make(topology, device=torch.device("cpu"), two_level=True).two_level
    assert isinstance(way, TwoLevel)
    sent, send = [], dist.all_to_all_single

    def note(out: Tensor, x: Tensor, *splits: Any, group: Any) -> Any:
        partners = [other for other in dist.get_process_group_ranks(group) if other != rank]
        sent.append(partners)
        return send(out, x, *splits, group=group)

    dist.all_to_all_single = note
    x = torch.randn(8, 2)
    trip = way.plan(torch.ones(4, 2, dtype=torch.int64))
    sent.clear()
    way.there(x, trip)
    dist.all_to_all_single = send
    return sent


def test_two_levels_send_one_message_to_each_other_node(ranks) -> None:
    # first the neighbour, then the rank at the same place of the other node
    assert ranks(NODES_OF_TWO, _messages) == [[[1], [2]], [[0], [3]], [[3], [0]], [[2], [1]]]


def _assert_equal(
    answer: list[Tensor], out: list[list[float]], gradient: list[list[float]], dtype: torch.dtype = torch.float32
) -> None:
    assert torch.equal(answer[0], torch.tensor(out, dtype=dtype))
    assert torch.equal(answer[1], torch.tensor(gradient, dtype=dtype))
