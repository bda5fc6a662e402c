"""Losses that keep the experts busy and the router's scores small. All are returned unweighted."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def balance_loss(prob_TE: Tensor, count_E: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """E * sum_i f_i P_i: f_i the share of token copies sent to expert i, P_i its mean probability.

    1 when the load is uniform, E when one expert takes all of a top-1 layer (Fedus et al. 2021, arXiv:2101.03961,
    equations 4 to 6; for K = 2 it is half of what `transformers` reports, which sums f over the K choices).

    Args:
        prob_TE: softmax of the router's scores on this rank's tokens.
        count_E: token copies this rank sends to each expert.
        group: f is taken over all tokens of these ranks, so that the mean of the ranks' gradients does not depend on
            how the tokens are spread over them, as long as each has as many (Qiu et al. 2025, arXiv:2501.11873). Each
            call is then a collective. None: this rank's tokens alone.
    """
    count_E = count_E.to(prob_TE.dtype)
    if group is not None:
        dist.all_reduce(count_E, group=group)
    share_E = count_E / count_E.sum()
    return prob_TE.shape[-1] * torch.dot(share_E, prob_TE.mean(0))


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
