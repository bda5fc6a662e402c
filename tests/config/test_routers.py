"""Each router with its own settings and no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moetrain.compose import compose
from moetrain.config.checks import check, resolve
from moetrain.config.freeze import flatten, freeze, to_dict
from moetrain.config.routers import (
    BALANCE_WEIGHT,
    NO_CAPACITY,
    NO_SCORES,
    NOT_CAUSAL,
    ROUTERS,
    SETTINGS,
    TOP_K,
    Z_WEIGHT,
    resolve_router,
)
from moetrain.config.schema import MoEConfig, RunConfig
from moetrain.errors import ConfigError

EVERY_ROUTER = pytest.mark.parametrize("router", ROUTERS)
VALUES: dict[str, Any] = {
    "renormalize": False, "jitter": 0.25, "num_groups": 4, "top_groups": 2, "importance_weight": 0.5,
    "load_weight": 0.0,
    "sinkhorn_iterations": 3, "gate": "softmax", "hash_table": "random", "bias_update_rate": 0.5, "weight_scale": 2.5,
    "pooling": "winner",
}  # fmt: skip
"""One for each setting of a router, none of them its default."""


def wanted(router: str) -> dict[str, Any]:
    """What a router asks for besides its own settings."""
    top_k = {"dense": 8}.get(router, TOP_K.get(router, 2))
    return {"router": router, "top_k": top_k, "allow_noncausal": router in NOT_CAUSAL}


def usable(settings: dict[str, Any]) -> RunConfig:
    """As from the command line."""
    overrides = [f"model.moe.{name}={'null' if value is None else value}" for name, value in settings.items()]
    run = resolve(freeze(compose(overrides).settings), default_processes=2)
    check(run, flatten(to_dict(run)))
    return run


def problems(settings: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        usable(settings)
    return caught.value.problems


def test_every_setting_of_a_router_is_one_of_moe_and_null_by_default() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(MoEConfig)}
    assert set(SETTINGS) == set(VALUES) <= fields.keys()
    assert all(fields[name] is None for name in SETTINGS)
    for told in (TOP_K, NOT_CAUSAL, NO_CAPACITY, NO_SCORES, BALANCE_WEIGHT, Z_WEIGHT):
        assert set(told) <= ROUTERS.keys()


@EVERY_ROUTER
def test_a_router_gets_its_defaults_and_those_of_no_other(router: str) -> None:
    moe = usable(wanted(router)).model.moe
    assert moe is not None
    for name in SETTINGS:
        assert getattr(moe, name) == ROUTERS[router].get(name), name
    assert moe.balance_weight == (0.01 if router in ("top_k", "switch", "gshard") else 0)
    assert moe.z_weight == (0.001 if router == "top_k" else 0)
    assert resolve_router(moe) == moe


@EVERY_ROUTER
def test_a_router_takes_its_own_settings(router: str) -> None:
    own = {name: VALUES[name] for name in ROUTERS[router]}
    moe = usable(wanted(router) | own).model.moe
    assert {name: getattr(moe, name) for name in own} == own


@EVERY_ROUTER
def test_a_setting_of_another_router_is_refused_and_its_routers_named(router: str) -> None:
    foreign = [name for name in SETTINGS if name not in ROUTERS[router]]
    told = problems(wanted(router) | {name: VALUES[name] for name in foreign})
    assert len(told) == len(foreign)
    for name, problem in zip(foreign, told, strict=True):
        users = [other for other, own in ROUTERS.items() if name in own]
        assert problem == (
            f"model.moe.{name} is {VALUES[name]}, but model.moe.router={router} has no such setting: "
            f"set it to null, or use a router that has ({', '.join(users)})"
        )


@pytest.mark.parametrize(("router", "top_k", "right"), [("switch", 2, 1), ("gshard", 1, 2), ("hash", 2, 1)])
def test_some_routers_fix_the_experts_per_token(router: str, top_k: int, right: int) -> None:
    (problem,) = problems({"router": router, "top_k": top_k})
    assert problem == f"model.moe.top_k is {top_k}, but must be {right} for model.moe.router={router}"
    usable({"router": router, "top_k": right})


def test_dense_calls_every_expert() -> None:
    (problem,) = problems({"router": "dense", "top_k": 2})
    assert problem.startswith("model.moe.top_k is 2, but must be model.moe.num_experts, 8, for model.moe.router=dense")
    usable({"router": "dense", "top_k": 8})
    usable({"router": "dense", "top_k": 2, "num_experts": 2})


@pytest.mark.parametrize("router", ["noisy_top_k", "sigmoid_bias"])
def test_weights_that_sum_to_the_same_need_two_experts(router: str) -> None:
    (problem,) = problems({"router": router, "top_k": 1})
    assert problem.startswith(f"model.moe.top_k is 1, but must be at least 2 for model.moe.router={router}")
    usable({"router": router, "top_k": 1, "num_experts": 1})


@pytest.mark.parametrize("router", NOT_CAUSAL)
def test_a_router_that_sees_later_tokens_must_be_allowed(router: str) -> None:
    (problem,) = problems(wanted(router) | {"allow_noncausal": False})
    assert problem.startswith(f"model.moe.router is {router}, which sees later tokens")
    assert "model.moe.allow_noncausal=true" in problem


@EVERY_ROUTER
@pytest.mark.parametrize("name", ["capacity_factor", "evaluation_capacity_factor"])
def test_a_limit_is_refused_where_there_is_nothing_to_limit(router: str, name: str) -> None:
    settings = wanted(router) | {name: 1.25, "drop": "probability", "min_capacity": 4}
    if router not in NO_CAPACITY:
        usable(settings)
        return
    (problem,) = problems(settings)
    assert problem.startswith(f"model.moe.{name} is set, but model.moe.router={router} fills every expert alike")


def test_how_to_drop_is_refused_where_nothing_is_dropped() -> None:
    drop, least = sorted(problems({"drop": "probability", "min_capacity": 4}))
    assert drop.startswith("model.moe.drop is probability, but nothing is dropped without a capacity")
    assert least.startswith("model.moe.min_capacity is 4, but nothing is dropped without a capacity")


@EVERY_ROUTER
def test_a_loss_is_refused_that_could_change_nothing(router: str) -> None:
    told = [] if router in ROUTERS.keys() - {*NO_CAPACITY, *NO_SCORES} else ["balance_weight"]
    told += ["z_weight"] if router in ("hash", "balanced") else []
    settings = wanted(router) | {"balance_weight": 0.5, "z_weight": 0.25}
    if not told:
        usable(settings)
        return
    assert [problem.split()[0] for problem in problems(settings)] == [f"model.moe.{name}" for name in told]
    usable(settings | dict.fromkeys(told, 0.0))


def test_a_gate_needs_shared_experts() -> None:
    (problem,) = problems({"shared_gate": "true"})
    assert problem.startswith("model.moe.shared_gate is true, but model.moe.num_shared_experts is 0")
    usable({"shared_gate": "true", "num_shared_experts": 1})


@pytest.mark.parametrize("router", ["top_k", "sigmoid_bias"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 4}, "model.moe.num_groups and model.moe.top_groups belong together: set both or neither"),
        ({"top_groups": 4}, "model.moe.num_groups and model.moe.top_groups belong together: set both or neither"),
        ({"num_groups": 3, "top_groups": 1}, "model.moe.num_groups is 3, but must divide model.moe.num_experts, 8"),
        ({"num_groups": 4, "top_groups": 5}, "model.moe.top_groups is 5, but must be at most model.moe.num_groups, 4"),
        (
            {"num_groups": 4, "top_groups": 1, "top_k": 3},
            "model.moe.top_groups is 1, whose groups hold 2 experts, but must hold model.moe.top_k, 3",
        ),
    ],
)
def test_groups_fit_the_experts(router: str, settings: dict[str, Any], message: str) -> None:
    (problem,) = problems({"router": router} | settings)
    assert problem.startswith(message)


@pytest.mark.parametrize("groups", [(4, 4), (2, 1), (8, 2), (1, 1)])
def test_groups_that_fit(groups: tuple[int, int]) -> None:
    usable({"num_groups": groups[0], "top_groups": groups[1]})


@pytest.mark.parametrize(("name", "value"), [("jitter", 1.0), ("jitter", -0.1), ("dropout", 1.0), ("dropout", -0.5)])
def test_shares_lie_below_one(name: str, value: float) -> None:
    (problem,) = problems({name: value})
    assert problem == f"model.moe.{name} is {value}, but must lie in [0, 1): 0 leaves it out"
