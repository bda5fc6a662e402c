"""What a model makes of prepared text, source by source, and which experts each source uses. One process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.data.loader import HeldOutText, held_out_batches
from moetrain.data.packing import Packing
from moetrain.evaluation.experts import TokenCounts
from moetrain.model.gpt import GPT
from moetrain.model.objective import NOT_COUNTED, negative_log_likelihood
from moetrain.moe.layer import MoEOutput
from moetrain.moe.routing import count
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
    counts: TokenCounts | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> list[SourceResult]:
    """Evaluate on each text; every token but the first is predicted once, from its own sequence.

    Args:
        texts: by the name of the source.
        sequence_length: tokens of a sequence.
        micro_batch: sequences per forward pass.
        packing: what documents in one sequence see of each other.
        max_sequences: how many of each source, evenly spread; None: all.
        counts: gets the choices of every token of all of them; None: nobody asks for them.
        on_batch: called after each pass, for a progress bar.
    """
    gpt.eval()
    device = gpt.device
    results = []
    for name, text in texts.items():
        nats, tokens, count_LE = 0.0, 0, None
        for batch in held_out_batches(text, sequence_length=sequence_length, rank=0, world_size=1,
                                      micro_batch=micro_batch, max_sequences=max_sequences):  # fmt: skip
            rows = type(batch)(tokens=batch.tokens[: batch.rows], targets=batch.targets[: batch.rows], rows=batch.rows)
            given = held_out_micro_batch(rows, packing=packing, device=device)
            summed, blocks = negative_log_likelihood(gpt, given)
            nats += float(summed.double())
            # what is padding, or has no loss, must not be counted as load
            where_T = (given.target_BS != NOT_COUNTED).flatten()
            tokens += int(where_T.sum())
            if blocks:
                now = torch.stack([_counted(block, where_T) for block in blocks])
                count_LE = now if count_LE is None else count_LE + now
            if counts is not None:
                counts.add(given.token_BS.flatten(), where_T, [block.choice for block in blocks])
            on_batch()
        loss = nats / max(1, tokens)
        share_LE = [] if count_LE is None else (count_LE / count_LE.sum(1, keepdim=True)).tolist()
        results.append(SourceResult(
            name=name, loss=loss, bits_per_byte=loss / math.log(2) * text.num_tokens / max(1, text.num_bytes),
            tokens=tokens, num_tokens=text.num_tokens, share_LE=share_LE,
        ))  # fmt: skip
    return results


def _counted(block: MoEOutput, where_T: Tensor) -> Tensor:
    """How often each expert was chosen by the tokens that count, [E]."""
    where_TK = where_T.unsqueeze(1).expand_as(block.choice.expert_TK)
    if block.choice.sent_TK is not None:
        where_TK = where_TK & block.choice.sent_TK
    return count(block.choice.expert_TK, num_experts=len(block.load.count_E), where_TK=where_TK)


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
