"""The router against a loop over tokens that follows the papers' formulas."""

from __future__ import annotations

import math
import statistics

import plain_routers as every_router
import pytest
import torch
from torch import Tensor

from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.router import GShardRouter, NoisyTopKRouter, SigmoidBiasRouter, TopKRouter, best_groups

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


@pytest.mark.parametrize("training", [True, False])
def test_importance_and_load_are_those_of_shazeer_et_al(training: bool) -> None:
    """Equations 6 to 11, in a loop over tokens and experts."""
    router, x_TD = every_router.make_router("noisy_top_k", training=training), every_router.normal(9, 5)
    torch.manual_seed(0)
    losses = router(x_TD).losses
    torch.manual_seed(0)
    noise = torch.randn(9, 8, dtype=torch.float64)
    importance, load = [0.0] * 8, [0.0] * 8
    for x, normal_E in zip(x_TD, noise, strict=True):
        noisy = every_router.noisy_scores(x, router, normal_E=normal_E if training else None).tolist()
        best = sorted(range(8), key=lambda i: -noisy[i])[:2]
        for expert, weight in zip(best, plain_softmax([noisy[i] for i in best]), strict=True):
            importance[expert] += weight
        clean, spread = (router.weight @ x).tolist(), (1 + (router.noise_weight @ x).exp()).log().tolist()
        for expert in range(8):
            second_of_others = sorted(noisy[:expert] + noisy[expert + 1 :])[-2]
            load[expert] += statistics.NormalDist().cdf((clean[expert] - second_of_others) / spread[expert])
    assert losses["importance"].item() == pytest.approx(plain_cv(importance) ** 2, rel=1e-9)
    assert ("load" in losses) == training, "without noise there is nothing smooth to tell"
    if training:
        assert losses["load"].item() == pytest.approx(plain_cv(load) ** 2, rel=1e-9)


def plain_cv(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


def test_the_smooth_load_moves_towards_the_true_load_of_many_draws() -> None:
    """Appendix A: P(x, i) is the chance that i is chosen when its own noise alone is drawn anew."""
    router, x_TD = every_router.make_router("noisy_top_k", training=True), every_router.normal(1, 5)
    torch.manual_seed(0)
    first = torch.randn(1, 8, dtype=torch.float64)[0]
    clean, spread = router.weight @ x_TD[0], (1 + (router.noise_weight @ x_TD[0]).exp()).log()
    drawn = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chance = []
    for expert in range(8):
        others = torch.cat([(clean + first * spread)[:expert], (clean + first * spread)[expert + 1 :]])
        own = clean[expert] + drawn * spread[expert]
        chance.append((own > others.sort().values[-2]).double().mean().item())
    torch.manual_seed(0)
    assert router(x_TD).losses["load"].item() == pytest.approx(plain_cv(chance) ** 2, rel=0.05)


def test_without_a_choice_every_expert_has_the_same_load() -> None:
    router = NoisyTopKRouter(D_MODEL, num_experts=3, top_k=3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    assert router(tokens()).losses["load"].item() == 0


def test_gshard_calls_the_second_expert_as_often_as_twice_its_weight() -> None:
    """g2 = 1/4: in half of the calls; never more than always."""
    router = GShardRouter(1, num_experts=3)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[math.log(3.0)], [0.0], [-9.0]]))
    torch.manual_seed(0)
    routing = router(torch.ones(10_000, 1))
    assert routing.weight_TK[0].tolist() == pytest.approx([0.75, 0.25])
    assert routing.sent_E[0] == 10_000
    # five standard errors of a share of 10,000
    assert routing.sent_E[1].item() / 10_000 == pytest.approx(0.5, abs=0.025)
    assert routing.count_E.tolist() == [10_000, 10_000, 0]
    with torch.no_grad():
        router.weight[0] = 0.0
    assert router(torch.ones(1000, 1)).sent_E[:2].tolist() == [1000, 1000]


def test_gshards_balance_loss_counts_first_choices() -> None:
    router, x_TD = every_router.make_router("gshard", training=True), every_router.normal(9, 5)
    layer = MoELayer(
        router,
        experts=Experts(5, d_expert=2, activation="gelu", global_ids=range(8)).double(),
        dispatcher=Dispatcher(None),
    )
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
    gates = [plain_softmax((router.weight @ x).tolist()) for x in x_TD]
    firsts = [row.index(max(row)) for row in gates]
    expected = 8 * sum(firsts.count(e) / 9 * sum(row[e] for row in gates) / 9 for e in range(8))
    # the router in training draws whom it calls; the loss sees none of it
    assert layer(x_TD).load.chosen_E.tolist() == [firsts.count(e) for e in range(8)]
    layer.balance_scope = "micro_batch"
    assert layer(x_TD).losses["balance"].item() == pytest.approx(expected)


def test_bias_moves_against_the_load_by_hand() -> None:
    """Mean 5: the first had fewer, the second more, the third as many."""
    router = SigmoidBiasRouter(D_MODEL, num_experts=3, top_k=2, update_rate=0.25, scale=1.0)
    router.after_step(torch.tensor([1, 9, 5]))
    router.after_step(torch.tensor([4, 9, 2]))
    assert router.bias_E.tolist() == [0.5, -0.5, 0.25]


def test_bias_changes_the_choice_and_neither_weights_nor_gradients() -> None:
    router, x_TD = every_router.make_router("sigmoid_bias", training=True), every_router.normal(9, 5)
    router.bias_E = torch.tensor([9.0, 0, 0, 9.0, 0, 0, 0, 0])
    routing = router(x_TD)
    assert {frozenset(row) for row in routing.expert_TK.tolist()} == {frozenset({0, 3})}
    s = (x_TD @ router.weight.T).sigmoid().gather(1, routing.expert_TK)
    torch.testing.assert_close(routing.weight_TK, every_router.SCALE * s / s.sum(1, keepdim=True))
    assert not router.bias_E.requires_grad
    assert "bias_E" not in dict(router.named_buffers())


def test_bias_evens_out_a_skewed_load() -> None:
    router, x_TD = every_router.make_router("sigmoid_bias", training=True), every_router.normal(200, 5)
    router.bias_E = torch.zeros(8)
    router.update_rate = 0.002
    before = router(x_TD).count_E
    for _ in range(400):
        router.after_step(router(x_TD).count_E)
    after = router(x_TD).count_E
    assert before.max() > 1.3 * 200 * 2 / 8
    assert after.max() < 1.1 * 200 * 2 / 8


def test_best_groups_by_hand() -> None:
    """Sums of the two best of each three: 5 + 1, 3 + 3.5, 4 + 0; the best alone would take the first and the third."""
    score_TE = torch.tensor([[5.0, 1.0, 0.5, 3.0, 3.5, 3.0, 4.0, 0.0, -1.0]])
    one, two = (best_groups(score_TE, num_groups=3, top_groups=n).int()[0].tolist() for n in (1, 2))
    assert one == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert two == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    single = best_groups(torch.tensor([[1.0, 3.0, 2.0]]), num_groups=3, top_groups=2)
    assert single.tolist() == [[False, True, True]]
