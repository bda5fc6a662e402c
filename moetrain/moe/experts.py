"""This rank's experts, applied to rows that are already grouped by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu}
GATED = ("swiglu", "geglu")


def activate(h: Tensor, *, activation: str) -> Tensor:
    """The nonlinearity between the two maps of a feed-forward.

    Args:
        h: [..., F], or [..., 2F] for a gated activation: the gate's half first (Shazeer 2020, arXiv:2002.05202).

    Returns:
        [..., F].
    """
    if activation in GATED:
        gate, up = h.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up
    return ACTIVATIONS[activation](h)


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
        """Rows in, rows out: the first ``count_e[0]`` rows go through the first local expert, and so on."""
        h_RF = activate(grouped_linear(x_RD, self.w_in, count_e), activation=self.activation)
        if self.dropout:
            h_RF = F.dropout(h_RF, self.dropout, self.training)
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
    """x @ weight[i].T for the rows of each expert i, for rows grouped by expert.

    On CUDA one grouped matmul, which in bf16 on Hopper and newer needs no count on the host; its rows must be
    multiples of 16 bytes long (``config.checks``). On CPU a matmul per expert into one buffer: the grouped operation
    has no fast CPU kernel, and counts are on the host already.
    """
    if x_RI.is_cuda:
        return F.grouped_mm(x_RI, weight_eOI.transpose(1, 2), offs=count_e.cumsum(0).to(torch.int32))
    return _LoopedLinear.apply(x_RI, weight_eOI, count_e.tolist())


class _LoopedLinear(torch.autograd.Function):
    """A matmul per expert, each result and each gradient written straight into its slice of one buffer.

    Plain indexing (``weight[i]``) would make autograd add up one full-size weight gradient per expert.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_eOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_eOI)
        ctx.counts = counts
        out_RO = x_RI.new_empty(x_RI.shape[0], weight_eOI.shape[1])
        for weight_OI, x_rI, out_rO in zip(weight_eOI, x_RI.split(counts), out_RO.split(counts), strict=True):
            torch.mm(x_rI, weight_OI.T, out=out_rO)
        return out_RO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight_eOI = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        grad_x_RI = torch.empty_like(x_RI)
        grad_weight_eOI = torch.empty_like(weight_eOI)
        rows = zip(grad_RO.split(ctx.counts), x_RI.split(ctx.counts), grad_x_RI.split(ctx.counts), strict=True)
        for i, (grad_rO, x_rI, grad_x_rI) in enumerate(rows):
            torch.mm(grad_rO, weight_eOI[i], out=grad_x_rI)
            torch.mm(grad_rO.T, x_rI, out=grad_weight_eOI[i])
        return grad_x_RI, grad_weight_eOI, None
