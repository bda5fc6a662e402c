"""Collectives that gradients pass through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all_rows(x_ND: Tensor, *, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first ``sent[0]`` rows to rank 0 of the group, the next ``sent[1]`` to rank 1, …

    Args:
        x_ND: rows, grouped by the rank they go to.
        sent: rows to each rank; sums to N.
        received: rows from each rank.

    Returns:
        The ``sum(received)`` rows that came, grouped by the rank they came from. Gradients travel the way back.
    """
    return _AllToAllRows.apply(x_ND, sent, received, group)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(x_ND, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x_ND.new_empty((sum(received), *x_ND.shape[1:]))
    dist.all_to_all_single(out, x_ND.contiguous(), received, sent, group=group)
    return out
