"""Causal self-attention with grouped queries and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """Angles of the rotary embedding, both float32: [S, d_head / 2], or [B, 1, S, d_head / 2] where the sequences of a
    batch have positions of their own."""

    cos: Tensor
    sin: Tensor


def rotation(position: Tensor, *, d_head: int, theta: float) -> Rotation:
    """Position p turns pair i by p * theta^(-2i / d_head) (Su et al. 2021, arXiv:2104.09864, section 3.2.2).

    Worked out in float32 at each use rather than kept in a buffer: an engine that casts buffers to bf16 would
    round the positions (8 bits of mantissa cannot tell 256 from 257).

    Args:
        position: [S], or [B, S] for each sequence of a batch.
    """
    frequency = theta ** (-torch.arange(0, d_head, 2, device=position.device, dtype=torch.float32) / d_head)
    angle = position.float().unsqueeze(-1) * frequency
    if position.dim() == 2:
        angle = angle.unsqueeze(1)  # the same for every head
    return Rotation(cos=angle.cos(), sin=angle.sin())


def document_mask(document_BS: Tensor) -> Tensor:
    """[B, 1, S, S], true where a token sees another: of its own document, and not after it."""
    same = document_BS.unsqueeze(2) == document_BS.unsqueeze(1)
    return same.tril().unsqueeze(1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (i, i + d_head / 2) of x [..., S, d_head], the pairing of Llama and Mixtral checkpoints."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = by.cos.to(x.dtype), by.sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention in which groups of query heads share a key and value head (arXiv:2305.13245)."""

    def __init__(self, d_model: int, *, num_heads: int, num_kv_heads: int, d_head: int, bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_model, (num_heads + 2 * num_kv_heads) * d_head, bias=bias)
        self.out = nn.Linear(num_heads * d_head, d_model, bias=bias)
        self.num_heads, self.num_kv_heads, self.d_head = num_heads, num_kv_heads, d_head

    def forward(self, x_BSD: Tensor, *, turn: Rotation | None, mask: Tensor | None = None) -> Tensor:
        """Args:
        x_BSD: what attends to itself.
        turn: angles of the rotary embedding; None when positions are learned.
        mask: as ``document_mask``; None: every token sees all before it.
        """
        batch, length, _ = x_BSD.shape
        heads = self.qkv(x_BSD).view(batch, length, -1, self.d_head).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_kv_heads != self.num_heads
        )
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return out
