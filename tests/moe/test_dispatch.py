"""Dispatch and combine on one process; tests/moe/test_expert_parallel.py has them on several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from moetrain.moe import dispatch as dispatch_module
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.routing import Routing, make_routing

EXPERTS_OF_TOKENS = {
    "top-1": [[1], [0], [2], [1], [1]],
    "top-2": [[1, 2], [0, 2], [2, 1], [1, 0], [1, 2]],
    "every expert": [[2, 0, 1], [0, 1, 2], [1, 2, 0]],
    "one expert takes all": [[2], [2], [2]],
    "an expert without tokens": [[0, 2], [2, 0]],
    "one token": [[2, 1]],
}
NUM_EXPERTS, D_MODEL = 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing_to(chosen: list[list[int]], weight_TK: Tensor) -> Routing:
    return make_routing(torch.tensor(chosen), weight_TK=weight_TK, num_experts=NUM_EXPERTS)


@pytest.mark.parametrize("name", EXPERTS_OF_TOKENS)
def test_rows_are_the_tokens_of_each_expert_in_turn(name: str) -> None:
    chosen = EXPERTS_OF_TOKENS[name]
    x_TD, routing = normal(len(chosen), D_MODEL), routing_to(chosen, normal(len(chosen), len(chosen[0])))
    rows = Dispatcher(None).dispatch(x_TD, routing)
    expected = [x for expert in range(NUM_EXPERTS) for x, mine in zip(x_TD, chosen, strict=True) if expert in mine]
    assert torch.equal(rows.x_RD, torch.stack(expected))
    assert rows.count_e.tolist() == [sum(expert in mine for mine in chosen) for expert in range(NUM_EXPERTS)]


@pytest.mark.parametrize("name", EXPERTS_OF_TOKENS)
def test_combine_weighs_and_adds_up_what_the_experts_answered(name: str) -> None:
    """Expert i answers (i + 1) x, so a token gets x times the sum of weight * (i + 1)."""
    chosen = EXPERTS_OF_TOKENS[name]
    x_TD, weight_TK = normal(len(chosen), D_MODEL), normal(len(chosen), len(chosen[0]), seed=1)
    dispatcher = Dispatcher(None)
    rows = dispatcher.dispatch(x_TD, routing_to(chosen, weight_TK))
    factor_R = torch.arange(1.0, NUM_EXPERTS + 1, dtype=torch.float64).repeat_interleave(rows.count_e)
    y_TD = dispatcher.combine(rows.x_RD * factor_R.unsqueeze(1), rows.receipt)
    for token, experts in enumerate(chosen):
        factor = sum(weight_TK[token, k].item() * (expert + 1) for k, expert in enumerate(experts))
        torch.testing.assert_close(y_TD[token], x_TD[token] * factor)


SENT = {
    "some": [[1, 0], [0, 0], [1, 1], [0, 1]],
    "none": [[0, 0], [0, 0], [0, 0], [0, 0]],
    "all": [[1, 1], [1, 1], [1, 1], [1, 1]],
    "one": [[0, 0], [0, 1], [0, 0], [0, 0]],
}


@pytest.mark.parametrize("name", SENT)
def test_copies_that_do_not_travel_are_left_out(name: str) -> None:
    """Rows, answers and all gradients against a loop over the copies that travel; the other tokens get exact zeros."""
    chosen, sent, factors = [[1, 2], [0, 2], [2, 1], [1, 0]], SENT[name], [2.0, 3.0, 5.0]
    leaves = [normal(4, D_MODEL), normal(4, 2, seed=1)]
    x_TD, weight_TK, x_plain, weight_plain = (leaf.clone().requires_grad_() for leaf in leaves * 2)
    routing = make_routing(
        torch.tensor(chosen), weight_TK=weight_TK, num_experts=NUM_EXPERTS, sent_TK=torch.tensor(sent) == 1
    )
    dispatcher = Dispatcher(None)
    rows = dispatcher.dispatch(x_TD, routing)
    copies = sorted((chosen[t][k], t) for t in range(4) for k in range(2) if sent[t][k])
    assert torch.equal(rows.x_RD, x_TD[[t for _, t in copies]])
    counts = [sum(expert == e for e, _ in copies) for expert in range(NUM_EXPERTS)]
    assert rows.count_e.tolist() == counts
    factor_R = torch.tensor(factors, dtype=torch.float64).repeat_interleave(rows.count_e)
    y_TD = dispatcher.combine(rows.x_RD * factor_R.unsqueeze(1), rows.receipt)

    expected = torch.stack(
        [sum(weight_plain[t, k] * factors[chosen[t][k]] * sent[t][k] for k in range(2)) * x_plain[t] for t in range(4)]
    )
    torch.testing.assert_close(y_TD, expected)
    assert all(not y_TD[t].any() for t in range(4) if not any(sent[t]))
    upstream = normal(4, D_MODEL, seed=2)
    y_TD.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x_TD.grad, x_plain.grad)
    torch.testing.assert_close(weight_TK.grad, weight_plain.grad)


@pytest.mark.parametrize("name", ["some", "all", "one"])
def test_rows_of_copies_that_stay_behind_may_hold_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a single CUDA device, which does not wait to learn how many rows travel: answers and gradients are the
    same, although the rows after them, which no expert writes, are NaN both ways."""
    chosen, sent = [[1, 2], [0, 2], [2, 1], [1, 0]], torch.tensor(SENT[name]) == 1
    sort, found = dispatch_module._sort, {}
    for cut in (True, False):
        monkeypatch.setattr(dispatch_module, "_sort", lambda routing, cut, kept=cut: sort(routing, cut=kept))
        x_TD, weight_TK = normal(4, D_MODEL).requires_grad_(), normal(4, 2, seed=1).requires_grad_()
        routing = make_routing(torch.tensor(chosen), weight_TK=weight_TK, num_experts=NUM_EXPERTS, sent_TK=sent)
        rows = Dispatcher(None).dispatch(x_TD, routing)
        assert rows.x_RD.shape[0] == (int(sent.sum()) if cut else 8)
        y_RD = _SquareOrNaN.apply(rows.x_RD, int(sent.sum()))
        y_TD = Dispatcher(None).combine(y_RD, rows.receipt)
        found[cut] = [y_TD, *torch.autograd.grad(y_TD, [x_TD, weight_TK], normal(4, D_MODEL, seed=2))]
    for alone, usual in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(alone, usual, rtol=0, atol=0)


