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


def score_bias(mask: Tensor, *, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores, in their dtype: 0 where a token sees another, else minus infinity.

    PyTorch's attention makes this of a mask by itself, but anew in each block, which keeps it for the backward pass.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pairs (i, i + d_head / 2) of x [..., S, d_head], the pairing of Llama and Mixtral checkpoints."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = by.cos.to(x.dtype), by.sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class KeyValues:
    """Keys and values of the tokens that one attention has read, for those that come after.

    Args:
        length: tokens there is room for.
    """

    def __init__(self, *, length: int) -> None:
        self.length = length
        self.filled = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in [B, G, S, d_head] of new tokens, and give those of all so far."""
        if self._keys is None or self._values is None:
            shape = (*k.shape[:2], self.length, k.shape[-1])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        begin, self.filled = self.filled, self.filled + k.shape[2]
        assert self.filled <= self.length, f"room for {self.length} tokens, given {self.filled}"
        self._keys[:, :, begin : self.filled], self._values[:, :, begin : self.filled] = k, v
        return self._keys[:, :, : self.filled], self._values[:, :, : self.filled]


class Attention(nn.Module):
    """Multi-head attention in which groups of query heads share a key and value head (arXiv:2305.13245).

    Args:
        qk_norm: RMSNorm of queries and keys before the rotation, of each ``head`` by itself (Qwen3, arXiv:2505.09388,
            section 2) or of ``all`` heads at once (OLMoE, arXiv:2409.02060, section 4.2.5); None: none.
        eps: of that norm.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        d_head: int,
        bias: bool,
        qk_norm: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_model, (num_heads + 2 * num_kv_heads) * d_head, bias=bias)
        self.out = nn.Linear(num_heads * d_head, d_model, bias=bias)
        self.num_heads, self.num_kv_heads, self.d_head = num_heads, num_kv_heads, d_head
        self.qk_norm = qk_norm
        if qk_norm is not None:
            widths = (d_head, d_head) if qk_norm == "head" else (num_heads * d_head, num_kv_heads * d_head)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=eps) for width in widths)

    def forward(
        self, x_BSD: Tensor, *, turn: Rotation | None, mask: Tensor | None = None, past: KeyValues | None = None
    ) -> Tensor:
        """Args:
        x_BSD: what attends to itself.
        turn: angles of the rotary embedding; None when positions are learned.
        mask: as ``document_mask`` or ``score_bias``, of the new tokens over all; None: every token sees all before it.
        past: what was read before, which takes in these tokens too; None: these are all there is.
        """
        batch, length, _ = x_BSD.shape
        heads = self.qkv(x_BSD).view(batch, length, -1, self.d_head).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.qk_norm is not None:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if past is not None:
            k, v = past.append(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_kv_heads != self.num_heads
        )
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _normed(self, norm: nn.Module, heads: Tensor) -> Tensor:
        if self.qk_norm == "head":
            return norm(heads)
        together = norm(heads.transpose(1, 2).flatten(2))
        return together.view(*together.shape[:2], -1, self.d_head).transpose(1, 2)
