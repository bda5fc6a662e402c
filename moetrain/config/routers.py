"""Which settings each router has, and their defaults. A setting that the chosen router does not have is an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moetrain.config.schema import MoEConfig

ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"renormalize": True, "jitter": 0.0, "num_groups": None, "top_groups": None},
    "switch": {"jitter": 0.01},
    "gshard": {},
    "noisy_top_k": {"importance_weight": 0.1, "load_weight": 0.1},
    "expert_choice": {},
    "sinkhorn": {"sinkhorn_iterations": 8, "gate": "sigmoid"},
    "hash": {"hash_table": "balanced"},
    "sigmoid_bias": {"bias_update_rate": 0.001, "weight_scale": 1.0, "num_groups": None, "top_groups": None},
    "dense": {"pooling": "soft"},
    "balanced": {},
}
"""Router -> its own settings with their defaults (sources: ``config.schema.MoEConfig`` and the router's class)."""

SETTINGS = tuple(dict.fromkeys(name for own in ROUTERS.values() for name in own))
TOP_K = {"switch": 1, "gshard": 2, "hash": 1}
"""Routers that fix the number of experts per token."""
NOT_CAUSAL = ("expert_choice", "sinkhorn")
"""Routers that look at later tokens in training."""
NO_CAPACITY = ("expert_choice", "dense", "balanced")
"""Routers whose load leaves nothing to limit."""
NO_SCORES = ("hash", "balanced")
"""Routers that learn nothing, and so have no loss."""
WEIGHS_AGAINST_EACH_OTHER = ("noisy_top_k", "sigmoid_bias")
"""Routers whose weights always sum to the same: the one weight of a top-1 layer would carry no gradient."""
BALANCE_WEIGHT = {"top_k": 0.01, "switch": 0.01, "gshard": 0.01}
"""Default weight of the balance loss; 0 for the rest."""
Z_WEIGHT = {"top_k": 0.001}
"""Default weight of the z-loss; 0 for the rest."""


def sees_others(moe: MoEConfig | None) -> str | None:
    """Why a token's experts depend, in evaluation, on the tokens beside it; None: they do not."""
    if moe is not None and moe.router in ("expert_choice", "balanced"):
        return f"model.moe.router is {moe.router}, which deals the tokens of a pass out among the experts"
    if moe is not None and moe.evaluation_capacity_factor is not None:
        return "model.moe.evaluation_capacity_factor is set, so that tokens beside one another take each other's room"
    return None


def resolve_router(moe: MoEConfig) -> MoEConfig:
    """Fill in the chosen router's defaults; settings of other routers stay as they are, for ``broken_rules``."""
    own = ROUTERS.get(moe.router, {})
    missing = {name: default for name, default in own.items() if getattr(moe, name) is None}
    if moe.balance_weight is None:
        missing["balance_weight"] = BALANCE_WEIGHT.get(moe.router, 0.0)
    if moe.z_weight is None:
        missing["z_weight"] = Z_WEIGHT.get(moe.router, 0.0)
    return replace(moe, **missing)


def loss_weights(moe: MoEConfig) -> dict[str, float]:
    """Weight of each of the router's losses, by the name the layer gives it."""
    settings = resolve_router(moe)
    return {
        "balance": settings.balance_weight or 0.0,
        "z": settings.z_weight or 0.0,
        "importance": settings.importance_weight or 0.0,
        "load": settings.load_weight or 0.0,
    }


def broken_rules(moe: MoEConfig) -> Iterator[str]:
    """What the router's settings break, a sentence each."""
    own = ROUTERS[moe.router]
    for name in SETTINGS:
        if getattr(moe, name) is not None and name not in own:
            users = ", ".join(router for router, settings in ROUTERS.items() if name in settings)
            yield (
                f"model.moe.{name} is {getattr(moe, name)}, but model.moe.router={moe.router} has no such setting: "
                f"set it to null, or use a router that has ({users})"
            )
    fixed = TOP_K.get(moe.router)
    if fixed is not None and moe.top_k != fixed:
        yield f"model.moe.top_k is {moe.top_k}, but must be {fixed} for model.moe.router={moe.router}"
    if moe.router == "dense" and moe.top_k != moe.num_experts:
        yield (
            f"model.moe.top_k is {moe.top_k}, but must be model.moe.num_experts, {moe.num_experts}, for "
            "model.moe.router=dense: every expert answers for every token"
        )
    if moe.router in WEIGHS_AGAINST_EACH_OTHER and moe.top_k == 1 and moe.num_experts > 1:
        yield (
            f"model.moe.top_k is 1, but must be at least 2 for model.moe.router={moe.router}: the one weight would "
            "always be the same, and the router would learn nothing from the language loss"
        )
    if moe.router in NOT_CAUSAL and not moe.allow_noncausal:
        yield (
            f"model.moe.router is {moe.router}, which sees later tokens in training, so that a decoder learns to look "
            "ahead: choose another, or set model.moe.allow_noncausal=true to study it"
        )
    if moe.router in NO_CAPACITY:
        for name in ("capacity_factor", "evaluation_capacity_factor"):
            if getattr(moe, name) is not None:
                yield f"model.moe.{name} is set, but model.moe.router={moe.router} fills every expert alike: set null"
    yield from _losses(moe)
    if "num_groups" in own:
        yield from _groups(moe)


def _losses(moe: MoEConfig) -> Iterator[str]:
    if moe.balance_weight and moe.router in (*NO_CAPACITY, *NO_SCORES):
        yield (
            f"model.moe.balance_weight is {moe.balance_weight}, but must be 0 for model.moe.router={moe.router}, whose "
            "load no loss can change"
        )
    if moe.z_weight and moe.router in NO_SCORES:
        yield (
            f"model.moe.z_weight is {moe.z_weight}, but must be 0 for model.moe.router={moe.router}, which has no "
            "scores"
        )


def _groups(moe: MoEConfig) -> Iterator[str]:
    groups, best = moe.num_groups, moe.top_groups
    if (groups is None) != (best is None):
        yield "model.moe.num_groups and model.moe.top_groups belong together: set both or neither"
        return
    if groups is None or best is None:
        return
    if moe.num_experts % groups:
        yield f"model.moe.num_groups is {groups}, but must divide model.moe.num_experts, {moe.num_experts}"
    elif best > groups:
        yield f"model.moe.top_groups is {best}, but must be at most model.moe.num_groups, {groups}"
    elif best * (moe.num_experts // groups) < moe.top_k:
        yield (
            f"model.moe.top_groups is {best}, whose groups hold {best * (moe.num_experts // groups)} experts, but must "
            f"hold model.moe.top_k, {moe.top_k}: use more groups"
        )
