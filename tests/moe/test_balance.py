"""The routers' losses against plain loops and transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain.moe.balance import balance_loss, sequence_balance_loss, z_loss

NUM_TOKENS, NUM_EXPERTS = 12, 4


def logits(tokens: int = NUM_TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)) * 2


def shares(logit_TE: Tensor, *, top_k: int) -> Tensor:
    count_E = torch.bincount(logit_TE.topk(top_k).indices.flatten(), minlength=NUM_EXPERTS)
    return count_E / count_E.sum()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_the_sum_of_shares_times_mean_probabilities(top_k: int) -> None:
    prob_TE = logits().softmax(-1)
    expected = 0.0
    for expert in range(NUM_EXPERTS):
        sent, probability = 0, 0.0
        for row in prob_TE.tolist():
            sent += expert in sorted(range(NUM_EXPERTS), key=lambda i: -row[i])[:top_k]
            probability += row[expert]
        expected += NUM_EXPERTS * (sent / (NUM_TOKENS * top_k)) * (probability / NUM_TOKENS)
    loss = balance_loss(prob_TE, shares(prob_TE, top_k=top_k))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_balance_loss_is_one_under_uniform_load_and_one_per_expert_when_collapsed() -> None:
    """Switch, section 2.2."""
    uniform = balance_loss(logits().softmax(-1), torch.full((NUM_EXPERTS,), 1 / NUM_EXPERTS))
    assert uniform.item() == pytest.approx(1.0)
    one_hot = torch.eye(NUM_EXPERTS)[[2] * NUM_TOKENS]
    collapsed = balance_loss(one_hot, torch.tensor([0.0, 0, 1, 0]))
    assert collapsed.item() == pytest.approx(NUM_EXPERTS)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_transformers_balance_loss_is_top_k_times_ours(top_k: int) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logit_TE = logits()
    theirs = mixtral.load_balancing_loss_func((logit_TE,), num_experts=NUM_EXPERTS, top_k=top_k)
    ours = balance_loss(logit_TE.softmax(-1), shares(logit_TE, top_k=top_k))
    torch.testing.assert_close(theirs, top_k * ours)


def test_balance_gradient_flows_through_the_probabilities_alone() -> None:
    """d/dP_ti of E sum_i f_i mean_t P_ti is E f_i / T: the counts are constants (Switch, section 2.2)."""
    prob_TE = logits().softmax(-1).requires_grad_()
    balance_loss(prob_TE, torch.tensor([6, 3, 2, 1]) / 12).backward()
    row = [NUM_EXPERTS * share / 12 / NUM_TOKENS for share in (6, 3, 2, 1)]
    torch.testing.assert_close(prob_TE.grad, torch.tensor([row] * NUM_TOKENS))


@pytest.mark.parametrize("masked", [False, True], ids=["all choices", "first choices"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_by_sequence_is_the_mean_of_each_sequences_own(top_k: int, masked: bool) -> None:
    """DeepSeek-V3, equations 17 to 20, over three sequences of four tokens."""
    logit_TE = logits()
    prob_TE, expert_TK = logit_TE.softmax(-1), logit_TE.topk(top_k).indices
    expected = 0.0
    for first in range(0, NUM_TOKENS, 4):
        for expert in range(NUM_EXPERTS):
            chosen = [row[:1] if masked else row for row in expert_TK[first : first + 4].tolist()]
            share = sum(row.count(expert) for row in chosen) / sum(map(len, chosen))
            probability = sum(prob_TE[first : first + 4, expert].tolist()) / 4
            expected += NUM_EXPERTS * share * probability / 3
    where_TK = (torch.arange(top_k) == 0).expand_as(expert_TK) if masked else None
    loss = sequence_balance_loss(prob_TE, expert_TK, length=4, where_TK=where_TK)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_balance_loss_by_sequence_is_finite_where_no_expert_chose_a_token() -> None:
    prob_TE, expert_TE = logits(4).softmax(-1), torch.arange(NUM_EXPERTS).expand(4, NUM_EXPERTS)
    chosen_TE = torch.tensor([[True] * NUM_EXPERTS] * 2 + [[False] * NUM_EXPERTS] * 2)
    loss = sequence_balance_loss(prob_TE, expert_TE, length=2, where_TK=chosen_TE)
    # even in the first sequence, and nothing in the second
    assert loss.item() == pytest.approx(0.5)


def test_z_loss_is_the_mean_square_of_the_log_of_summed_exponentials() -> None:
    logit_TE = logits()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logit_TE.tolist()) / NUM_TOKENS
    assert z_loss(logit_TE).item() == pytest.approx(expected, rel=1e-6)


def test_z_loss_is_that_of_transformers() -> None:
    switch = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    torch.testing.assert_close(z_loss(logits()), switch.router_z_loss_func(logits().unsqueeze(0)))
