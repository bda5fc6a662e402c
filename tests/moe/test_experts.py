"""Experts on grouped rows against a loop over experts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain.moe.experts import Experts, activate, grouped_linear

COUNTS = {
    "even": [3, 3, 3],
    "empty at the start": [0, 4, 5],
    "empty in the middle": [4, 0, 5],
    "empty at the end": [4, 5, 0],
    "all to one": [0, 9, 0],
    "single rows": [1, 1, 1],
    "no rows": [0, 0, 0],
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_grouped_linear(x_RI: Tensor, weight_eOI: Tensor, counts: list[int]) -> Tensor:
    rows, start = [], 0
    for expert, count in enumerate(counts):
        for row in range(start, start + count):
            rows.append(weight_eOI[expert] @ x_RI[row])
        start += count
    return torch.stack(rows) if rows else x_RI.new_zeros(0, weight_eOI.shape[1])


@pytest.mark.parametrize("name", COUNTS)
def test_grouped_linear_is_a_loop_over_rows(name: str) -> None:
    counts = COUNTS[name]
    ours = [normal(sum(counts), 4, seed=1).requires_grad_(), normal(3, 5, 4, seed=2).requires_grad_()]
    plain = [each.detach().clone().requires_grad_() for each in ours]
    out = grouped_linear(*ours, torch.tensor(counts))
    upstream = normal(*out.shape, seed=3)
    gradients = torch.autograd.grad(out, ours, upstream)

    expected = plain_grouped_linear(*plain, counts)
    torch.testing.assert_close(out, expected)
    if expected.requires_grad:
        expected_gradients = torch.autograd.grad(expected, plain, upstream, allow_unused=True, materialize_grads=True)
    else:
        expected_gradients = [torch.zeros_like(each) for each in plain]
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)
    for expert, count in enumerate(counts):
        if count == 0:
            assert not gradients[1][expert].any(), "an expert without rows must have a gradient of zeros"


def test_grouped_linear_takes_a_gradient_that_is_no_block_of_memory() -> None:
    x_RI, weight_eOI = normal(5, 4).requires_grad_(), normal(2, 3, 4).requires_grad_()
    count_e = torch.tensor([2, 3])
    # the gradient of a sum is one number seen from every place
    grouped_linear(x_RI, weight_eOI, count_e).sum().backward()
    expected = torch.stack([weight_eOI[0].sum(0)] * 2 + [weight_eOI[1].sum(0)] * 3)
    torch.testing.assert_close(x_RI.grad, expected.detach())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", COUNTS)
def test_grouped_linear_on_a_gpu_is_that_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    counts = COUNTS[name]
    values = [
        normal(sum(counts), 64, dtype=dtype),
        normal(3, 32, 64, dtype=dtype),
        normal(sum(counts), 32, dtype=dtype),
    ]
    # the results may land in memory that was used before: what the kernel leaves unwritten then shows as NaN
    poison = [torch.full((3, 32, 64), math.nan, dtype=dtype, device="cuda") for _ in range(8)]
    del poison
    answers = {}
    for device, exact in (("cuda", dtype), ("cpu", torch.float64)):
        x_RI, weight_eOI, upstream = (each.to(device, exact, copy=True).requires_grad_() for each in values)
        out = grouped_linear(x_RI, weight_eOI, torch.tensor(counts, device=device))
        answers[device] = [out, *torch.autograd.grad(out, [x_RI, weight_eOI], upstream)]
    # sums of 64 products of size 1 are of size 8: bf16 rounds those by 8 * 2^-9, and some kernels do so twice
    tolerance = {"rtol": 2**-7, "atol": 2**-5} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for ours, wanted in zip(answers["cuda"], answers["cpu"], strict=True):
        torch.testing.assert_close(ours.cpu().double(), wanted, **tolerance)


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        # gates 1, -2, 0.5 and values 3, 4, 5
        ("swiglu", [3 / (1 + math.exp(-1)), -8 / (1 + math.exp(2)), 2.5 / (1 + math.exp(-0.5))]),
        ("geglu", [3 * phi(1), -8 * phi(-2), 2.5 * phi(0.5)]),
        ("gelu", [phi(1), -2 * phi(-2), 0.5 * phi(0.5), 3 * phi(3), 4 * phi(4), 5 * phi(5)]),
        ("relu", [1, 0, 0.5, 3, 4, 5]),
    ],
)
def test_activations_are_their_formulas(activation: str, expected: list[float]) -> None:
    """Hendrycks & Gimpel 2016, arXiv:1606.08415 (gelu); Shazeer 2020, arXiv:2002.05202, equation 5 (gated)."""
    h = torch.tensor([1, -2, 0.5, 3, 4, 5], dtype=torch.float64)
    assert activate(h, activation=activation).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu"])
def test_each_expert_answers_its_own_rows(activation: str) -> None:
    experts = Experts(4, d_expert=6, activation=activation, global_ids=range(3)).double()
    with torch.no_grad():
        experts.w_in.copy_(normal(*experts.w_in.shape, seed=1))
        experts.w_out.copy_(normal(*experts.w_out.shape, seed=2))
    x_RD, counts = normal(7, 4, seed=3), [2, 0, 5]
    rows = []
    for x, expert in zip(x_RD, [0, 0, 2, 2, 2, 2, 2], strict=True):
        rows.append(experts.w_out[expert] @ activate(experts.w_in[expert] @ x, activation=activation))
    torch.testing.assert_close(experts(x_RD, torch.tensor(counts)), torch.stack(rows))
