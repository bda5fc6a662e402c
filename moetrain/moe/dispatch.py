"""Dispatch: bring each token to its experts, and the answers back.

    dispatch   x_TD --copy, sort by expert--> x_ND --all-to-all, sort by expert--> x_RD   (R rows received)
    combine    y_RD --unsort, all-to-all--> y_ND --unsort, weigh, add up--> y_TD

Nothing is padded; copies that do not travel (``Routing.sent_TK``) are left out. Nothing here has parameters;
``AllToAll`` is the only thing that knows of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.routing import Routing
from moetrain.parallel.collectives import AllToAll, OneLevel, Trip


@dataclass(frozen=True)
class Exchange:
    """How the all-to-all went; needed to send the answers back."""

    trip: Trip
    """Rows to and from each rank."""
    order_R: Tensor
    """int64, for each expert-major row, where it was among the rank-major rows that came."""
    position_R: Tensor
    """int64, the inverse of ``order_R``."""


@dataclass(frozen=True)
class Copies:
    """Which of the N rows sorted by expert is which copy."""

    order_N: Tensor
    """int64, for each row its copy, token * K + choice; on CUDA those that stay behind come last."""
    position_TK: Tensor
    """int64, for each copy its row; the first one for a copy that stays behind."""
    sent_TK: Tensor | None
    """bool, which copies have a row; None: all of them."""

    @property
    def token_N(self) -> Tensor:
        """int64, the token of each row."""
        return self.order_N // self.position_TK.shape[1]


@dataclass(frozen=True)
class Receipt:
    """Kept between dispatch and combine; says how to undo the trip."""

    copies: Copies
    """Which row is which copy."""
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
        all_to_all: another way among them; None: every rank sends to every rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, all_to_all: AllToAll | None = None) -> None:
        self.all_to_all = all_to_all
        if all_to_all is None and group is not None:
            self.all_to_all = OneLevel(group)
        self.ranks = 1 if self.all_to_all is None else self.all_to_all.ranks

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        # how many rows travel is data, for which the host must wait for the device. Between ranks it must know; alone
        # on CUDA the rows of copies that stay behind lie after the others instead, where no expert looks
        copies = _sort(routing, cut=self.all_to_all is not None or not x_TD.is_cuda)
        x_ND = _Spread.apply(x_TD, copies)
        x_RD, count_e, exchange = x_ND, routing.sent_E, None
        if self.all_to_all is not None:
            x_RD, count_e, exchange = _exchange(x_ND, routing.sent_E, self.all_to_all)
        receipt = Receipt(copies=copies, weight_TK=routing.weight_TK, exchange=exchange)
        return Dispatched(x_RD=x_RD, count_e=count_e, receipt=receipt)

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor:
        y_ND = y_RD
        if receipt.exchange is not None:
            assert self.all_to_all is not None
            went = receipt.exchange
            y_rank_major = _Reorder.apply(y_RD, went.position_R, went.order_R)
            y_ND = self.all_to_all.back(y_rank_major, went.trip)
        return _Gather.apply(y_ND, receipt.weight_TK.to(y_ND.dtype), receipt.copies)


def _exchange(x_ND: Tensor, count_E: Tensor, all_to_all: AllToAll) -> tuple[Tensor, Tensor, Exchange]:
    trip = all_to_all.plan(count_E.view(all_to_all.ranks, -1))
    x_rank_major = all_to_all.there(x_ND, trip)

    received_Pe = trip.received_Pe
    expert_R = torch.arange(received_Pe.shape[1], device=x_ND.device).repeat(all_to_all.ranks)
    expert_R = expert_R.repeat_interleave(received_Pe.flatten(), output_size=sum(trip.received))
    order_R = expert_R.argsort(stable=True)
    position_R = _inverse(order_R)
    x_RD = _Reorder.apply(x_rank_major, order_R, position_R)
    return x_RD, received_Pe.sum(0), Exchange(trip=trip, order_R=order_R, position_R=position_R)


def _sort(routing: Routing, *, cut: bool) -> Copies:
    """Args:
    cut: whether copies that stay behind have no row; otherwise theirs come last.
    """
    # stable: copies of one expert stay in token order, so that the result does not depend on the sort's whim
    expert_M = routing.expert_TK.flatten()
    sent_TK = routing.sent_TK
    if sent_TK is None:
        order_N = expert_M.argsort(stable=True)
        return Copies(order_N=order_N, position_TK=_inverse(order_N).view_as(routing.expert_TK), sent_TK=None)
    num_experts = routing.sent_E.numel()
    order_M = torch.where(sent_TK.flatten(), expert_M, num_experts).argsort(stable=True)
    position_TK = torch.where(sent_TK, _inverse(order_M).view_as(sent_TK), 0)
    if cut:
        order_M = order_M[: int(routing.sent_E.sum())]
    return Copies(order_N=order_M, position_TK=position_TK, sent_TK=sent_TK)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _add_up(y_ND: Tensor, copies: Copies, weight_TK: Tensor | None) -> Tensor:
    """For each token, its rows weighed and added up, [T, D], in one pass that keeps no [T, K, D] in between."""
    if not y_ND.shape[0]:
        return y_ND.new_zeros(copies.position_TK.shape[0], y_ND.shape[1])
    if copies.sent_TK is not None:
        sent_TK = copies.sent_TK.to(y_ND.dtype)
        weight_TK = sent_TK if weight_TK is None else weight_TK * sent_TK
    return F.embedding_bag(copies.position_TK, y_ND, mode="sum", per_sample_weights=weight_TK)


class _Spread(torch.autograd.Function):
    """Row n of the result is the token of copy n.

    The gradient of an indexed read would be added up with atomics on CUDA, in another order every time;
    going back through the inverse gives the same bits on every run.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x_TD.index_select(0, copies.token_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _add_up(grads[0].contiguous(), ctx.copies, None), None


class _Gather(torch.autograd.Function):
    """Each token's rows, weighed and added up."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_TK: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(y_ND, weight_TK)
        ctx.copies = copies
        return _add_up(y_ND, copies, weight_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y_ND, weight_TK = ctx.saved_tensors
        copies: Copies = ctx.copies
        grad_ND = grads[0].index_select(0, copies.token_N)
        grad_weight_TK = torch.zeros_like(weight_TK)
        grad_weight_TK.view(-1)[copies.order_N] = torch.linalg.vecdot(grad_ND, y_ND)
        if copies.sent_TK is not None:
            # what lies in the rows that no expert looked at is anything, NaN included
            grad_weight_TK = torch.where(copies.sent_TK, grad_weight_TK, 0)
        grad_ND *= weight_TK.flatten()[copies.order_N].unsqueeze(1)
        return grad_ND, grad_weight_TK, None


class _Reorder(torch.autograd.Function):
    """Row i of the result is row ``order[i]``; the gradient goes back through the inverse, without adding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
