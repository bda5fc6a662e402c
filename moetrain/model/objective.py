"""What is minimised: the language-modelling loss plus the routers' losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.model.gpt import GPT
from moetrain.moe.layer import Load, MoEOutput

NOT_COUNTED = -1
"""Target of a position that has no loss."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass takes."""

    token_BS: Tensor
    """int64, ids."""
    target_BS: Tensor
    """int64, what comes next; ``NOT_COUNTED`` where that has no loss."""
    document_BS: Tensor | None = None
    """As ``GPT.forward``."""
    position_BS: Tensor | None = None
    """As ``GPT.forward``."""
    counted: float | None = None
    """What the summed loss is divided by: counted targets per micro-batch, on average over the global batch, so that
    every target of a step weighs the same. None: those of this micro-batch, which is the same where all count."""


@dataclass(frozen=True)
class Losses:
    """The losses of one micro-batch."""

    total: Tensor
    """What gradients are taken of."""
    language: Tensor
    """Cross entropy per counted token, nats, detached; its mean over the micro-batches of a step is the step's."""
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

    def forward(self, batch: MicroBatch) -> Losses:
        output = self.gpt(batch.token_BS, document_BS=batch.document_BS, position_BS=batch.position_BS)
        language = nn.functional.cross_entropy(
            # float32: the sum of a bf16 softmax over a large vocabulary loses the loss's third digit
            output.logit_BSV.float().flatten(0, 1),
            batch.target_BS.flatten(),
            ignore_index=NOT_COUNTED,
            reduction="mean" if batch.counted is None else "sum",
        )
        if batch.counted is not None:
            language = language / batch.counted
        total = language
        for layer in output.moe:
            for name, loss in layer.losses.items():
                weight = self.loss_weights.get(name, 0.0)
                if weight:
                    total = total + weight * loss
        return Losses(total=total, language=language.detach(), load=[layer.load for layer in output.moe])


@torch.no_grad()
def negative_log_likelihood(gpt: GPT, batch: MicroBatch) -> tuple[Tensor, list[MoEOutput]]:
    """Summed over the counted tokens, nats; with what each MoE block did."""
    output = gpt(batch.token_BS, document_BS=batch.document_BS, position_BS=batch.position_BS)
    summed = nn.functional.cross_entropy(
        output.logit_BSV.float().flatten(0, 1), batch.target_BS.flatten(), ignore_index=NOT_COUNTED, reduction="sum"
    )
    return summed, output.moe
