"""Experts spread over ranks do what they do on one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import plain_routers
import torch
from torch import Tensor

from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import Capacity, MoELayer
from moetrain.moe.router import TopKRouter
from moetrain.parallel.groups import make
from moetrain.parallel.topology import Topology

WORLD_SIZE, NUM_EXPERTS, TOP_K, D_MODEL, D_EXPERT = 4, 8, 2, 8, 5
TOKENS_OF_RANKS = [5, 1, 9, 3]
SHUNNED = {
    "uneven load": [],
    "an expert nobody chooses": [3],
    # with four ranks of two experts, and with two ranks of four
    "a rank that receives nothing": [4, 5, 6, 7],
}
EXPERT_PARALLEL = (2, 4)


def tokens(rank: int) -> Tensor:
    """In steps of 1/8, as are the router's weights: then no order of adding up changes a score, and so no choice."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randint(-8, 9, (TOKENS_OF_RANKS[rank], D_MODEL), generator=generator, dtype=torch.float64) / 8
    x_TD[:, 0] = 1.0
    return x_TD


def upstream(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 + rank)
    return torch.randn(TOKENS_OF_RANKS[rank], D_MODEL, generator=generator, dtype=torch.float64)


def make_layer(dispatcher: Dispatcher, *, local: range, shunned: list[int]) -> MoELayer:
    router = TopKRouter(D_MODEL, num_experts=NUM_EXPERTS, top_k=TOP_K, renormalize=True)
    experts = Experts(D_MODEL, d_expert=D_EXPERT, activation="swiglu", global_ids=local)
    layer = MoELayer(router, experts=experts, dispatcher=dispatcher).double()
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        router.weight.copy_(torch.randint(-8, 9, (NUM_EXPERTS, D_MODEL), generator=generator) / 8)
        # every token has a 1 in its first place
        router.weight[shunned, 0] = -64.0
        for weight in (experts.w_in, experts.w_out):
            whole = torch.randn(NUM_EXPERTS, *weight.shape[1:], generator=generator, dtype=torch.float64)
            weight.copy_(whole[local.start : local.stop])
    return layer


