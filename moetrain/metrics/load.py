"""What the experts carry: load, imbalance, drops and routing entropy, per layer, over all ranks.

Shape suffixes:
    L MoE layers      E experts in a layer

A token copy is one token on its way to one of its top_k experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Columns of the sums, behind the E counts.
_DROPPED, _ENTROPY, _TOKENS, _BALANCE, _Z = range(5)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The experts' load since the last report, over all ranks and micro-batches. A ratio to nothing is NaN."""

    share: list[list[float]]
    """[L][E]: copies sent to the expert / copies sent in the layer, before any drop; 1/E each is a fair load."""
    max_over_mean: list[float]
    """[L]: share of the fullest expert times E; 1 is fair, E is all on one."""
    cv: list[float]
    """[L]: coefficient of variation of the shares, sqrt(mean_i (share_i - 1/E)^2) * E; 0 is fair."""
    entropy: list[float]
    """[L]: mean over tokens of -sum_i p_i ln p_i in nats, p being the router's probabilities; at most ln E."""
    dropped_share: list[float]
    """[L]: copies that found no room / copies sent."""
    dead: list[list[int]]
    """[L][...]: ids of the experts that no token has chosen for ``dead_after`` steps."""
    balance_loss: list[float]
    """[L]: mean load-balancing loss, unweighted, each micro-batch counting by its tokens."""
    z_loss: list[float]
    """[L]: mean router z-loss over tokens, unweighted."""


class LoadMeter:
    """Adds up on the device, and tells when asked.

    Args:
        num_layers: MoE layers, L.
        num_experts: experts in a layer over all ranks, E.
        device: where the counts are; the sums stay there.
        dead_after: steps without a token after which an expert is called dead.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str, *, dead_after: int = 1) -> None:
        self.num_experts = num_experts
        self._dead_after = dead_after
        self._idle_steps = [[0] * num_experts for _ in range(num_layers)]
        # float64 holds counts exactly up to 2^53, and so one tensor, and one all-reduce, holds everything.
        self._sums = torch.zeros(num_layers, num_experts + 5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        layer: int,
        count_E: Tensor,
        *,
        dropped: Tensor | int,
        entropy_sum: Tensor | float,
        tokens: int,
        balance: Tensor | float,
        z: Tensor | float,
    ) -> None:
        """Add one micro-batch of this rank. The host does not wait for the device.

        Args:
            layer: which MoE layer, counted from 0.
            count_E: int64, token copies the router sent to each expert, dropped ones included.
            dropped: copies that found no room.
            entropy_sum: entropy of the router's probabilities in nats, summed over the tokens.
            tokens: tokens that were routed.
            balance: load-balancing loss of the micro-batch, unweighted.
            z: router z-loss of the micro-batch, a mean over its tokens, unweighted.
        """
        sums = self._sums[layer]
        sums[: self.num_experts].add_(count_E)
        rest = sums[self.num_experts :]
        rest[_DROPPED].add_(dropped)
        rest[_ENTROPY].add_(entropy_sum)
        rest[_TOKENS].add_(tokens)
        rest[_BALANCE].add_(balance, alpha=tokens)
        rest[_Z].add_(z, alpha=tokens)

    def read(self, group: dist.ProcessGroup | None = None, *, steps: int = 1) -> LoadReport:
        """The report since the last one, summed over the ranks, and a fresh start.

        Every rank of the group calls it, and waits there for its device.

        Args:
            group: ranks to sum over, in one all-reduce. None: all of them where torch.distributed is initialized,
                else this process alone.
            steps: optimizer steps since the last report.
        """
        if group is not None or (dist.is_available() and dist.is_initialized()):
            dist.all_reduce(self._sums, group=group)
        rows: list[list[float]] = self._sums.tolist()
        self._sums.zero_()
        experts = self.num_experts
        shares = [[_ratio(count, sum(row[:experts])) for count in row[:experts]] for row in rows]
        rests = [row[experts:] for row in rows]
        self._idle_steps = [
            [0 if share > 0 else idle + steps for share, idle in zip(layer, idles, strict=True)]
            for layer, idles in zip(shares, self._idle_steps, strict=True)
        ]
        return LoadReport(
            share=shares,
            dead=[[i for i, idle in enumerate(idles) if idle >= self._dead_after] for idles in self._idle_steps],
            max_over_mean=[max(share) * experts for share in shares],
            cv=[math.sqrt(sum((s - 1 / experts) ** 2 for s in share) / experts) * experts for share in shares],
            entropy=[_ratio(rest[_ENTROPY], rest[_TOKENS]) for rest in rests],
            dropped_share=[_ratio(rest[_DROPPED], sum(row[:experts])) for row, rest in zip(rows, rests, strict=True)],
            balance_loss=[_ratio(rest[_BALANCE], rest[_TOKENS]) for rest in rests],
            z_loss=[_ratio(rest[_Z], rest[_TOKENS]) for rest in rests],
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
