"""Collectives, each row and gradient written out by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.parallel.collectives import all_to_all_rows

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


def _assert_equal(
    answer: list[Tensor], out: list[list[float]], gradient: list[list[float]], dtype: torch.dtype = torch.float32
) -> None:
    assert torch.equal(answer[0], torch.tensor(out, dtype=dtype))
    assert torch.equal(answer[1], torch.tensor(gradient, dtype=dtype))
