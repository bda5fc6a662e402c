"""What the experts have made their own: how often each was chosen for each token, counted on text.

Shape suffixes:
    L MoE blocks      E experts of a block      V vocabulary      T tokens of a batch      K choices of a token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.moe.routing import Choice

LEAST_OCCURRENCES = 10
"""Of a token that is told of: rarer ones stand out by chance."""
LEAST_CHOICES = 5
"""How often the expert must have taken it, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class Favourite:
    """A token that an expert takes more often than it takes the average token."""

    token: int
    occurrences: int
    """In the text."""
    share: float
    """Of its occurrences, those that chose the expert (OLMoE's vocabulary specialisation, arXiv:2409.02060, section
    5)."""
    times: float
    """That share over the one of all tokens."""


class TokenCounts:
    """Counts choices by token, in the host's memory: L x V x E numbers of 4 bytes.

    Args:
        num_layers: L.
        vocab_size: V, rows of the embedding.
        num_experts: E.
    """

    def __init__(self, num_layers: int, vocab_size: int, num_experts: int) -> None:
        self._count_LVE = torch.zeros(num_layers, vocab_size, num_experts, dtype=torch.int32)
        self._seen_V = torch.zeros(vocab_size, dtype=torch.int64)

    @torch.no_grad()
    def add(self, token_T: Tensor, where_T: Tensor, choices: Sequence[Choice]) -> None:
        """Count a batch.

        Args:
            token_T: ids that went in.
            where_T: bool, those that count.
            choices: of each block.
        """
        token_T, where_T = token_T.cpu(), where_T.cpu()
        experts = self._count_LVE.shape[2]
        self._seen_V += torch.bincount(token_T[where_T], minlength=len(self._seen_V))
        for count_VE, choice in zip(self._count_LVE, choices, strict=True):
            expert_TK = choice.expert_TK.cpu()
            where_TK = where_T.unsqueeze(1).expand_as(expert_TK)
            if choice.sent_TK is not None:
                where_TK = where_TK & choice.sent_TK.cpu()
            place_N = (token_T.unsqueeze(1) * experts + expert_TK)[where_TK]
            count_VE.view(-1).scatter_add_(0, place_N, torch.ones_like(place_N, dtype=torch.int32))

    def favourites(self, *, most: int) -> list[list[list[Favourite]]]:
        """For each block and expert the tokens it takes most above average, [L][E], ``most`` each at most.

        In the order of (n - m) / sqrt(m), n being how often it took the token and m how often it would have, were all
        tokens alike (Pearson's residual): rare tokens do not come first by chance, nor frequent ones by their number.
        """
        seen = self._seen_V >= LEAST_OCCURRENCES
        ids, occurrences_v = seen.nonzero().flatten(), self._seen_V[seen].double()
        total = max(1, int(self._seen_V.sum()))
        found = []
        for count_VE in self._count_LVE:
            average_E = count_VE.sum(0).double() / total
            count_vE = count_VE[seen].double()
            alike_vE = occurrences_v.unsqueeze(1) * average_E
            residual_vE = (count_vE - alike_vE) / alike_vE.sqrt().clamp(min=1e-12)
            layer = []
            for expert, average in enumerate(average_E.tolist()):
                best = residual_vE[:, expert].topk(min(most, len(ids)))
                rows = [row for row, residual in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                        if residual > 0 and count_vE[row, expert] >= LEAST_CHOICES]  # fmt: skip
                shares = [float(count_vE[row, expert] / occurrences_v[row]) for row in rows]
                layer.append([
                    Favourite(token=int(ids[row]), occurrences=int(occurrences_v[row]), share=share,
                              times=share / average)
                    for row, share in zip(rows, shares, strict=True)
                ])  # fmt: skip
            found.append(layer)
        return found

    def told_by_token(self) -> list[float]:
        """How much the token alone tells of an expert that it chose, for each block: I(token; expert) / H(expert).

        0: nothing; 1: everything, as for a hash of the token with one choice. Over tokens of ``LEAST_OCCURRENCES``;
        entropies with Miller and Madow's correction (1955), without which few occurrences look like knowledge.
        """
        seen = self._seen_V >= LEAST_OCCURRENCES
        told = []
        for count_VE in self._count_LVE:
            count_vE = count_VE[seen].double()
            of_expert = _entropy(count_vE.sum(0))
            both = of_expert + _entropy(count_vE.sum(1)) - _entropy(count_vE.flatten())
            told.append(min(1.0, max(0.0, both / of_expert)) if of_expert > 0 else 0.0)
        return told


def _entropy(count_N: Tensor) -> float:
    """Nats, of the distribution that these counts were drawn from."""
    total = float(count_N.sum())
    if not total:
        return 0.0
    share_N = count_N / total
    return float(-share_N.xlogy(share_N).sum()) + (int((count_N > 0).sum()) - 1) / (2 * total)
