"""Activations that the backward pass works out anew instead of keeping them (Chen et al. 2016, arXiv:1604.06174).

What is kept of a block for the backward pass, with T tokens of width D on a rank, K experts for each:

    none        everything
    full        the block's input (T D). The block runs a second time, its all-to-alls too.
    selective   the block's input, the normed tokens that the router sees (2 T D), the rows that the experts received
                and the answers that came back (K T D each), the scores and the order of the rows. Attention, norms,
                router, the hidden units of the experts and of the shared expert run a second time; nothing travels
                and nothing is sorted a second time, and the host waits for no count.

The rows and the answers are what would have to cross the network again; between them lies the bulk of a layer, the
hidden units of the experts (K T F times 3 to 5), which costs one matrix product to get back. A dense block has
nothing that travels: selective keeps its input and that of its feed-forward, full its input alone.

In both, the second pass repeats the first: routers are given their own choice (``Choice``) and random numbers are drawn
from the generator's state at the first pass. Losses and loads are those of the first pass, so each is counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
"""Calls its first argument with the others."""

KINDS = ("none", "selective", "full")


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    """Call it, and keep for the backward pass what autograd keeps."""
    return function(*args)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """Call it, keep ``args`` alone, and call it again in the backward pass.

    A function that is called twice must do the same twice: what it draws at random is the same by itself.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


@dataclass(frozen=True)
class Recompute:
    """How the parts of a block are run."""

    block: Run = plainly
    attention: Run = plainly
    """From the block's input to the feed-forward's, both norms included."""
    dense: Run = plainly
    """A dense feed-forward."""
    sparse: Run = plainly
    """The parts of an MoE layer between which rows travel: router, experts, shared expert."""

    @staticmethod
    def of(kind: str) -> Recompute:
        """For one of ``KINDS``."""
        match kind:
            case "none":
                return Recompute()
            case "full":
                return Recompute(block=recomputed)
            case "selective":
                return Recompute(attention=recomputed, dense=recomputed, sparse=recomputed)
        raise ValueError(f"recompute is {kind!r}, but must be one of {', '.join(KINDS)}")
