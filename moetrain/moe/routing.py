"""What a router decided, and what room the experts have for it.

Shape suffixes, one legend for the whole package:
    B sequences     S tokens of a sequence     T = B*S tokens on this rank     D model width     V vocabulary
    E experts in the layer     e experts on this rank     F hidden width of an expert     G groups of experts
    K experts per token     N token copies     R copies received by this rank     P expert-parallel ranks
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which experts each token chose: a record that a router can be made to repeat."""

    expert_TK: Tensor
    """int64, best first."""
    sent_TK: Tensor | None
    """bool, which of these copies the router sends; None: all of them."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the router decided for one batch of tokens."""

    expert_TK: Tensor
    """int64, which experts each token chose, best first."""
    weight_TK: Tensor
    """float32, how much each expert's answer counts."""
    sent_TK: Tensor | None = None
    """bool, which of these copies travel; None: all of them."""
    count_E: Tensor
    """int64, copies that chose each expert, whether they travel or not."""
    sent_E: Tensor
    """int64, copies that travel to each expert."""
    logit_TE: Tensor | None
    """float32, raw scores; None for a router that has none."""
    prob_TE: Tensor | None
    """float32, probabilities of the experts; None for a router that has none."""
    balance_TK: Tensor | None = None
    """bool, which choices the balance loss counts; None: all of them."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """The router's own losses by name, unweighted."""

    @property
    def choice(self) -> Choice:
        """The record of it."""
        return Choice(expert_TK=self.expert_TK, sent_TK=self.sent_TK)


def make_routing(
    expert_TK: Tensor,
    *,
    weight_TK: Tensor,
    num_experts: int,
    logit_TE: Tensor | None = None,
    prob_TE: Tensor | None = None,
    sent_TK: Tensor | None = None,
    chosen_TK: Tensor | None = None,
    balance_TK: Tensor | None = None,
    losses: dict[str, Tensor] | None = None,
) -> Routing:
    """A Routing with its counts.

    Args:
        chosen_TK: bool, which slots hold a choice at all; None: all of them.
        sent_TK: bool, which of these travel; None: as many as are chosen.
        balance_TK: bool, which choices the balance loss counts; None: all.
    """
    count_E = count(expert_TK, num_experts=num_experts, where_TK=chosen_TK)
    if sent_TK is None:
        sent_TK, sent_E = chosen_TK, count_E
    else:
        sent_E = count(expert_TK, num_experts=num_experts, where_TK=sent_TK)
    return Routing(
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        sent_TK=sent_TK,
        count_E=count_E,
        sent_E=sent_E,
        logit_TE=logit_TE,
        prob_TE=prob_TE,
        balance_TK=chosen_TK if balance_TK is None else balance_TK,
        losses=losses or {},
    )


def count(expert_TK: Tensor, *, num_experts: int, where_TK: Tensor | None = None) -> Tensor:
    """Copies of each expert, [E] int64."""
    # not bincount: on CUDA it waits for the device to learn the largest id
    copies_N = expert_TK.flatten()
    ones_N = torch.ones_like(copies_N) if where_TK is None else where_TK.flatten().to(copies_N.dtype)
    return copies_N.new_zeros(num_experts).scatter_add_(0, copies_N, ones_N)


def capacity_of(*, tokens: int, top_k: int, num_experts: int, factor: float, least: int) -> int:
    """Copies one expert takes: ceil(T K / E * factor), at least ``least`` (Lepikhin et al. 2020, arXiv:2006.16668)."""
    # the factor as it is written: in binary, 10 * 1.1 is a little above 11, and would be rounded up to 12
    return max(least, math.ceil(tokens * top_k * Fraction(str(factor)) / num_experts))


def limit(routing: Routing, *, capacity: int, drop: str) -> Routing:
    """Leave behind the copies that no expert has room for; their tokens go on through the residual alone.

    Weights stay as they are: GShard and Switch do not renormalise after dropping.

    Args:
        capacity: copies each expert takes.
        drop: ``position``: later tokens first, and second choices of all tokens before first ones (GShard, algorithm
            1); ``probability``: the smallest weights first.
    """
    tokens, top_k = routing.expert_TK.shape
    num_experts = routing.count_E.numel()
    device = routing.expert_TK.device
    if drop == "position":
        first_N = torch.arange(tokens * top_k, device=device).view(tokens, top_k).T.flatten()
    else:
        first_N = routing.weight_TK.detach().flatten().argsort(descending=True, stable=True)
    expert_N = routing.expert_TK.flatten()
    if routing.sent_TK is not None:
        # copies that do not travel take no place: they queue for an expert that is not there
        expert_N = torch.where(routing.sent_TK.flatten(), expert_N, num_experts)
    queue_N = expert_N[first_N].argsort(stable=True)
    lengths = torch.cat([routing.sent_E, tokens * top_k - routing.sent_E.sum(dim=0, keepdim=True)])
    start = lengths.cumsum(0) - lengths
    copy_N = first_N[queue_N]
    place_N = torch.arange(tokens * top_k, device=device) - start[expert_N[copy_N]]
    fits_N = torch.empty_like(place_N, dtype=torch.bool)
    fits_N[copy_N] = (place_N < capacity) & (expert_N[copy_N] < num_experts)
    sent_TK = fits_N.view(tokens, top_k)
    return replace(routing, sent_TK=sent_TK, sent_E=count(routing.expert_TK, num_experts=num_experts, where_TK=sent_TK))
