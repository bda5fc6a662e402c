"""What holds for every router: its formula, alone and in the layer; chance, gradients, replay, causality."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_routers import CASES, D_MODEL, NUM_EXPERTS, Called, make_router, normal, plain_routing, token_ids
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts, SharedExpert
from moetrain.moe.layer import Capacity, MoELayer, MoEOutput
from moetrain.moe.routing import Routing

TOKENS, D_EXPERT = 12, 4
EVERY_ROUTER = pytest.mark.parametrize("name", CASES)
BOTH_MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def route(router: nn.Module, x_TD: Tensor, *, seed: int = 0) -> Routing:
    torch.manual_seed(seed)
    routing: Routing = router(x_TD, token_ids(len(x_TD)))
    return routing


def called_by(routing: Routing) -> Called:
    """As the plain routers tell it."""
    sent_TK = torch.ones_like(routing.expert_TK) if routing.sent_TK is None else routing.sent_TK
    return [
        {int(e): w for e, w, sent in zip(*row, strict=True) if sent}
        for row in zip(routing.expert_TK, routing.weight_TK, sent_TK, strict=True)
    ]


def make_layer(
    name: str, *, training: bool, shared: SharedExpert | None = None, dropout: float = 0.0, **settings: Any
) -> MoELayer:
    experts = Experts(D_MODEL, d_expert=D_EXPERT, activation="swiglu", global_ids=range(NUM_EXPERTS), dropout=dropout)
    layer = MoELayer(
        make_router(name, training=training),
        experts=experts,
        dispatcher=Dispatcher(None),
        shared=shared,
        **settings,
    )
    with torch.no_grad():
        for module in (layer.experts, *([layer.shared] if layer.shared else [])):
            for seed, parameter in enumerate(module.double().parameters()):
                parameter.copy_(normal(*parameter.shape, seed=200 + seed))
    return layer.train(training)


def run(layer: MoELayer, x_TD: Tensor, *, seed: int = 0, replay: Any = None) -> MoEOutput:
    torch.manual_seed(seed)
    answer: MoEOutput = layer(x_TD, token_ids(len(x_TD)), replay)
    return answer


def enough(name: str, tokens: int, *, training: bool) -> int:
    # the doubly even plan of a single token is 1/E everywhere: every choice is as good as any
    return max(2, tokens) if name.startswith("sinkhorn") and training else tokens


def swiglu(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    width = w_out.shape[1]
    return w_out @ (F.silu(w_in[:width] @ x) * (w_in[width:] @ x))


@EVERY_ROUTER
@BOTH_MODES
@pytest.mark.parametrize("tokens", [1, 3, 24])
def test_choice_weights_and_counts_follow_the_formula(name: str, training: bool, tokens: int) -> None:
    tokens = enough(name, tokens, training=training)
    router, x_TD = make_router(name, training=training), normal(tokens, D_MODEL)
    routing = route(router, x_TD)
    expected = plain_routing(name, x_TD, router, token_T=token_ids(tokens), training=training)
    found = called_by(routing)
    assert [set(row) for row in found] == [set(row) for row in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for expert, weight in theirs.items():
            torch.testing.assert_close(mine[expert], weight.to(mine[expert].dtype))
    counts = [sum(expert in row for row in expected) for expert in range(NUM_EXPERTS)]
    assert routing.sent_E.tolist() == counts
    if routing.prob_TE is not None:
        torch.testing.assert_close(routing.prob_TE.sum(1), torch.ones(tokens, dtype=torch.float64))


@EVERY_ROUTER
def test_evaluation_leaves_nothing_to_chance(name: str) -> None:
    router, x_TD = make_router(name, training=False), normal(TOKENS, D_MODEL)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = route(router, x_TD), route(router, x_TD, seed=1)
    torch.manual_seed(0)
    router(x_TD, token_ids(TOKENS))
    assert torch.equal(torch.get_rng_state(), state), "a random number was drawn"
    assert torch.equal(first.expert_TK, second.expert_TK)
    assert torch.equal(first.weight_TK, second.weight_TK)


@EVERY_ROUTER
def test_chance_in_training_comes_from_torchs_generator_alone(name: str) -> None:
    router, x_TD = make_router(name, training=True), normal(64, D_MODEL)
    first, again, other = (route(router, x_TD, seed=seed) for seed in (0, 0, 1))
    for field in ("expert_TK", "weight_TK", "sent_E"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    differs = not (torch.equal(first.weight_TK, other.weight_TK) and torch.equal(first.sent_E, other.sent_E))
    assert differs == (CASES[name].draw is not None)


@EVERY_ROUTER
def test_gradients_of_weights_and_losses_are_those_of_finite_differences(name: str) -> None:
    """Balance loss and z-loss included, and the router's own."""
    layer, x_TD = make_layer(name, training=True, balance_scope="micro_batch"), normal(TOKENS, D_MODEL).requires_grad_()
    names = [each for each, _ in layer.router.named_parameters()]

    def outputs(x_TD: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        own, token_T = dict(zip(names, parameters, strict=True)), token_ids(TOKENS)
        torch.manual_seed(0)
        routing = functional_call(layer.router, own, (x_TD, token_T))
        torch.manual_seed(0)
        answer = functional_call(layer, {f"router.{name}": each for name, each in own.items()}, (x_TD, token_T))
        return (routing.weight_TK + 0 * x_TD.sum(), *answer.losses.values())

    inputs = [parameter.detach().clone().requires_grad_() for parameter in layer.router.parameters()]
    assert torch.autograd.gradcheck(outputs, (x_TD, *inputs))
    learns = torch.autograd.grad(outputs(x_TD, *inputs)[0].square().sum(), inputs) if inputs else []
    assert all(gradient.abs().max() > 1e-3 for gradient in learns)


def plain_layer(layer: MoELayer, x_TD: Tensor, called: Called) -> Tensor:
    answers = []
    for x, experts in zip(x_TD, called, strict=True):
        answer = torch.zeros_like(x)
        for expert, weight in experts.items():
            answer = answer + weight * swiglu(x, layer.experts.w_in[expert], layer.experts.w_out[expert])
        if layer.shared is not None:
            extra = swiglu(x, layer.shared.w_in.weight, layer.shared.w_out.weight)
            if layer.shared.gate is not None:
                extra = extra / (1 + (-(layer.shared.gate.weight[0] @ x)).exp())
            answer = answer + extra
        answers.append(answer)
    return torch.stack(answers)


def assert_layer_is_the_loop(name: str, layer: MoELayer, x_TD: Tensor, *, training: bool) -> None:
    """Outputs, and the gradients of the input and of every weight; none is left without one."""
    plain, ours, theirs = copy.deepcopy(layer), x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    called = plain_routing(name, theirs, plain.router, token_T=token_ids(len(x_TD)), training=training)
    expected, upstream = plain_layer(plain, theirs, called), normal(*x_TD.shape, seed=7)
    answer = run(layer, ours).hidden_TD
    # the weights of the routers that learn nothing are float32
    torch.testing.assert_close(answer, expected, rtol=1e-7, atol=1e-7)
    answer.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    for (which, mine), other in zip(layer.named_parameters(), plain.parameters(), strict=True):
        grad = torch.zeros_like(mine) if other.grad is None else other.grad
        found = torch.zeros_like(mine) if mine.grad is None else mine.grad
        torch.testing.assert_close(found, grad, rtol=1e-6, atol=1e-6, msg=lambda text, which=which: f"{which}: {text}")
        assert mine.grad is not None or which.startswith("router."), which


@EVERY_ROUTER
@BOTH_MODES
@pytest.mark.parametrize("tokens", [1, 4, TOKENS], ids=["one token", "fewer tokens than experts", "many"])
def test_layer_is_a_loop_over_tokens_and_experts(name: str, training: bool, tokens: int) -> None:
    layer, tokens = make_layer(name, training=training), enough(name, tokens, training=training)
    assert_layer_is_the_loop(name, layer, normal(tokens, D_MODEL, seed=3), training=training)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ["top_k", "gshard", "hash"])
