"""Do our model and the exported one say the same? The only import of `transformers` outside the benchmarks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.errors import CheckpointError, ConfigError
from moetrain.hub.generate import load_model
from moetrain.model.gpt import GPT

TOLERANCE = 2e-4
"""Of the largest score. Both compute in fp32, in another order: a difference of some 1e-6 in most models; a weight in
the wrong place is one of 1e-1."""
ROUNDINGS = 10
"""How many times what rounding does to our own scores is allowed, where that is more: in a model of large weights it
grows from block to block, and near-ties of experts fall the other way."""
LIMIT = 0.02
"""Of the largest score, at most."""
ROWS, LENGTH = 2, 64


@dataclass(frozen=True)
class Parity:
    """How far apart two models are."""

    largest: float
    """Largest difference of two scores."""
    scale: float
    """Largest score."""
    tokens: int
    """Positions that were compared, every score of each."""
    rounding: float
    """Largest change of one of our scores when every weight moves by a unit in its last place."""

    @property
    def allowed(self) -> float:
        """The largest difference that is still rounding."""
        return min(max(TOLERANCE * self.scale, ROUNDINGS * self.rounding), LIMIT * self.scale)

    @property
    def holds(self) -> bool:
        """Whether that is rounding; NaN is not."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        return (
            f"scores of {self.tokens} tokens differ by {self.largest:.1e} at most, of up to {self.scale:.3g} "
            f"(rounding alone: {self.rounding:.1e})"
        )


@dataclass(frozen=True)
class OurScores:
    """What our model says."""

    score_BSV: Tensor
    rounding: float
    """As ``Parity.rounding``."""


def libraries(what: str) -> tuple[Any, Any]:
    """`transformers` and `safetensors`, of the extra ``hf``.

    Args:
        what: needs them.

    Raises:
        ConfigError: one is not installed.
    """
    try:
        import safetensors.torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            [f"{what} needs transformers and safetensors ({error}): pip install 'moetrain[hf]'"]
        ) from None
    return transformers, safetensors


def compared(
    run_dir: Path,
    directory: Path,
    *,
    warn: Callable[[str], None],
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parity:
    """Our model of a run beside the one that `transformers` makes of a directory, on the same tokens.

    Args:
        step: of the checkpoint; None: the newest whole one.
        dtype: that the weights of ours are rounded to.

    Raises:
        CheckpointError: one of them cannot be loaded.
    """
    # one after the other: two models at once would take twice the memory
    run, gpt = load_model(run_dir, step=step, warn=warn)
    tokens = probe(run.model.vocab_size, context=run.model.context)
    ours = our_scores(gpt, tokens, dtype=dtype)
    del gpt
    return compare(ours, their_scores(directory, tokens))


def probe(vocab_size: int, *, context: int) -> Tensor:
    """Token ids to compare on, [B, S]; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (ROWS, min(LENGTH, context)), generator=generator)


@torch.no_grad()
def our_scores(gpt: GPT, token_BS: Tensor, *, dtype: torch.dtype) -> OurScores:
    """Scores of our model with its weights rounded to ``dtype`` and computed with in fp32; the weights are changed."""
    for tensor in gpt.parameters():
        tensor.copy_(tensor.to(dtype))
    score_BSV = gpt(token_BS).logit_BSV.float()
    generator = torch.Generator().manual_seed(0)
    for tensor in gpt.parameters():
        sign = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8) * 2 - 1
        tensor.mul_(1 + sign * torch.finfo(torch.float32).eps)
    return OurScores(score_BSV, rounding=float((gpt(token_BS).logit_BSV.float() - score_BSV).abs().max()))


@torch.no_grad()
def their_scores(directory: Path, token_BS: Tensor) -> Tensor:
    """Scores of the model that `transformers` makes of a directory, computed in fp32.

    Raises:
        CheckpointError: it finds keys missing or left over.
    """
    transformers, _ = libraries("comparing with transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {error}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            raise CheckpointError(f"transformers finds {what.replace('_', ' ')} in {directory}: {sorted(told[what])}")
    scores: Tensor = model.eval()(token_BS).logits.float()
    del model
    gc.collect()
    return scores


def compare(ours: OurScores, theirs: Tensor) -> Parity:
    """Hold the scores of two models side by side, [B, S, V]."""
    return Parity(
        largest=float((ours.score_BSV - theirs).abs().max()),
        scale=float(theirs.abs().max()),
        tokens=theirs[..., 0].numel(),
        rounding=ours.rounding,
    )
