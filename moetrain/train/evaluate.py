"""Held-out loss and the expert load on held-out tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moetrain.data.loader import HeldOutBatch
from moetrain.metrics.load import LoadMeter, LoadReport
from moetrain.model.gpt import GPT
from moetrain.model.objective import NOT_COUNTED, negative_log_likelihood


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text."""

    loss: float
    """Mean negative log likelihood, nats per token."""
    bits_per_byte: float
    """Loss in bits, spread over the bytes of the text: comparable across tokenizers."""
    tokens: int
    """Predicted tokens."""
    load: LoadReport | None
    """None for a dense model."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    gpt: GPT,
    batches: Iterable[HeldOutBatch],
    *,
    bytes_per_token: float,
    meter: LoadMeter | None,
    device: torch.device,
    group: dist.ProcessGroup,
    on_batch: Callable[[], None],
) -> Evaluation:
    """Evaluate over all ranks; each brings the same number of batches, since an MoE block needs them all.

    Args:
        batches: this rank's share.
        bytes_per_token: UTF-8 bytes of the held-out text over its tokens.
        meter: counts the expert load; None for a dense model.
        on_batch: called after each batch, for a progress bar.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = gpt.training
    gpt.eval()
    for batch in batches:
        # rows of padding keep the number of batches even between ranks; a pass with one row does that as well, and
        # what is not text must not be counted as load
        real = max(1, int((batch.targets != NOT_COUNTED).any(axis=1).sum()))
        is_text = bool((batch.targets[0] != NOT_COUNTED).any())
        tokens, targets = (torch.from_numpy(each[:real]).to(device) for each in (batch.tokens, batch.targets))
        summed, loads = negative_log_likelihood(gpt, tokens, targets)
        total += torch.stack([summed.double(), (targets != NOT_COUNTED).sum().double()])
        if meter is not None and is_text:
            for layer, load in enumerate(loads):
                meter.add(layer, load.count_E, dropped=load.dropped, entropy_sum=load.entropy,
                          tokens=tokens.numel(), balance=load.balance, z=load.z)  # fmt: skip
        on_batch()
    gpt.train(was_training)
    dist.all_reduce(total, group=group)
    summed_nats, count = total.tolist()
    loss = summed_nats / count
    return Evaluation(
        loss=loss,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        tokens=int(count),
        load=meter.read(group) if meter is not None else None,
    )
