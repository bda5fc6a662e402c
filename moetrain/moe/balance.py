"""Losses that keep the experts busy and the router's scores small. All are returned unweighted."""

from __future__ import annotations

import torch
from torch import Tensor

SCOPES = ("global_batch", "micro_batch", "sequence")
"""Tokens whose choices the balance loss counts (``MoELayer``)."""


def balance_loss(prob_TE: Tensor, share_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i: f_i the share of token copies sent to expert i, P_i its mean probability.

    1 when the load is uniform, E when one expert takes all of a top-1 layer (Fedus et al. 2021, arXiv:2101.03961,
    equations 4 to 6; for K = 2 it is half of what `transformers` reports, which sums f over the K choices).

    Args:
        prob_TE: softmax of the router's scores on this rank's tokens.
        share_E: f, without a gradient.
    """
    return prob_TE.shape[-1] * torch.dot(share_E.to(prob_TE.dtype), prob_TE.mean(0))


def sequence_balance_loss(prob_TE: Tensor, expert_TK: Tensor, *, length: int, where_TK: Tensor | None = None) -> Tensor:
    """The balance loss of each sequence by itself, averaged (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).

    It does not depend on how sequences are spread over ranks and micro-batches.

    Args:
        length: tokens of a sequence; T is a multiple of it.
        where_TK: bool, which choices count; None: all of them.
    """
    experts = prob_TE.shape[-1]
    ones_TK = torch.ones_like(expert_TK) if where_TK is None else where_TK
    sent_TE = torch.zeros_like(prob_TE).scatter_add(1, expert_TK, ones_TK.to(prob_TE.dtype))
    sent_BE = sent_TE.view(-1, length, experts).sum(1)
    # the floor is for a sequence that no expert of an expert-choice router has chosen
    share_BE = sent_BE / sent_BE.sum(-1, keepdim=True).clamp(min=1)
    mean_BE = prob_TE.view(-1, length, experts).mean(1)
    return experts * (share_BE * mean_BE).sum(-1).mean()


def z_loss(logit_TE: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the scores (Zoph et al. 2022, arXiv:2202.08906, equation 5)."""
    return logit_TE.logsumexp(-1).square().mean()
