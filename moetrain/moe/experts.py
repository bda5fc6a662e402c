"""This rank's experts, applied to rows that are already grouped by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten
# the function, and its gradient written into a given place
_SILU = (F.silu, lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out))
_GELU = (F.gelu, lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate="none", grad_input=out))
_GELU_TANH = (
    partial(F.gelu, approximate="tanh"),
    lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out),
)
_RELU = (F.relu, lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out))
ACTIVATIONS = {"swiglu": _SILU, "geglu": _GELU, "gelu": _GELU, "gelu_tanh": _GELU_TANH, "relu": _RELU}
GATED = ("swiglu", "geglu")
BLOCK_ROWS = 1024
"""Rows of an expert computed at a time on CPU: what lies between its maps stays in the cache, and one that gets all the
tokens needs no more memory for it than the others."""
ROW_STEPS = ((256, 16), (BLOCK_ROWS, 64))
"""In bf16 on CPU, up to so many rows are computed by multiples of so many: oneDNN builds, and keeps, a kernel for each
number of rows that it meets, which takes longer than the product."""


def activate(h: Tensor, *, activation: str) -> Tensor:
    """The nonlinearity between the two maps of a feed-forward. Keeps ``h`` for the backward pass and nothing else.

    Args:
        h: [..., F], or [..., 2F] for a gated activation: the gate's half first (Shazeer 2020, arXiv:2002.05202).

    Returns:
        [..., F].
    """
    return _Activate.apply(h, activation)


class Experts(nn.Module):
    """The feed-forward networks of the experts on this rank, kept in one tensor per map.

    One tensor keeps every expert's gradient present even when it saw no token, which the engine needs:
    a rank whose gradients are missing would leave the others waiting in a collective.

    Attributes:
        w_in: [e, F, D], or [e, 2F, D] for a gated activation.
        w_out: [e, D, F].
        global_ids: which experts of the layer these are.
        dropout: share of the hidden units left out in training (expert dropout: Fedus et al. 2021, arXiv:2101.03961,
            section 3 and table 4).
    """

    def __init__(
        self, d_model: int, *, d_expert: int, activation: str, global_ids: range, dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = 2 * d_expert if activation in GATED else d_expert
        self.dropout = dropout
        self.w_in = nn.Parameter(torch.empty(len(global_ids), width, d_model))
        self.w_out = nn.Parameter(torch.empty(len(global_ids), d_model, d_expert))
        self.activation = activation
        self.global_ids = global_ids

    def forward(self, x_RD: Tensor, count_e: Tensor) -> Tensor:
        """Rows in, rows out: the first ``count_e[0]`` rows go through the first local expert, and so on.

        The way that is fastest on the device (docs/performance.md): on CUDA grouped matmuls, which in bf16 on Hopper
        and newer need no count on the host; their rows must be multiples of 16 bytes long (``config.checks``). On CPU,
        where the grouped operation has no fast kernel and counts are on the host already, one expert after the other.
        """
        dropout = self.dropout if self.training else 0.0
        if not x_RD.is_cuda:
            return _ExpertByExpert.apply(x_RD, self.w_in, self.w_out, count_e.tolist(), self.activation, dropout)
        h_RF = activate(grouped_linear(x_RD, self.w_in, count_e), activation=self.activation)
        if dropout:
            h_RF = F.dropout(h_RF, dropout)
        return grouped_linear(h_RF, self.w_out, count_e)


class SharedExpert(nn.Module):
    """Experts that every token visits beside the ones it is sent to (Dai et al. 2024, arXiv:2401.06066, section 3.2).

    Several shared experts are one wide one: their answers are added up, and they have no router.

    Args:
        gate: a sigmoid of a learned score of the token scales the answer (as in Qwen-MoE).
    """

    def __init__(self, d_model: int, *, d_expert: int, activation: str, gate: bool) -> None:
        super().__init__()
        width = 2 * d_expert if activation in GATED else d_expert
        self.w_in = nn.Linear(d_model, width, bias=False)
        self.w_out = nn.Linear(d_expert, d_model, bias=False)
        self.gate = nn.Linear(d_model, 1, bias=False) if gate else None
        self.activation = activation

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.w_out(activate(self.w_in(x_TD), activation=self.activation))
        return y_TD if self.gate is None else y_TD * self.gate(x_TD).sigmoid()


def grouped_linear(x_RI: Tensor, weight_eOI: Tensor, count_e: Tensor) -> Tensor:
    """x @ weight[i].T for the rows of each expert i, for rows grouped by expert, [R, O]."""
    return F.grouped_mm(x_RI, weight_eOI.transpose(1, 2), offs=count_e.cumsum(0).to(torch.int32))


class _ExpertByExpert(torch.autograd.Function):
    """Both maps of an expert at once, a block of rows after the other, while they are still in the cache.

    Results and weight gradients are written straight into their slices: plain indexing (``weight[i]``) would make
    autograd add up one full-size weight gradient per expert. Kept for the backward pass are the rows that came in and
    the hidden ones before the activation; what follows is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w_in: Tensor, w_out: Tensor, counts: list[int], activation: str, dropout: float
    ) -> Tensor:
        h_RF = x_RD.new_empty(x_RD.shape[0], w_in.shape[1])
        y_RD = torch.empty_like(x_RD)
        keep_RF = x_RD.new_empty(x_RD.shape[0], w_out.shape[2]).bernoulli_(1 - dropout) if dropout else None
        for block in _blocks(counts, dtype=x_RD.dtype):
            h = torch.mm(x_RD[block.rows], w_in[block.expert].T, out=h_RF[block.rows])
            a = _activated(h, activation)
            if keep_RF is not None:
                a.mul_(keep_RF[block.rows]).div_(1 - dropout)
            torch.mm(a, w_out[block.expert].T, out=y_RD[block.rows])
        ctx.save_for_backward(x_RD, h_RF, keep_RF, w_in, w_out)
        ctx.counts, ctx.activation, ctx.dropout = counts, activation, dropout
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RF, keep_RF, w_in, w_out = ctx.saved_tensors
        grad_y_RD = grad_y_RD.contiguous()
        grad_x_RD = torch.empty_like(x_RD)
        grad_in, grad_out = torch.empty_like(w_in), torch.empty_like(w_out)
        for block in _blocks(ctx.counts, dtype=x_RD.dtype):
            i, rows, grad_y = block.expert, block.rows, grad_y_RD[block.rows]
            grad_a = grad_y @ w_out[i]
            if keep_RF is not None:
                grad_a.mul_(keep_RF[rows]).div_(1 - ctx.dropout)
            grad_h = torch.empty_like(h_RF[rows])
            a = _activation_backward(grad_a, h_RF[rows], ctx.activation, out=grad_h)
            if keep_RF is not None:
                a.mul_(keep_RF[rows]).div_(1 - ctx.dropout)
            # the next expert's rows are no part of this one's gradient
            a[block.own :].zero_()
            grad_h[block.own :].zero_()
            torch.mm(grad_h, w_in[i], out=grad_x_RD[rows])
            beta = 0 if block.is_first else 1
            torch.addmm(grad_out[i], grad_y.T, a, beta=beta, out=grad_out[i])
            torch.addmm(grad_in[i], grad_h.T, x_RD[rows], beta=beta, out=grad_in[i])
        return grad_x_RD, grad_in, grad_out, None, None, None


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(h)
        ctx.activation = activation
        return _activated(h, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        grad_h = torch.empty_like(h)
        _activation_backward(grad, h, ctx.activation, out=grad_h)
        return grad_h, None


def _activated(h: Tensor, activation: str) -> Tensor:
    function, _ = ACTIVATIONS[activation]
    if activation not in GATED:
        return function(h)
    gate, up = h.chunk(2, dim=-1)
    return function(gate).mul_(up)


def _activation_backward(grad: Tensor, h: Tensor, activation: str, *, out: Tensor) -> Tensor:
    """The gradient of ``h`` into ``out``; returns the activation itself, which comes with it."""
    function, gradient = ACTIVATIONS[activation]
    if activation not in GATED:
        gradient(grad, h, out)
        return function(h)
    gate, up = h.chunk(2, dim=-1)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    answer = function(gate)
    torch.mul(grad, answer, out=grad_up)
    gradient(grad * up, gate, grad_gate)
    return answer.mul_(up)


@dataclass(frozen=True)
class _Block:
    """Rows of one expert, computed at once."""

    expert: int
    is_first: bool
    """Of its expert; an expert without rows has one, which is empty."""
    rows: slice
    own: int
    """How many of the rows are the expert's; what follows is the next ones', and overwritten when it is their turn."""


def _blocks(counts: list[int], *, dtype: torch.dtype) -> Iterator[_Block]:
    begin, total = 0, sum(counts)
    for expert, count in enumerate(counts):
        for done in range(0, max(count, 1), BLOCK_ROWS):
            own = min(count - done, BLOCK_ROWS)
            step = 1 if dtype.itemsize > 2 else next(step for most, step in ROW_STEPS if own <= most)
            start = begin + done
            stop = min(start + -(-own // step) * step, total)
            yield _Block(expert, is_first=done == 0, rows=slice(start, stop), own=own)
        begin += count
