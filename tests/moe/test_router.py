"""The router against a loop over tokens that follows the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain.moe.router import TopKRouter

D_MODEL, NUM_EXPERTS = 6, 5


def make_router(*, top_k: int, renormalize: bool = True, seed: int = 0) -> TopKRouter:
    router = TopKRouter(D_MODEL, num_experts=NUM_EXPERTS, top_k=top_k, renormalize=renormalize)
    with torch.no_grad():
        router.weight.copy_(torch.randn(NUM_EXPERTS, D_MODEL, generator=torch.Generator().manual_seed(seed)))
    return router


def tokens(count: int = 17, seed: int = 1) -> Tensor:
    return torch.randn(count, D_MODEL, generator=torch.Generator().manual_seed(seed))


def plain_logits(x: list[float], weight: list[list[float]]) -> list[float]:
    return [sum(w * each for w, each in zip(row, x, strict=True)) for row in weight]


def plain_softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3, NUM_EXPERTS])
def test_routing_follows_the_formulas_token_by_token(top_k: int, renormalize: bool) -> None:
    """Mixtral 2.1: softmax over the kept scores; Switch equation 2: share of the softmax over all."""
    router, x_TD = make_router(top_k=top_k, renormalize=renormalize), tokens()
    routing = router(x_TD)
    counts = [0] * NUM_EXPERTS
    for token, x in enumerate(x_TD.tolist()):
        logits = plain_logits(x, router.weight.tolist())
        best = sorted(range(NUM_EXPERTS), key=lambda expert: -logits[expert])[:top_k]
        shares = plain_softmax(logits)
        kept = plain_softmax([logits[expert] for expert in best]) if renormalize else [shares[e] for e in best]
        assert routing.expert_TK[token].tolist() == best
        assert routing.weight_TK[token].tolist() == pytest.approx(kept, rel=1e-5)
        assert routing.logit_TE[token].tolist() == pytest.approx(logits, rel=1e-5, abs=1e-6)
        assert routing.prob_TE[token].tolist() == pytest.approx(shares, rel=1e-5)
        for expert in best:
            counts[expert] += 1
    assert routing.count_E.tolist() == counts


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_weights_gradient_reaches_the_router(renormalize: bool) -> None:
    """Against float64 autograd of softmax over the kept, or over all, scores."""
    router, x_TD = make_router(top_k=2, renormalize=renormalize), tokens()
    routing = router(x_TD)
    upstream_TK = torch.randn(routing.weight_TK.shape, generator=torch.Generator().manual_seed(2))
    (routing.weight_TK * upstream_TK).sum().backward()

    weight = router.weight.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for token, x in enumerate(x_TD.double()):
        logits, chosen = weight @ x, routing.expert_TK[token]
        kept = logits[chosen].softmax(0) if renormalize else logits.softmax(0)[chosen]
        total = total + kept @ upstream_TK[token].double()
    total.backward()
    torch.testing.assert_close(router.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_an_expert_nobody_chooses_is_counted_as_zero() -> None:
    router = make_router(top_k=1)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2] = 1.0
    assert router(torch.ones(3, D_MODEL)).count_E.tolist() == [0, 0, 3, 0, 0]


def test_scores_are_float32_in_a_bf16_model() -> None:
    router = make_router(top_k=2).bfloat16()
    x_TD = tokens().bfloat16()
    exact = x_TD.double() @ router.weight.double().T
    # else the check below would hold for bf16 scores too
    assert not torch.allclose((x_TD @ router.weight.T).double(), exact, rtol=1e-5, atol=1e-5)
    routing = router(x_TD)
    assert routing.logit_TE.dtype == routing.prob_TE.dtype == routing.weight_TK.dtype == torch.float32
    torch.testing.assert_close(routing.logit_TE.double(), exact, rtol=1e-5, atol=1e-5)


def test_scores_are_float32_under_autocast() -> None:
    router, x_TD = make_router(top_k=2), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert torch.equal(routing.logit_TE, router(x_TD).logit_TE)


def test_equal_inputs_are_routed_equally_every_time() -> None:
    router, x_TD = make_router(top_k=3), tokens(256)
    first, second = router(x_TD), router(x_TD)
    for name in ("expert_TK", "weight_TK", "logit_TE", "prob_TE", "count_E"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
