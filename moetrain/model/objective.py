"""What is minimised: the language-modelling loss plus the routers' losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.model.gpt import GPT
from moetrain.moe.layer import Load

NOT_COUNTED = -1
"""Target of a position that has no loss."""


@dataclass(frozen=True)
class Losses:
    """The losses of one micro-batch."""

    total: Tensor
    """What gradients are taken of."""
    language: Tensor
    """Mean cross entropy per counted token, nats, detached."""
    load: list[Load]
    """One for each MoE block."""


class Objective(nn.Module):
    """Token ids and targets to losses.

    The routers' losses of every layer are added to the total, each with its weight (Switch, section 2.2: "for each
    Switch layer, this auxiliary loss is added to the total model loss").

    Args:
        loss_weights: name of a router's loss -> its weight; losses without one are reported and not added.
    """

    def __init__(self, gpt: GPT, *, loss_weights: dict[str, float]) -> None:
        super().__init__()
        self.gpt = gpt
        self.loss_weights = loss_weights

    def forward(self, token_BS: Tensor, target_BS: Tensor) -> Losses:
        output = self.gpt(token_BS)
        language = nn.functional.cross_entropy(
            # float32: the sum of a bf16 softmax over a large vocabulary loses the loss's third digit
            output.logit_BSV.float().flatten(0, 1),
            target_BS.flatten(),
            ignore_index=NOT_COUNTED,
        )
        total = language
        for layer in output.moe:
            for name, loss in layer.losses.items():
                weight = self.loss_weights.get(name, 0.0)
                if weight:
                    total = total + weight * loss
        return Losses(total=total, language=language.detach(), load=[layer.load for layer in output.moe])


@torch.no_grad()
def negative_log_likelihood(gpt: GPT, token_BS: Tensor, target_BS: Tensor) -> tuple[Tensor, list[Load]]:
    """Summed over the counted tokens, nats; with the load of each MoE block."""
    output = gpt(token_BS)
    summed = nn.functional.cross_entropy(
        output.logit_BSV.float().flatten(0, 1), target_BS.flatten(), ignore_index=NOT_COUNTED, reduction="sum"
    )
    return summed, [layer.load for layer in output.moe]