def test_shared_experts_answer_every_token(name: str, gate: bool) -> None:
    shared = SharedExpert(D_MODEL, d_expert=3, activation="swiglu", gate=gate)
    layer = make_layer(name, training=True, shared=shared)
    assert_layer_is_the_loop(name, layer, normal(TOKENS, D_MODEL), training=True)


def test_several_shared_experts_are_one_wide_one() -> None:
    """Its answer is the sum of theirs; SharedExpert says so, and the plan counts so."""
    one = SharedExpert(D_MODEL, d_expert=2 * 3, activation="swiglu", gate=False).double()
    gates, ups = one.w_in.weight.chunk(2)
    x = normal(D_MODEL)
    answer = sum(
        swiglu(x, torch.cat([gates[part], ups[part]]), one.w_out.weight[:, part]) for part in (slice(3), slice(3, 6))
    )
    torch.testing.assert_close(one(x), answer)


@EVERY_ROUTER
@BOTH_MODES
def test_a_recorded_choice_can_be_repeated(name: str, training: bool) -> None:
    layer, x_TD = make_layer(name, training=training), normal(TOKENS, D_MODEL)
    first = run(layer, x_TD)
    again = run(layer, x_TD, seed=0 if CASES[name].weighs_with_noise else 1, replay=first.choice)
    assert torch.equal(again.hidden_TD, first.hidden_TD)
    fresh = run(layer, x_TD, seed=1, replay=first.choice)
    assert torch.equal(fresh.choice.expert_TK, first.choice.expert_TK)
    assert torch.equal(fresh.load.count_E, first.load.count_E)
    if name in ("hash", "balanced", "dense, soft", "dense, winner"):
        return
    # another router's choice is repeated too: it is the record that decides, not the scores
    with torch.no_grad():
        layer.router.weight.copy_(normal(*layer.router.weight.shape, seed=5))
    other, repeated = run(layer, x_TD), run(layer, x_TD, replay=first.choice)
    assert torch.equal(repeated.choice.expert_TK, first.choice.expert_TK)
    assert torch.equal(repeated.load.count_E, first.load.count_E)
    if first.choice.sent_TK is not None:
        assert torch.equal(repeated.choice.sent_TK, first.choice.sent_TK)
        assert not torch.equal(other.choice.sent_TK, first.choice.sent_TK)
    else:
        assert not torch.equal(other.choice.expert_TK, first.choice.expert_TK)


