"""Experts on grouped rows against a loop over experts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe import experts as experts_module
from moetrain.moe.experts import Experts, activate, grouped_linear

ACTIVATIONS = ["swiglu", "geglu", "gelu", "relu"]
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
    ours = [
        normal(*shape, seed=seed, dtype=torch.float32).requires_grad_()
        for seed, shape in enumerate([(sum(counts), 4), (3, 8, 4)])
    ]
    plain = [each.detach().clone().requires_grad_() for each in ours]
    out = grouped_linear(*ours, torch.tensor(counts))
    upstream = normal(*out.shape, seed=3, dtype=torch.float32)
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
    for device, exact, linear in (("cuda", dtype, grouped_linear), ("cpu", torch.float64, plain_grouped_linear)):
        x_RI, weight_eOI, upstream = (each.to(device, exact, copy=True).requires_grad_() for each in values)
        out = linear(x_RI, weight_eOI, torch.tensor(counts, device=device))
        wanted = torch.autograd.grad(out, [x_RI, weight_eOI], upstream, allow_unused=True, materialize_grads=True)
        answers[device] = [out, *wanted]
    # sums of 64 products of size 1 are of size 8: bf16 rounds those by 8 * 2^-9, and some kernels do so twice
    tolerance = {"rtol": 2**-7, "atol": 2**-5} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for ours, wanted in zip(answers["cuda"], answers["cpu"], strict=True):
        torch.testing.assert_close(ours.cpu().double(), wanted, **tolerance)


def bowed(x: float) -> float:
    """Hendrycks & Gimpel, section 2: the approximation by tanh."""
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        # gates 1, -2, 0.5 and values 3, 4, 5
        ("swiglu", [3 / (1 + math.exp(-1)), -8 / (1 + math.exp(2)), 2.5 / (1 + math.exp(-0.5))]),
        ("geglu", [3 * phi(1), -8 * phi(-2), 2.5 * phi(0.5)]),
        ("gelu", [phi(1), -2 * phi(-2), 0.5 * phi(0.5), 3 * phi(3), 4 * phi(4), 5 * phi(5)]),
        ("gelu_tanh", [bowed(h) for h in (1, -2, 0.5, 3, 4, 5)]),
        ("relu", [1, 0, 0.5, 3, 4, 5]),
    ],
)
def test_activations_are_their_formulas(activation: str, expected: list[float]) -> None:
    """Hendrycks & Gimpel 2016, arXiv:1606.08415 (gelu); Shazeer 2020, arXiv:2002.05202, equation 5 (gated)."""
    h = torch.tensor([1, -2, 0.5, 3, 4, 5], dtype=torch.float64)
    assert activate(h, activation=activation).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_of_an_activation_is_its_slope(activation: str) -> None:
    h = normal(5, 6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: activate(h, activation=activation), h)


def plain_experts(experts: Experts, x_RD: Tensor, counts: list[int]) -> Tensor:
    """Row by row, by plain autograd."""
    rows, start = [], 0
    for expert, count in enumerate(counts):
        for x in x_RD[start : start + count]:
            h = experts.w_in[expert] @ x
            if experts.activation in ("swiglu", "geglu"):
                gate, up = h[: h.shape[0] // 2], h[h.shape[0] // 2 :]
                h = (F.silu(gate) if experts.activation == "swiglu" else F.gelu(gate)) * up
            else:
                h = F.gelu(h) if experts.activation == "gelu" else F.relu(h)
            rows.append(experts.w_out[expert] @ h)
        start += count
    return torch.stack(rows) if rows else x_RD.new_zeros(0, experts.w_out.shape[1])


def make_experts(activation: str, **given: float) -> Experts:
    experts = Experts(4, d_expert=6, activation=activation, global_ids=range(3), **given).double()
    with torch.no_grad():
        experts.w_in.copy_(normal(*experts.w_in.shape, seed=1))
        experts.w_out.copy_(normal(*experts.w_out.shape, seed=2))
    return experts


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_expert_answers_its_own_rows(activation: str, name: str) -> None:
    experts, counts = make_experts(activation), COUNTS[name]
    x_RD = normal(sum(counts), 4, seed=3).requires_grad_()
    wanted = [x_RD, experts.w_in, experts.w_out]
    out, expected = experts(x_RD, torch.tensor(counts)), plain_experts(experts, x_RD, counts)
    torch.testing.assert_close(out, expected)
    upstream = normal(*out.shape, seed=5)
    gradients = torch.autograd.grad(out, wanted, upstream)
    if expected.requires_grad:
        plain = torch.autograd.grad(expected, wanted, upstream, allow_unused=True, materialize_grads=True)
    else:
        plain = [torch.zeros_like(each) for each in wanted]
    for gradient, each in zip(gradients, plain, strict=True):
        torch.testing.assert_close(gradient, each)
    for expert, count in enumerate(counts):
        if count == 0:
            assert not gradients[1][expert].any(), "an expert without rows must have a gradient of zeros"


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2**-6)], ids=["fp64", "bf16"]
)
def test_blocks_of_rows_and_rows_computed_beyond_them_change_nothing(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two rows, and in bf16 products of three or five rows, so that they reach into the next experts'."""
    monkeypatch.setattr(experts_module, "BLOCK_ROWS", 2)
    monkeypatch.setattr(experts_module, "ROW_STEPS", ((1, 3), (2, 5)))
    counts = COUNTS[name]
    answers = []
    for kind, answer in ((dtype, lambda e, x: e(x, torch.tensor(counts))),
                         (torch.float64, lambda e, x: plain_experts(e, x, counts))):  # fmt: skip
        experts = make_experts("swiglu").to(dtype).to(kind)
        x_RD = normal(sum(counts), 4, seed=3, dtype=dtype).to(kind).requires_grad_()
        out = answer(experts, x_RD)
        (out * normal(*out.shape, seed=5).to(kind)).sum().backward() if out.requires_grad else None
        gradients = [x_RD.grad, experts.w_in.grad, experts.w_out.grad]
        answers.append([out, *(torch.zeros(()) if each is None else each for each in gradients)])
    for ours, plain in zip(*answers, strict=True):
        assert (ours.double() - plain.double()).norm() <= tolerance * plain.double().norm()


def test_a_gradient_need_not_be_a_block_of_memory() -> None:
    experts, x_RD = make_experts("swiglu"), normal(5, 4, seed=3).requires_grad_()
    # the gradient of a sum is one number seen from every place
    experts(x_RD, torch.tensor([2, 3, 0])).sum().backward()
    (expected,) = torch.autograd.grad(plain_experts(experts, x_RD, [2, 3, 0]).sum(), x_RD)
    torch.testing.assert_close(x_RD.grad, expected)


def test_expert_dropout_leaves_hidden_units_out_in_training_alone() -> None:
    """With maps that are the identity the answer shows which units stayed, and the gradient must follow."""
    experts = Experts(400, d_expert=400, activation="relu", global_ids=range(1), dropout=0.25).double()
    with torch.no_grad():
        experts.w_in.copy_(torch.eye(400))
        experts.w_out.copy_(torch.eye(400))
    x_RD = torch.ones(50, 400, dtype=torch.float64, requires_grad=True)
    out = experts(x_RD, torch.tensor([50]))
    (gradient,) = torch.autograd.grad(out.sum(), x_RD)
    assert set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert (out == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(gradient, out.detach())
    experts.eval()
    torch.testing.assert_close(experts(x_RD, torch.tensor([50])), x_RD)
