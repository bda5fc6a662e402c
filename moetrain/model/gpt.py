"""A decoder-only Transformer whose feed-forward blocks may be sparse. It takes ready modules and knows no settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moetrain.model.attention import Attention, rotation
from moetrain.model.ffn import FeedForward
from moetrain.moe.layer import MoELayer, MoEOutput
from moetrain.moe.routing import Choice


@dataclass(frozen=True)
class GPTOutput:
    """What one forward pass gives."""

    logit_BSV: Tensor
    """Scores of the next token, in the model's dtype."""
    moe: list[MoEOutput]
    """One for each MoE block, in order; empty for a dense model."""


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each pair around a residual."""

    def __init__(
        self, attention: Attention, *, feed_forward: FeedForward | MoELayer, norms: tuple[nn.Module, nn.Module]
    ) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norms
        self.attention = attention
        self.feed_forward = feed_forward


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
        embedding: nn.Embedding,
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

    def forward(self, token_BS: Tensor, replay: Sequence[Choice] | None = None) -> GPTOutput:
        """Args:
        token_BS: ids.
        replay: the choice of each MoE block in an earlier pass, to be repeated; None: the routers choose.
        """
        x = self.embedding(token_BS)
        turn = None
        if self.positions is not None:
            x = x + self.positions(torch.arange(token_BS.shape[1], device=token_BS.device))
        if self.rope_theta is not None:
            turn = rotation(
                token_BS.shape[1],
                d_head=self.blocks[0].attention.d_head,
                theta=self.rope_theta,
                device=token_BS.device,
            )
        moe = []
        for block in self.blocks:
            x = x + block.attention(block.attention_norm(x), turn=turn)
            normed = block.feed_forward_norm(x)
            if isinstance(block.feed_forward, MoELayer):
                answer = block.feed_forward(normed, token_BS, None if replay is None else replay[len(moe)])
                moe.append(answer)
                x = x + answer.hidden_TD
            else:
                x = x + block.feed_forward(normed)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return GPTOutput(logit_BSV=nn.functional.linear(self.norm(x), weight), moe=moe)

    def moe_state(self) -> dict[str, Tensor]:
        """State of the MoE blocks that no optimizer holds, by global name; the same on every rank."""
        return {
            f"blocks.{index}.feed_forward.{name}": tensor
            for index, block in enumerate(self.blocks)
            if isinstance(block.feed_forward, MoELayer)
            for name, tensor in block.feed_forward.state().items()
        }

    def after_step(self, count_LE: Tensor) -> None:
        """Let each of the L MoE blocks see the choices of the global batch."""
        layers = [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoELayer)]
        for layer, count_E in zip(layers, count_LE, strict=True):
            layer.after_step(count_E)