def test_a_record_says_what_the_router_chose_and_not_what_found_room() -> None:
    layer, x_TD = make_layer("top_k", training=True, capacity=Capacity(factor=0.5)), normal(TOKENS, D_MODEL)
    first = run(layer, x_TD)
    assert first.load.dropped > 0
    assert torch.equal(run(layer, x_TD, replay=first.choice).hidden_TD, first.hidden_TD)
    layer.capacity = Capacity()
    assert run(layer, x_TD, replay=first.choice).load.dropped == 0


@EVERY_ROUTER
def test_recomputation_in_the_backward_pass_changes_nothing(name: str) -> None:
    """Outputs, losses, each counted once, and gradients; with expert dropout, and with a limit where there may be."""
    limited = not name.startswith(("dense", "expert_choice", "balanced"))
    results = []
    for recompute in (False, True):
        settings = {"capacity": Capacity(factor=1.0)} if limited else {}
        layer = make_layer(name, training=True, dropout=0.3, **settings)
        x_TD = normal(TOKENS, D_MODEL).requires_grad_()
        torch.manual_seed(0)
        call = (layer, x_TD, token_ids(TOKENS))
        answer: Any = checkpoint(*call, use_reentrant=False) if recompute else layer(*call[1:])
        total = answer.hidden_TD.square().sum() + sum(answer.losses.values())
        total.backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([answer.hidden_TD, *answer.losses.values(), total, answer.load.count_E, x_TD.grad, *grads])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


def is_causal(layer: MoELayer) -> bool:
    """No change of a token, of 40 batches, reaches an answer before it."""
    for seed in range(40):
        x_TD, changed = normal(TOKENS, D_MODEL, seed=seed), seed % (TOKENS - 1) + 1
        other = torch.cat([x_TD[:changed], normal(TOKENS - changed, D_MODEL, seed=1000 + seed)])
        before, after = run(layer, x_TD).hidden_TD, run(layer, other).hidden_TD
        if not torch.allclose(before[:changed], after[:changed]):
            return False
    return True


@EVERY_ROUTER
@BOTH_MODES
def test_which_routers_are_causal(name: str, training: bool) -> None:
    assert is_causal(make_layer(name, training=training)) == CASES[name].causal[0 if training else 1]


@pytest.mark.parametrize(
    ("name", "drop", "causal"),
    [
        ("switch", "position", True),
        ("hash", "position", True),
        # a first choice of a later token goes before a second choice of an earlier one
        ("top_k", "position", False),
        ("gshard", "position", False),
        ("switch", "probability", False),
        ("top_k", "probability", False),
    ],
)
def test_which_limits_are_causal(name: str, drop: str, causal: bool) -> None:
    capacity = Capacity(factor=1.0, evaluation_factor=1.0, drop=drop)
    assert is_causal(make_layer(name, training=True, capacity=capacity)) == causal
    assert is_causal(make_layer(name, training=False, capacity=capacity)) == causal
