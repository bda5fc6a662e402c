"""A decoder-only Transformer whose feed-forward blocks may be sparse. It takes ready modules and knows no settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.model.attention import Attention, KeyValues, Rotation, document_mask, rotation, score_bias
from moetrain.model.ffn import FeedForward
from moetrain.model.recompute import Recompute
from moetrain.moe.layer import MoELayer, MoEOutput
from moetrain.moe.routing import Choice


@dataclass(frozen=True)
class GPTOutput:
    """What one forward pass gives."""

    logit_BSV: Tensor
    """Scores of the next token, in the model's dtype."""
    moe: list[MoEOutput]
    """One for each MoE block, in order; empty for a dense model."""


@dataclass(frozen=True)
class BlockOutput:
    """What one block gives."""

    hidden_BSD: Tensor
    """The residual stream after it."""
    moe: MoEOutput | None
    """None for a dense block."""


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each pair around a residual.

    Args:
        recompute: which of its activations the backward pass works out anew.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        feed_forward: FeedForward | MoELayer,
        norms: tuple[nn.Module, nn.Module],
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norms
        self.attention = attention
        self.feed_forward = feed_forward
        self.recompute = recompute or Recompute()

    def forward(
        self,
        x_BSD: Tensor,
        *,
        turn: Rotation | None,
        token_BS: Tensor,
        mask: Tensor | None = None,
        replay: Choice | None = None,
        past: KeyValues | None = None,
    ) -> BlockOutput:
        """Args:
        x_BSD: the residual stream.
        turn: angles of the rotary embedding; None when positions are learned.
        mask: what attention may see (``attention.score_bias``); None: all that came before.
        token_BS: ids.
        replay: the choice of the router in an earlier pass, to be repeated; None: it chooses.
        past: as ``Attention.forward``.
        """
        choice = replay

        def whole(x_BSD: Tensor) -> BlockOutput:
            nonlocal choice
            halfway = self.recompute.attention(self._attend, x_BSD, turn, mask, past)
            if not isinstance(self.feed_forward, MoELayer):
                return BlockOutput(halfway.x_BSD + self.recompute.dense(self.feed_forward, halfway.normed_BSD), None)
            answer: MoEOutput = self.feed_forward(halfway.normed_BSD, token_BS, choice)
            # a second pass must not choose anew: a near-tie that falls the other way would mix up the two passes
            choice = answer.choice
            return BlockOutput(halfway.x_BSD + answer.hidden_TD, answer)

        output: BlockOutput = self.recompute.block(whole, x_BSD)
        return output

    def _attend(self, x_BSD: Tensor, turn: Rotation | None, mask: Tensor | None, past: KeyValues | None) -> _Halfway:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), turn=turn, mask=mask, past=past)
        return _Halfway(x_BSD, self.feed_forward_norm(x_BSD))


@dataclass(frozen=True)
class _Halfway:
    """Between the two halves of a block."""

    x_BSD: Tensor
    normed_BSD: Tensor


class TokenEmbedding(nn.Embedding):
    """From ids to vectors, and from vectors to scores of the ids where the output layer shares the weights.

    One module for both ways: an engine that spreads weights over ranks brings them together where the module that owns
    them is called, and nowhere else.
    """

    def forward(self, given: Tensor) -> Tensor:
        """Args:
        given: ids, int64 of any shape; or vectors [..., D].
        """
        if given.is_floating_point():
            return nn.functional.linear(given, self.weight)
        return super().forward(given)


class GPT(nn.Module):
    """Token ids to scores of the next token.

    Args:
        blocks: from the bottom up.
        norm: after the last block.
        positions: learned embeddings of the positions; None when rotary ones are used.
        rope_theta: base of the rotary frequencies; None when positions are learned.
        tie_embeddings: the output layer uses the embedding's weights.
    """

    def __init__(
        self,
        blocks: list[Block],
        *,
        embedding: TokenEmbedding,
        positions: nn.Embedding | None,
        rope_theta: float | None,
        norm: nn.Module,
        tie_embeddings: bool,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.rope_theta = rope_theta
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = None if tie_embeddings else nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)

    def forward(
        self,
        token_BS: Tensor,
        replay: Sequence[Choice] | None = None,
        *,
        document_BS: Tensor | None = None,
        position_BS: Tensor | None = None,
        past: Sequence[KeyValues] | None = None,
        mask: Tensor | None = None,
    ) -> GPTOutput:
        """Args:
        token_BS: ids.
        document_BS: which document of its sequence each token is of, rising; attention stays within it. None:
            every token sees all before it.
        position_BS: of each token; None: they count from the start of the sequence.
        replay: the choice of each MoE block in an earlier pass, to be repeated; None: the routers choose.
        past: of each block, what it has read of these sequences before; None: they begin here. With it belong
            ``position_BS`` and ``mask``.
        mask: instead of that of ``document_BS``, which new token sees which of all, [B, 1, S, all].
        """
        x = self.embedding(token_BS)
        position = torch.arange(token_BS.shape[1], device=token_BS.device) if position_BS is None else position_BS
        turn = None
        if self.positions is not None:
            x = x + self.positions(position)
        if self.rope_theta is not None:
            turn = rotation(position, d_head=self.blocks[0].attention.d_head, theta=self.rope_theta)
        if document_BS is not None:
            mask = document_mask(document_BS)
        if mask is not None:
            mask = score_bias(mask, dtype=x.dtype)
        moe: list[MoEOutput] = []
        for index, block in enumerate(self.blocks):
            repeats = replay is not None and isinstance(block.feed_forward, MoELayer)
            output = block(
                x,
                turn=turn,
                token_BS=token_BS,
                mask=mask,
                replay=replay[len(moe)] if repeats else None,
                past=None if past is None else past[index],
            )
            x = output.hidden_BSD
            if output.moe is not None:
                moe.append(output.moe)
        head = self.embedding if self.head is None else self.head
        return GPTOutput(logit_BSV=head(self.norm(x)), moe=moe)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embedding.weight.device

    def moe_state(self) -> dict[str, Tensor]:
        """State of the MoE blocks that no optimizer holds, by global name; the same on every rank."""
        return {
            f"blocks.{index}.feed_forward.{name}": tensor
            for index, block in enumerate(self.blocks)
            if isinstance(block.feed_forward, MoELayer)
            for name, tensor in block.feed_forward.state().items()
        }

    @property
    def wants_counts(self) -> bool:
        """Whether any MoE block asks for ``after_step``."""
        return any(block.feed_forward.wants_counts for block in self.blocks if isinstance(block.feed_forward, MoELayer))

    def after_step(self, count_LE: Tensor) -> None:
        """Let each of the L MoE blocks see the choices of the global batch."""
        layers = [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoELayer)]
        for layer, count_E in zip(layers, count_LE, strict=True):
            layer.after_step(count_E)
