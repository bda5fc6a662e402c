"""What a model makes of prepared text, source by source, and which experts each source uses. One process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moetrain.data.loader import HeldOutText, held_out_batches
from moetrain.data.packing import Packing
from moetrain.model.gpt import GPT
from moetrain.model.objective import NOT_COUNTED, negative_log_likelihood
from moetrain.train.setup import held_out_micro_batch


@dataclass(frozen=True, kw_only=True)
class SourceResult:
    """Of the text of one source, or of all together."""

    name: str
    loss: float
    """Mean negative log likelihood, nats per token."""
    bits_per_byte: float
    """Loss in bits, spread over the bytes of the text: comparable across tokenizers."""
    tokens: int
    """Predicted tokens."""
    num_tokens: int
    """Of the whole text: what it weighs among the others."""
    share_LE: list[list[float]]
    """Of the token copies of each MoE block, those that chose each expert; empty for a dense model."""

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def evaluate_sources(
    gpt: GPT,
    texts: Mapping[str, HeldOutText],
    *,
    sequence_length: int,
    micro_batch: int,
    packing: Packing,
    max_sequences: int | None,
    on_batch: Callable[[], None] = lambda: None,
) -> list[SourceResult]:
    """Evaluate on each text; every token but the first is predicted once, from its own sequence.

    Args:
        texts: by the name of the source.
        sequence_length: tokens of a sequence.
        micro_batch: sequences per forward pass.
        packing: what documents in one sequence see of each other.
        max_sequences: how many of each source, evenly spread; None: all.
        on_batch: called after each pass, for a progress bar.
    """
    gpt.eval()
    device = gpt.device
    results = []
    for name, text in texts.items():
        nats, tokens, count_LE = 0.0, 0, None
        for batch in held_out_batches(text, sequence_length=sequence_length, rank=0, world_size=1,
                                      micro_batch=micro_batch, max_sequences=max_sequences):  # fmt: skip
            # what is padding must not be counted as load
            rows = type(batch)(tokens=batch.tokens[: batch.rows], targets=batch.targets[: batch.rows], rows=batch.rows)
            given = held_out_micro_batch(rows, packing=packing, device=device)
            summed, loads = negative_log_likelihood(gpt, given)
            nats += float(summed.double())
            tokens += int((given.target_BS != NOT_COUNTED).sum())
            if loads:
                now = torch.stack([load.count_E for load in loads])
                count_LE = now if count_LE is None else count_LE + now
            on_batch()
        loss = nats / max(1, tokens)
        share_LE = [] if count_LE is None else (count_LE / count_LE.sum(1, keepdim=True)).tolist()
        results.append(SourceResult(
            name=name, loss=loss, bits_per_byte=loss / math.log(2) * text.num_tokens / max(1, text.num_bytes),
            tokens=tokens, num_tokens=text.num_tokens, share_LE=share_LE,
        ))  # fmt: skip
    return results


def together(results: list[SourceResult], texts: Mapping[str, HeldOutText]) -> SourceResult:
    """All sources as one, each weighing by the size of its text, however much of it was read."""
    total = sum(each.num_tokens for each in results)
    loss = sum(each.loss * each.num_tokens for each in results) / total
    num_bytes = sum(text.num_bytes for text in texts.values())
    layers = range(len(results[0].share_LE))
    experts = range(len(results[0].share_LE[0]) if layers else 0)
    return SourceResult(
        name="all",
        loss=loss,
        bits_per_byte=loss / math.log(2) * total / max(1, num_bytes),
        tokens=sum(each.tokens for each in results),
        num_tokens=total,
        share_LE=[
            [sum(each.share_LE[layer][expert] * each.num_tokens for each in results) / total for expert in experts]
            for layer in layers
        ],
    )


def apart(share_E: list[float], common_E: list[float]) -> float:
    """How far the experts of one source are from those of all: the share of its copies that would have to move (total
    variation); 0: the same experts, near 1: none in common."""
    return sum(abs(own - common) for own, common in zip(share_E, common_E, strict=True)) / 2