class _SquareOrNaN(torch.autograd.Function):
    """Squares of the first rows; neither the others nor their gradients are written."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(x_RD)
        ctx.rows = rows
        return torch.cat([x_RD[:rows].square(), torch.full_like(x_RD[rows:], torch.nan)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x_RD,) = ctx.saved_tensors
        own = 2 * x_RD[: ctx.rows] * grads[0][: ctx.rows]
        return torch.cat([own, torch.full_like(x_RD[ctx.rows :], torch.nan)]), None


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", EXPERTS_OF_TOKENS)
def test_gradients_are_those_of_finite_differences(name: str, activation: str) -> None:
    """Through the tokens, both maps of the experts and the routing weights, for a fixed choice of experts."""
    chosen = EXPERTS_OF_TOKENS[name]
    experts = Experts(D_MODEL, d_expert=2, activation=activation, global_ids=range(NUM_EXPERTS))
    dispatcher = Dispatcher(None)

    def layer(x_TD: Tensor, weight_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        rows = dispatcher.dispatch(x_TD, routing_to(chosen, weight_TK))
        y_RD = functional_call(experts, {"w_in": w_in, "w_out": w_out}, (rows.x_RD, rows.count_e))
        return dispatcher.combine(y_RD, rows.receipt)

    shapes = [(len(chosen), D_MODEL), (len(chosen), len(chosen[0])), experts.w_in.shape, experts.w_out.shape]
    inputs = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(layer, inputs)
