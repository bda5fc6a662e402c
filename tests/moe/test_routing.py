"""What room the experts have, and who is left behind: by hand, and against a loop over the queue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_routers import D_MODEL, NUM_EXPERTS, make_router, normal, token_ids
from torch import Tensor

from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import Capacity, MoELayer
from moetrain.moe.routing import Routing, capacity_of, count, limit, make_routing


def routing_to(chosen: list[list[int]], weights: list[list[float]], sent: list[list[bool]] | None = None) -> Routing:
    return make_routing(
        torch.tensor(chosen),
        weight_TK=torch.tensor(weights),
        num_experts=3,
        sent_TK=None if sent is None else torch.tensor(sent),
    )


def sent_by(routing: Routing, *, capacity: int, drop: str) -> list[list[int]]:
    limited = limit(routing, capacity=capacity, drop=drop)
    assert limited.sent_TK is not None
    assert torch.equal(limited.weight_TK, routing.weight_TK), "weights are not renormalised"
    assert torch.equal(limited.count_E, routing.count_E), "choices are counted whether they travel or not"
    assert torch.equal(limited.sent_E, count(routing.expert_TK, num_experts=3, where_TK=limited.sent_TK))
    return [[int(each) for each in row] for row in limited.sent_TK]


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "least", "expected"),
    [
        (8, 2, 4, 1.0, 1, 4),
        (8, 2, 4, 1.25, 1, 5),
        (7, 1, 4, 1.0, 1, 2),  # 1.75
        (100, 1, 10, 1.1, 1, 11),  # not 12, although 10 * 1.1 is 11.000000000000002 in binary
        (3, 1, 8, 1.0, 1, 1),
        (3, 1, 8, 1.0, 4, 4),
        (8, 2, 4, 0.01, 1, 1),
        (64, 2, 8, 2.0, 4, 32),
    ],
)
def test_room_of_an_expert(tokens: int, top_k: int, experts: int, factor: float, least: int, expected: int) -> None:
    assert capacity_of(tokens=tokens, top_k=top_k, num_experts=experts, factor=factor, least=least) == expected


WEIGHTS = [[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]]
CHOSEN = [[0, 1], [1, 0], [0, 2], [0, 1]]
"""Expert 0: the first choice of tokens 0, 2, 3, the second of 1. Expert 1: first of 1, second of 0 and 3."""


@pytest.mark.parametrize(
    ("capacity", "drop", "expected"),
    [
        # later first choices stay behind, second choices come last: 0 takes t0, t2; 1 takes t1's first, t0's second
        (2, "position", [[1, 1], [1, 0], [1, 1], [0, 0]]),
        (1, "position", [[1, 0], [1, 0], [0, 1], [0, 0]]),
        (3, "position", [[1, 1], [1, 0], [1, 1], [1, 1]]),
        (4, "position", [[1, 1], [1, 1], [1, 1], [1, 1]]),
        # expert 0: 0.8, 0.7, then 0.6, 0.1; expert 1: 0.9, 0.4, then 0.2
        (1, "probability", [[0, 0], [1, 0], [0, 1], [1, 0]]),
        (2, "probability", [[0, 1], [1, 0], [1, 1], [1, 0]]),
        (3, "probability", [[1, 1], [1, 0], [1, 1], [1, 1]]),
    ],
)
def test_who_stays_behind_by_hand(capacity: int, drop: str, expected: list[list[int]]) -> None:
    assert sent_by(routing_to(CHOSEN, WEIGHTS), capacity=capacity, drop=drop) == expected


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_a_copy_that_does_not_travel_takes_no_place(drop: str) -> None:
    """Token 0 would be first for expert 0, but its router does not send it."""
    routing = routing_to([[0, 1], [0, 2]], [[0.9, 0.1], [0.6, 0.4]], sent=[[False, True], [True, True]])
    assert sent_by(routing, capacity=1, drop=drop) == [[0, 1], [1, 1]]


def test_of_equal_weights_the_earlier_goes_first() -> None:
    assert sent_by(routing_to([[0], [0], [0]], [[1.0], [1.0], [1.0]]), capacity=2, drop="probability") == [
        [1],
        [1],
        [0],
    ]


@given(
    st.integers(1, 3).flatmap(
        lambda k: st.lists(
            st.tuples(st.permutations(range(3)), st.lists(st.booleans(), min_size=k, max_size=k)),
            min_size=1,
            max_size=9,
        )
    ),
    st.integers(1, 6),
    st.sampled_from(["position", "probability"]),
    st.integers(0, 100),
)
def test_a_limit_is_a_queue_before_each_expert(
    rows: list[tuple[list[int], list[bool]]], capacity: int, drop: str, seed: int
) -> None:
    sent = [flags for _, flags in rows]
    chosen = [list(order)[: len(flags)] for order, flags in rows]
    weight = torch.rand(len(rows), len(sent[0]), generator=torch.Generator().manual_seed(seed)).tolist()
    copies = [(t, k) for t in range(len(rows)) for k in range(len(sent[0])) if sent[t][k]]
    copies.sort(key=lambda tk: (tk[1], tk[0]) if drop == "position" else (-weight[tk[0]][tk[1]], 0))
    expected, taken = [[0] * len(sent[0]) for _ in rows], [0, 0, 0]
    for t, k in copies:
        if taken[chosen[t][k]] < capacity:
            taken[chosen[t][k]] += 1
            expected[t][k] = 1
    assert sent_by(routing_to(chosen, weight, sent), capacity=capacity, drop=drop) == expected


def make_layer(name: str, capacity: Capacity, *, training: bool) -> MoELayer:
    experts = Experts(D_MODEL, d_expert=4, activation="gelu", global_ids=range(NUM_EXPERTS))
    layer = MoELayer(
        make_router(name, training=training),
        experts=experts,
        dispatcher=Dispatcher(None),
        capacity=capacity,
    )
    with torch.no_grad():
        experts.double()
        for seed, parameter in enumerate(experts.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return layer.train(training)


def test_training_and_evaluation_have_limits_of_their_own() -> None:
    x_TD = normal(30, D_MODEL)

    def dropped(training: bool, **factors: float) -> int:
        torch.manual_seed(0)
        return int(make_layer("switch", Capacity(**factors), training=training)(x_TD).load.dropped)

    assert dropped(True, factor=0.5) > dropped(True, factor=1.5) > 0
    assert dropped(True, evaluation_factor=0.5) == dropped(False, factor=0.5) == 0
    assert dropped(False, evaluation_factor=0.5) > 0
    assert dropped(True, factor=0.5, least=30) == 0


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize("name", ["switch", "top_k", "gshard", "noisy_top_k", "sigmoid_bias", "sinkhorn", "hash"])
def test_a_limited_layer_is_the_loop_over_the_copies_that_travel(name: str, drop: str) -> None:
    """Outputs and gradients; a token without any expert gets exactly zero; what is dropped is told."""
    layer, tokens = make_layer(name, Capacity(factor=0.5, drop=drop), training=True), 30
    ours, theirs = (normal(tokens, D_MODEL).requires_grad_() for _ in range(2))
    torch.manual_seed(0)
    answer = layer(ours, token_ids(tokens))

    torch.manual_seed(0)
    routing = layer.router(theirs, token_ids(tokens))
    top_k = routing.expert_TK.shape[1]
    room = -(-tokens * top_k // (2 * NUM_EXPERTS))
    sent = limit(routing, capacity=room, drop=drop).sent_TK
    assert sent is not None
    expected = torch.stack([_answer(layer, theirs[t], routing, sent, t) for t in range(tokens)])
    torch.testing.assert_close(answer.hidden_TD, expected, rtol=1e-7, atol=1e-7)
    left = ~sent.any(1)
    assert left.any()
    assert not answer.hidden_TD[left].any()
    assert int(answer.load.dropped) == int((~sent).sum()) > 0
    assert int(answer.load.count_E.sum()) == tokens * top_k
    assert all(int(c) <= room for c in count(routing.expert_TK, num_experts=NUM_EXPERTS, where_TK=sent))

    upstream, parameters = normal(tokens, D_MODEL, seed=4), list(layer.parameters())
    found = torch.autograd.grad(answer.hidden_TD, [ours, *parameters], upstream)
    wanted = torch.autograd.grad(expected, [theirs, *parameters], upstream)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert not found[0][left].any()


def _answer(layer: MoELayer, x: Tensor, routing: Routing, sent: Tensor, t: int) -> Tensor:
    answer = torch.zeros_like(x)
    for k in range(sent.shape[1]):
        if sent[t, k]:
            expert = int(routing.expert_TK[t, k])
            h = torch.nn.functional.gelu(layer.experts.w_in[expert] @ x)
            answer = answer + routing.weight_TK[t, k] * (layer.experts.w_out[expert] @ h)
    return answer


def test_losses_count_choices_before_any_is_dropped() -> None:
    free, tight = (make_layer("top_k", Capacity(factor=f), training=True) for f in (None, 0.3))
    x_TD = normal(30, D_MODEL)
    for name in ("balance", "z"):
        assert torch.equal(free(x_TD).losses[name], tight(x_TD).losses[name])