def run_layer(layer: MoELayer, x_TD: Tensor, upstream_TD: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.requires_grad_()
    answer = layer(x_TD)
    answer.hidden_TD.backward(upstream_TD)
    return {
        "hidden": answer.hidden_TD.detach(),
        "count": answer.load.count_E,
        "x": x_TD.grad,
        "router": layer.router.weight.grad,
        "w_in": layer.experts.w_in.grad,
        "w_out": layer.experts.w_out.grad,
    }


def _every_layout(rank: int) -> dict[str, dict[str, Tensor]]:
    answers = {}
    for expert_parallel in EXPERT_PARALLEL:
        topology = Topology(world_size=WORLD_SIZE, rank=rank, expert_parallel=expert_parallel)
        dispatcher = Dispatcher(make(topology, device=torch.device("cpu")).expert)
        for name, shunned in SHUNNED.items():
            layer = make_layer(dispatcher, local=topology.local_experts(NUM_EXPERTS), shunned=shunned)
            answers[f"{name}, {expert_parallel}"] = run_layer(layer, tokens(rank), upstream(rank))
    two_nodes = Topology(world_size=WORLD_SIZE, rank=rank, expert_parallel=WORLD_SIZE, processes_per_node=2)
    groups = make(two_nodes, device=torch.device("cpu"), two_level=True)
    dispatcher = Dispatcher(groups.expert, all_to_all=groups.two_level)
    for name, shunned in SHUNNED.items():
        layer = make_layer(dispatcher, local=two_nodes.local_experts(NUM_EXPERTS), shunned=shunned)
        answers[f"{name}, two levels"] = run_layer(layer, tokens(rank), upstream(rank))
    return answers


EQUAL_TOKENS = 9
LIMITED = {
    "top_k": Capacity(factor=0.75),
    "gshard": Capacity(factor=0.5, drop="probability"),
    "hash": Capacity(factor=0.5),
    "switch": Capacity(factor=0.1, least=1),
}
"""Limits that drop some copies, and so leave some ranks with less to send than others."""
MODES = {"training": True, "evaluation": False}


def router_layer(name: str, dispatcher: Dispatcher, *, local: range, training: bool, limited: bool) -> MoELayer:
    experts = Experts(plain_routers.D_MODEL, d_expert=D_EXPERT, activation="swiglu", global_ids=local).double()
    layer = MoELayer(
        plain_routers.make_router(name, training=training),
        experts=experts,
        dispatcher=dispatcher,
        capacity=replace(LIMITED[name], evaluation_factor=LIMITED[name].factor) if limited else None,
    )
    with torch.no_grad():
        for seed, weight in enumerate(experts.parameters()):
            whole = plain_routers.normal(plain_routers.NUM_EXPERTS, *weight.shape[1:], seed=30 + seed)
            weight.copy_(whole[local.start : local.stop])
    return layer.train(training)


def run_router(layer: MoELayer, rank: int) -> dict[str, Tensor]:
    x_TD = plain_routers.normal(EQUAL_TOKENS, plain_routers.D_MODEL, seed=70 + rank).requires_grad_()
    torch.manual_seed(rank)
    answer = layer(x_TD, plain_routers.token_ids(EQUAL_TOKENS, seed=rank))
    total = (answer.hidden_TD * plain_routers.normal(*x_TD.shape, seed=90 + rank)).sum()
    (total + sum(answer.losses.values())).backward()
    return {
        "hidden": answer.hidden_TD.detach(),
        "dropped": answer.load.dropped,
        "x": x_TD.grad,
        **{f"router {name}": each.grad for name, each in layer.router.named_parameters() if each.grad is not None},
        **{name: each.grad for name, each in layer.experts.named_parameters()},
    }


def router_cases() -> Iterator[tuple[str, dict[str, object]]]:
    for mode, training in MODES.items():
        for name in plain_routers.CASES:
            for limited in (False, True) if name in LIMITED else (False,):
                yield (
                    f"{name}, {mode}{', limited' if limited else ''}",
                    {"name": name, "training": training, "limited": limited},
                )


def _every_router(rank: int) -> dict[str, dict[str, Tensor]]:
    answers = {}
    for expert_parallel in EXPERT_PARALLEL:
        topology = Topology(world_size=WORLD_SIZE, rank=rank, expert_parallel=expert_parallel)
        dispatcher = Dispatcher(make(topology, device=torch.device("cpu")).expert)
        local = topology.local_experts(plain_routers.NUM_EXPERTS)
        for case, how in router_cases():
            layer = router_layer(dispatcher=dispatcher, local=local, **how)
            answers[f"{case}, {expert_parallel}"] = run_router(layer, rank)
    return answers


def test_every_router_with_experts_spread_out_does_what_it_does_on_one_process(ranks) -> None:
    """Each rank's micro-batch alone, on a layer with all experts; only these see the tokens of all ranks."""
    answers = ranks(WORLD_SIZE, _every_router)
    for case, how in router_cases():
        for expert_parallel in EXPERT_PARALLEL:
            for members in expert_groups(expert_parallel):
                _assert_router_equals_one_process(
                    [answers[rank][f"{case}, {expert_parallel}"] for rank in members], members, case=case, how=how
                )


def _assert_router_equals_one_process(
    answers: list[dict[str, Tensor]], members: list[int], *, case: str, how: dict[str, object]
) -> None:
    layer = router_layer(dispatcher=Dispatcher(None), local=range(plain_routers.NUM_EXPERTS), **how)
    for rank, answer in zip(members, answers, strict=True):
        for parameter in layer.router.parameters():
            parameter.grad = None  # each rank has its own; those of the experts add up
        whole = run_router(layer, rank)
        for name in whole.keys() - {"w_in", "w_out"}:
            torch.testing.assert_close(answer[name], whole[name], msg=f"{case}: {name}")
    for name in ("w_in", "w_out"):
        joined = torch.cat([answer[name] for answer in answers])
        torch.testing.assert_close(joined, whole[name], msg=f"{case}: {name}")
    if how["limited"]:
        assert sum(int(answer["dropped"]) for answer in answers) > 0, case


def expert_groups(expert_parallel: int) -> Iterator[list[int]]:
    for first in range(0, WORLD_SIZE, expert_parallel):
        yield list(range(first, first + expert_parallel))


def test_expert_parallel_equals_one_process(ranks) -> None:
    """Answers and all gradients, those of the experts by their global ids; each rank has another number of tokens."""
    answers = ranks(WORLD_SIZE, _every_layout)
    for name, shunned in SHUNNED.items():
        for expert_parallel in EXPERT_PARALLEL:
            for members in expert_groups(expert_parallel):
                mine = [answers[rank][f"{name}, {expert_parallel}"] for rank in members]
                _assert_equals_one_process(mine, members, shunned=shunned)
        for answer in answers:
            # the same rows in the same order: the same bits
            for key, tensor in answer[f"{name}, {WORLD_SIZE}"].items():
                assert torch.equal(answer[f"{name}, two levels"][key], tensor), f"{name}: {key}"


def _assert_equals_one_process(answers: list[dict[str, Tensor]], members: list[int], *, shunned: list[int]) -> None:
    layer = make_layer(Dispatcher(None), local=range(NUM_EXPERTS), shunned=shunned)
    x_TD, upstream_TD = torch.cat([tokens(rank) for rank in members]), torch.cat([upstream(rank) for rank in members])
    whole = run_layer(layer, x_TD, upstream_TD)
    assert not whole["count"][shunned].any(), "the case is not what its name says"

    router_error = {"rtol": 1e-5, "atol": 1e-5}  # float32, whatever the rest computes in
    joined = {name: torch.cat([answer[name] for answer in answers]) for name in ("hidden", "x", "w_in", "w_out")}
    torch.testing.assert_close(joined["hidden"], whole["hidden"])
    torch.testing.assert_close(joined["x"], whole["x"], **router_error)
    # each rank already has the sum over the tokens of the whole group: its experts saw them all
    torch.testing.assert_close(joined["w_in"], whole["w_in"])
    torch.testing.assert_close(joined["w_out"], whole["w_out"])
    assert not joined["w_in"][shunned].any()
    torch.testing.assert_close(sum(answer["router"] for answer in answers), whole["router"], **router_error)
    assert torch.equal(sum(answer["count"] for answer in answers), whole["count"])
    assert [int(answer["count"].sum()) for answer in answers] == [TOKENS_OF_RANKS[rank] * TOP_K for rank in members]
