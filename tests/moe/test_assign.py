"""What only these routers promise; their formulas are held in tests/moe/test_every_router.py."""

from __future__ import annotations

import math

import pytest
import torch
from plain_routers import D_MODEL, NUM_EXPERTS, TOP_K, make_router, normal
from torch import Tensor

from moetrain.moe.assign import BalancedRouter, hash_table, sinkhorn

FREQUENCY_V = torch.tensor([1000, 1, 300, 300, 5, 0, 250, 150, 90, 4, 400, 0])


@pytest.mark.parametrize(("tokens", "room"), [(24, 6), (27, 6), (3, 1), (2, 1), (1, 1)])
def test_expert_choice_fills_every_expert_alike(tokens: int, room: int) -> None:
    """T K / E tokens each, rounded down, and at least one, where there are fewer tokens than experts."""
    routing = make_router("expert_choice", training=True)(normal(tokens, D_MODEL))
    assert routing.count_E.tolist() == routing.sent_E.tolist() == [room] * NUM_EXPERTS
    assert room == max(1, tokens * TOP_K // NUM_EXPERTS)
    if tokens == 24:
        called = routing.sent_TK.sum(1).tolist()
        assert min(called) < TOP_K < max(called), "not every token gets as many"


def test_sinkhorn_makes_rows_and_columns_even() -> None:
    plan_TE = sinkhorn(3 * normal(24, NUM_EXPERTS), iterations=200)
    torch.testing.assert_close(plan_TE.sum(1), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(plan_TE.sum(0), torch.full((NUM_EXPERTS,), 24 / NUM_EXPERTS, dtype=torch.float64))


def test_sinkhorn_by_hand() -> None:
    """exp(score) = [[4, 1], [1, 1]]: columns to 1, [[4/5, 1/2], [1/5, 1/2]]; then rows, by 13/10 and 7/10."""
    plan_TE = sinkhorn(torch.tensor([[math.log(4), 0.0], [0.0, 0.0]]), iterations=1)
    torch.testing.assert_close(plan_TE, torch.tensor([[8 / 13, 5 / 13], [2 / 7, 5 / 7]]))


def test_sinkhorn_takes_scores_that_no_exponential_does() -> None:
    assert sinkhorn(1000 * normal(24, NUM_EXPERTS), iterations=8).isfinite().all()


def test_sinkhorn_spreads_tokens_that_all_like_one_expert() -> None:
    x_TD, router = normal(60, D_MODEL), make_router("sinkhorn", training=True)
    x_TD[:, 0] = 1.0
    with torch.no_grad():
        router.weight[2, 0] = 9.0
    assert router.eval()(x_TD).count_E[2] == 60
    assert router.train()(x_TD).count_E[2] < 30


@pytest.mark.parametrize("seed", range(5))
def test_the_balanced_table_deals_the_commonest_tokens_to_the_emptiest_expert(seed: int) -> None:
    """By hand: 1000; 400 + 250 + 90 + 5 + 4 + 1; 300 + 300 + 150."""
    table_V = hash_table(vocab_size=12, num_experts=3, seed=seed, frequency_V=FREQUENCY_V)
    members = [sorted(FREQUENCY_V[table_V == expert].tolist(), reverse=True) for expert in range(3)]
    told = sorted([each for each in mine if each] for mine in members)
    assert told == [[300, 300, 150], [400, 250, 90, 5, 4, 1], [1000]]


@pytest.mark.parametrize("seed", range(5))
def test_the_random_table_gives_every_expert_as_many_ids(seed: int) -> None:
    table_V = hash_table(vocab_size=13, num_experts=3, seed=seed, frequency_V=None)
    assert sorted(torch.bincount(table_V, minlength=3).tolist()) == [4, 4, 5]


@pytest.mark.parametrize("frequency_V", [None, torch.ones(200)], ids=["random", "balanced"])
def test_a_table_is_a_function_of_the_seed_alone(frequency_V: Tensor | None) -> None:
    torch.manual_seed(1)
    first = hash_table(vocab_size=200, num_experts=4, seed=7, frequency_V=frequency_V)
    torch.manual_seed(2)
    assert torch.equal(hash_table(vocab_size=200, num_experts=4, seed=7, frequency_V=frequency_V), first)
    assert not torch.equal(hash_table(vocab_size=200, num_experts=4, seed=8, frequency_V=frequency_V), first)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(6, 2, 12), (6, 4, 3), (5, 3, 7), (4, 4, 3)])
def test_balanced_gives_no_expert_more_than_a_copy_more_than_another(experts: int, top_k: int, tokens: int) -> None:
    routing = BalancedRouter(num_experts=experts, top_k=top_k)(normal(tokens, D_MODEL))
    assert routing.count_E.max() - routing.count_E.min() <= (tokens * top_k % experts > 0)
    assert all(len(set(row)) == top_k for row in routing.expert_TK.tolist()), "no expert twice for a token"


@pytest.mark.parametrize("name", ["hash", "balanced"])
def test_a_router_without_scores_has_no_losses_to_learn_from(name: str) -> None:
    router = make_router(name, training=True)
    routing = router(normal(4, D_MODEL), torch.zeros(4, dtype=torch.int64))
    assert routing.logit_TE is None
    assert routing.prob_TE is None
    assert not routing.losses
    assert not list(router.parameters())
