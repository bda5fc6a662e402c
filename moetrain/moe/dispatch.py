"""Dispatch: bring each token to its experts, and the answers back.

    dispatch   x_TD --copy, sort by expert--> x_ND --all-to-all, sort by expert--> x_RD   (R rows received)
    combine    y_RD --unsort, all-to-all--> y_ND --unsort, weigh, add up--> y_TD

Nothing is padded; copies that do not travel (``Routing.sent_TK``) are left out. Nothing here has parameters; ``group``
is the only thing that knows of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.routing import Routing
from moetrain.parallel.collectives import all_to_all_rows


@dataclass(frozen=True)
class Exchange:
    """How the all-to-all went; needed to send the answers back."""

    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]
    """Rows from each rank of the group."""
    order_R: Tensor
    """int64, for each expert-major row, where it was among the rank-major rows that came."""
    position_R: Tensor
    """int64, the inverse of ``order_R``."""


@dataclass(frozen=True)
class Receipt:
    """Kept between dispatch and combine; says how to undo the trip."""

    order_N: Tensor
    """int64, for each row sorted by expert, its copy: token * K + choice."""
    position_M: Tensor
    """int64, for each of all M = T*K copies, where it is among the N sorted rows; N for a copy that stays behind."""
    weight_TK: Tensor
    """float32, routing weights."""
    exchange: Exchange | None
    """None when this rank holds every expert."""


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts."""

    x_RD: Tensor
    """Grouped by local expert."""
    count_e: Tensor
    """int64, rows for each local expert."""
    receipt: Receipt


class Dispatcher:
    """Moves tokens between ranks that share the experts of a layer.

    Args:
        group: the expert-parallel ranks in the order of their experts; None when this rank holds every expert.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        order_N, position_M = _sort(routing)
        x_ND = _SortCopies.apply(x_TD, order_N, position_M, routing.expert_TK.shape[1])
        x_RD, count_e, exchange = x_ND, routing.sent_E, None
        if self.group is not None:
            x_RD, count_e, exchange = self._exchange(x_ND, routing.sent_E, self.group)
        receipt = Receipt(order_N=order_N, position_M=position_M, weight_TK=routing.weight_TK, exchange=exchange)
        return Dispatched(x_RD=x_RD, count_e=count_e, receipt=receipt)

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor:
        y_ND = y_RD
        if receipt.exchange is not None:
            assert self.group is not None
            trip = receipt.exchange
            y_rank_major = _Reorder.apply(y_RD, trip.position_R, trip.order_R)
            y_ND = all_to_all_rows(y_rank_major, sent=trip.received, received=trip.sent, group=self.group)
        y_MD = _Reorder.apply(y_ND, receipt.position_M, receipt.order_N)
        y_TKD = y_MD.view(*receipt.weight_TK.shape, y_MD.shape[-1])
        # a batched product adds up the K answers without a weighted copy of them all
        return torch.bmm(receipt.weight_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)

    def _exchange(self, x_ND: Tensor, count_E: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Exchange]:
        ranks = dist.get_world_size(group)
        sent_Pe = count_E.view(ranks, -1)
        received_Pe = torch.empty_like(sent_Pe)
        dist.all_to_all_single(received_Pe, sent_Pe.contiguous(), group=group)
        # one wait for the device, for both lists: the all-to-all's arguments must be on the host
        sent, received = torch.stack([sent_Pe.sum(1), received_Pe.sum(1)]).tolist()
        x_rank_major = all_to_all_rows(x_ND, sent=sent, received=received, group=group)

        num_local = received_Pe.shape[1]
        expert_R = torch.arange(num_local, device=x_ND.device).repeat(ranks)
        expert_R = expert_R.repeat_interleave(received_Pe.flatten(), output_size=sum(received))
        order_R = expert_R.argsort(stable=True)
        position_R = _inverse(order_R)
        x_RD = _Reorder.apply(x_rank_major, order_R, position_R)
        exchange = Exchange(sent=sent, received=received, order_R=order_R, position_R=position_R)
        return x_RD, received_Pe.sum(0), exchange


def _sort(routing: Routing) -> tuple[Tensor, Tensor]:
    """Copies that travel, sorted by expert, and for every copy its place among them (see ``Receipt``)."""
    # stable: copies of one expert stay in token order, so that the result does not depend on the sort's whim
    expert_M = routing.expert_TK.flatten()
    if routing.sent_TK is None:
        order_N = expert_M.argsort(stable=True)
        return order_N, _inverse(order_N)
    num_experts = routing.sent_E.numel()
    order_M = torch.where(routing.sent_TK.flatten(), expert_M, num_experts).argsort(stable=True)
    # how many rows there are is data: here, and only here, the host waits for the device when nothing is exchanged
    order_N = order_M[: int(routing.sent_E.sum())]
    position_M = torch.full_like(order_M, order_N.numel())
    position_M[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return order_N, position_M


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows in another order; the row past the last, which a copy that stays behind points to, is zero."""
    if order.numel() > x.shape[0]:
        x = torch.cat([x, x.new_zeros(1, x.shape[-1])])
    return x.index_select(0, order)


class _SortCopies(torch.autograd.Function):
    """Row n of the result is the token of copy ``order_N[n]``.

    The gradient of an indexed read would be added up with atomics on CUDA, in another order every time;
    going back through the inverse and summing over the K copies gives the same bits on every run.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, position_M: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(position_M)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_N // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (position_M,) = ctx.saved_tensors
        grad_MD = _rows(grads[0], position_M)
        return grad_MD.view(-1, ctx.top_k, grad_MD.shape[-1]).sum(1), None, None, None


class _Reorder(torch.autograd.Function):
    """Row i of the result is row ``order[i]``; the gradient goes back through the inverse, without adding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _rows(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
