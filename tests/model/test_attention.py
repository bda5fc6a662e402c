"""Rotary positions against complex numbers, attention against a loop over heads and positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain.model.attention import Attention, Rotation, rotate, rotation

D_MODEL, D_HEAD = 12, 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_attention(*, num_heads: int, num_kv_heads: int, bias: bool = False) -> Attention:
    attention = Attention(D_MODEL, num_heads=num_heads, num_kv_heads=num_kv_heads, d_head=D_HEAD, bias=bias).double()
    with torch.no_grad():
        for seed, parameter in enumerate(attention.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + seed) / 2)
    return attention


def test_rotation_turns_each_pair_like_a_complex_number() -> None:
    """RoFormer, equation 13: position p multiplies pair i by exp(i p theta^(-2i/d))."""
    length, d_head, theta = 40, 8, 100.0
    x = normal(3, length, d_head)
    turned = rotate(x, rotation(torch.arange(length), d_head=d_head, theta=theta))
    for position in range(length):
        for pair in range(d_head // 2):
            by = complex(0, position * theta ** (-2 * pair / d_head))
            factor = math.e**by
            for row in range(3):
                expected = complex(x[row, position, pair], x[row, position, pair + d_head // 2]) * factor
                # angles are float32
                assert turned[row, position, pair].item() == pytest.approx(expected.real, abs=1e-5)
                assert turned[row, position, pair + d_head // 2].item() == pytest.approx(expected.imag, abs=1e-5)


def test_scores_depend_on_the_distance_of_positions_alone() -> None:
    length = 64
    turn = rotation(torch.arange(length), d_head=D_HEAD, theta=10_000.0)
    q = rotate(normal(D_HEAD).expand(length, D_HEAD), turn)
    k = rotate(normal(D_HEAD, seed=1).expand(length, D_HEAD), turn)
    scores = q @ k.T
    for distance in range(-length + 1, length):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores[0].std() > 0.1, "scores must depend on the distance"


def test_angles_tell_neighbouring_positions_apart_in_a_bf16_model() -> None:
    turn = rotation(torch.arange(300), d_head=D_HEAD, theta=10_000.0)
    assert turn.cos.dtype == turn.sin.dtype == torch.float32
    turned = rotate(torch.ones(300, D_HEAD, dtype=torch.bfloat16), turn)
    assert turned.dtype == torch.bfloat16
    assert not torch.equal(turned[256], turned[257])


def plain_attention(attention: Attention, x: Tensor, turn: Rotation | None) -> Tensor:
    """One sequence [S, D], one head and one position at a time."""
    length, (heads, kv_heads, d) = x.shape[0], (attention.num_heads, attention.num_kv_heads, attention.d_head)
    rows = x @ attention.qkv.weight.T + (0 if attention.qkv.bias is None else attention.qkv.bias)
    q = rows[:, : heads * d].view(length, heads, d)
    # each key and value head is repeated for the query heads that share it
    k, v = (
        part.view(length, kv_heads, d).repeat_interleave(heads // kv_heads, dim=1)
        for part in rows[:, heads * d :].chunk(2, dim=1)
    )
    joined = []
    for position in range(length):
        answers = []
        for head in range(heads):
            query, keys = q[: position + 1, head], k[: position + 1, head]
            if turn is not None:
                here = Rotation(cos=turn.cos[: position + 1], sin=turn.sin[: position + 1])
                query, keys = rotate(query, here), rotate(keys, here)
            scores = torch.stack([query[-1] @ key for key in keys]) / math.sqrt(d)
            answers.append(scores.softmax(0) @ v[: position + 1, head])
        joined.append(torch.cat(answers))
    return torch.stack(joined) @ attention.out.weight.T + (0 if attention.out.bias is None else attention.out.bias)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "bias"), [(4, 4, False), (4, 2, False), (4, 1, False), (3, 3, True), (6, 2, True)]
)
def test_attention_is_a_loop_over_heads_and_positions(
    num_heads: int, num_kv_heads: int, bias: bool, rope: bool
) -> None:
    """Values and gradients; heads need not fill d_model."""
    attention = make_attention(num_heads=num_heads, num_kv_heads=num_kv_heads, bias=bias)
    turn = rotation(torch.arange(5), d_head=D_HEAD, theta=100.0) if rope else None
    x_BSD, upstream = normal(2, 5, D_MODEL), normal(2, 5, D_MODEL, seed=1)
    parameters = list(attention.parameters())

    ours = attention(x_BSD, turn=turn)
    plain = torch.stack([plain_attention(attention, x, turn) for x in x_BSD])
    torch.testing.assert_close(ours, plain)
    gradients = torch.autograd.grad(ours, parameters, upstream)
    expected = torch.autograd.grad(plain, parameters, upstream)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_attention_is_causal() -> None:
    attention, x_BSD = make_attention(num_heads=4, num_kv_heads=2), normal(2, 9, D_MODEL)
    turn = rotation(torch.arange(9), d_head=D_HEAD, theta=100.0)
    before = attention(x_BSD, turn=turn)
    for changed in (8, 4, 1):
        other = x_BSD.clone()
        other[:, changed] += 1
        after = attention(other, turn=turn)
        torch.testing.assert_close(after[:, :changed], before[:, :changed])
        assert not torch.allclose(after[:, changed:], before[:, changed:])
