"""What an operation does to each tensor of a checkpoint: which pieces of the old ones make the new ones.

    upcycle   a dense model becomes sparse: every expert is a copy of the feed-forward block (Komatsuzaki et al. 2022,
              arXiv:2212.05055). All copies are alike and their weights sum to 1, so the answer is the dense one's.
    grow      every expert is copied. With top_k grown alike, all copies of those chosen answer, each with its share of
              the weight: the same answer, but for the little by which their scores must differ (``jittered``). With
              top_k kept, the copies part the tokens among themselves (``parted``).
    prune     the experts that are used least are left out.

Adam's moments come along, scaled as the gradients are: the first with their mean, the second with the variance of a
sum over tokens, which is mostly noise. n copies that part the tokens have 1/n of both each; n copies that share each
token have 1/n of the first and 1/n^2 of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.config.routers import resolve_router
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.errors import ConfigError

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
JITTER = 0.01
"""Of the length of a row."""
PARTING = 16.0
"""How much longer the direction by which copies part the tokens is than the rows of the router. Tokens that lie within
1/16 of a deviation of the border may see two copies of one expert: some 5 in 100."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One interval of a new tensor."""

    name: str
    """Full name of the new tensor, e.g. ``blocks.0.feed_forward.experts.w_in/exp_avg``."""
    begin: int = 0
    """Where it begins there, in lengths of the source."""
    source: str = ""
    """Full name of the old tensor."""
    factor: float = 1.0
    keep: tuple[int, ...] | None = None
    """Of the source, cut into ``parts`` equal ones, those that stay, one after the other; None: all of it."""
    parts: int = 1
    values: str = ""
    """Instead of a copy: drawn, zero, parted, jittered (copies that are almost alike), waiting (copies behind all
    others in the choice) or table (of a hash router, the tokens of an expert dealt out among its copies)."""


def upcycled(model: ModelConfig, *, num_experts: int, top_k: int, every: int) -> ModelConfig:
    """The settings of the sparse model.

    Raises:
        ConfigError: it would not say what the dense one says.
    """
    problems = []
    if model.moe is not None:
        problems.append(
            f"the model has {model.moe.num_experts} experts already, but upcycle takes a dense one: use grow"
        )
    if model.bias:
        problems.append(
            "model.bias is true, but experts have no biases: there is no place for those of the dense block"
        )
    if not 2 <= top_k <= num_experts:
        problems.append(f"top_k is {top_k}, but must be from 2 to num_experts, {num_experts}: a single one's "
                        "weight would be below 1, or teach the router nothing")  # fmt: skip
    if every > model.num_layers:
        problems.append(f"every is {every}, but the model has {model.num_layers} blocks")
    if problems:
        raise ConfigError(problems)
    moe = MoEConfig(num_experts=num_experts, top_k=top_k, d_expert=model.d_ff, every=every, renormalize=True)
    return replace(model, moe=resolve_router(moe))


def upcycle(model: ModelConfig) -> Iterator[tuple[str, list[Move]]]:
    """The moves of each new tensor without its kind, for a model as ``upcycled`` gives it; the rest stays."""
    moe = model.moe
    assert moe is not None
    # each expert sees K/E of the tokens, with weights of 1/K on average
    factors = {"fp32": 1.0, "exp_avg": 1 / moe.num_experts, "exp_avg_sq": 1 / (moe.num_experts * moe.top_k)}
    for i in range(moe.every - 1, model.num_layers, moe.every):
        block = f"blocks.{i}.feed_forward"
        for name in ("w_in", "w_out"):
            yield f"{block}.experts.{name}", [
                Move(name=f"{block}.experts.{name}/{kind}", begin=expert, source=f"{block}.{name}.weight/{kind}",
                     factor=factors[kind])
                for kind in KINDS for expert in range(moe.num_experts)
            ]  # fmt: skip
        router = f"{block}.router.weight"
        yield router, [Move(name=f"{router}/{kind}", values="drawn" if kind == "fp32" else "zero") for kind in KINDS]


def grown(model: ModelConfig, *, num_experts: int, top_k: int | None) -> ModelConfig:
    """The settings of the larger model.

    Raises:
        ConfigError: the number of experts is no multiple, or the router deals in a way that copies would upset.
    """
    moe = model.moe
    if moe is None:
        raise ConfigError(["the model is dense, but grow copies experts: use upcycle"])
    problems = []
    if num_experts <= moe.num_experts or num_experts % moe.num_experts:
        problems.append(f"num_experts is {num_experts}, but must be a multiple of those there are, {moe.num_experts}")
    copies = max(1, num_experts // moe.num_experts)
    if moe.router == "dense":
        top_k = num_experts
    if top_k in (None, moe.top_k) and copies & (copies - 1) and moe.router not in ("sigmoid_bias", "hash", "balanced"):
        problems.append(f"num_experts is {num_experts}, {copies} times as many, but copies that part the tokens must "
                        f"be 2, 4, 8 …: use such a number, or top_k={copies * moe.top_k}")  # fmt: skip
    if top_k not in (None, moe.top_k, copies * moe.top_k):
        problems.append(f"top_k is {top_k}, but must stay {moe.top_k}, or grow alike, to {copies * moe.top_k}")
    if top_k not in (None, moe.top_k) and moe.router in ("switch", "gshard", "hash"):
        problems.append(f"top_k is {top_k}, but model.moe.router={moe.router} has {moe.top_k}: leave it out")
    if moe.num_groups is not None:
        problems.append(f"model.moe.num_groups is {moe.num_groups}, but copies would not keep to their groups")
    if problems:
        raise ConfigError(problems)
    return replace(model, moe=replace(moe, num_experts=num_experts, top_k=top_k or moe.top_k))


def grow(old: ModelConfig, new: ModelConfig) -> Iterator[tuple[str, list[Move]]]:
    """As ``upcycle``, for a model as ``grown`` gives it. Copy j of expert e is number e + j E."""
    assert old.moe is not None
    assert new.moe is not None
    copies = new.moe.num_experts // old.moe.num_experts
    shares_tokens = new.moe.top_k > old.moe.top_k
    factors = {"fp32": 1.0, "exp_avg": 1 / copies, "exp_avg_sq": 1 / (copies**2 if shares_tokens else copies)}
    by_bias = old.moe.router == "sigmoid_bias"
    if by_bias and not shares_tokens:
        factors = dict.fromkeys(KINDS, 1.0)  # the copies wait for tokens, and the first ones go on as they are
    for i in range(old.moe.every - 1, old.num_layers, old.moe.every):
        block = f"blocks.{i}.feed_forward"
        names = [f"{block}.experts.{name}" for name in ("w_in", "w_out")]
        if old.moe.router not in ("hash", "balanced"):
            names += [f"{block}.router.weight"]
        if old.moe.router == "noisy_top_k":
            names += [f"{block}.router.noise_weight"]
        for name in names:
            moves = [Move(name=f"{name}/{kind}", begin=j, source=f"{name}/{kind}", factor=factors[kind])
                     for kind in KINDS for j in range(copies)]  # fmt: skip
            if name.endswith("router.weight") and not (by_bias and not shares_tokens):
                values = "jittered" if shares_tokens else "parted"
                moves = [Move(name=f"{name}/fp32", source=f"{name}/fp32", values=values), *moves[copies:]]
            yield name, moves
        yield f"{block}.share_E", [Move(name=f"{block}.share_E/state", begin=j, source=f"{block}.share_E/state",
                                        factor=1 / copies) for j in range(copies)]  # fmt: skip
        for state, values in (("router.bias_E", "" if shares_tokens else "waiting"), ("router.expert_V", "table")):
            name = f"{block}.{state}/state"
            if values:
                yield f"{block}.{state}", [Move(name=name, source=name, values=values)]
            else:
                yield f"{block}.{state}", [Move(name=name, begin=j, source=name) for j in range(copies)]


def pruned(model: ModelConfig, *, num_experts: int) -> ModelConfig:
    """The settings of the smaller model.

    Raises:
        ConfigError: fewer experts than each token wants, or a router that cannot do without one.
    """
    moe = model.moe
    if moe is None:
        raise ConfigError(["the model is dense, but prune takes experts away: there are none"])
    problems = []
    if not moe.top_k <= num_experts < moe.num_experts:
        problems.append(f"num_experts is {num_experts}, but must be from model.moe.top_k, {moe.top_k}, to "
                        f"{moe.num_experts - 1}, one less than there are")  # fmt: skip
    if moe.router in ("hash", "balanced", "dense"):
        problems.append(f"model.moe.router is {moe.router}, which uses every expert there is")
    if moe.num_groups is not None:
        problems.append(f"model.moe.num_groups is {moe.num_groups}, but its groups would no longer be even")
    if problems:
        raise ConfigError(problems)
    return replace(model, moe=replace(moe, num_experts=num_experts))


def prune(old: ModelConfig, *, keep: list[tuple[int, ...]]) -> Iterator[tuple[str, list[Move]]]:
    """As ``upcycle``.

    Args:
        keep: of each MoE block, the experts that stay, in their order.
    """
    moe = old.moe
    assert moe is not None
    for layer, i in enumerate(range(moe.every - 1, old.num_layers, moe.every)):
        block = f"blocks.{i}.feed_forward"
        names = [f"{block}.experts.w_in", f"{block}.experts.w_out", f"{block}.router.weight"]
        if moe.router == "noisy_top_k":
            names.append(f"{block}.router.noise_weight")
        for name in names:
            yield name, [Move(name=f"{name}/{kind}", source=f"{name}/{kind}", keep=keep[layer], parts=moe.num_experts)
                         for kind in KINDS]  # fmt: skip
        for state in ("share_E", "router.bias_E"):
            name = f"{block}.{state}/state"
            yield f"{block}.{state}", [Move(name=name, source=name, keep=keep[layer], parts=moe.num_experts)]


def jittered(weight_ED: Tensor, *, copies: int, seed: int) -> Tensor:
    """The router's rows for copies that answer together, [copies E, D]: each a little off the old one.

    Were they alike, the copies of an expert would always be chosen together, with the same weight and the same
    gradient, and never become anything else.
    """
    generator = torch.Generator().manual_seed(seed)
    noise_RD = torch.randn(copies * len(weight_ED), weight_ED.shape[1], generator=generator)
    rows_RD = weight_ED.repeat(copies, 1)
    return rows_RD + JITTER * rows_RD.norm(dim=1, keepdim=True) / weight_ED.shape[1] ** 0.5 * noise_RD


def parted(weight_ED: Tensor, *, copies: int, seed: int) -> Tensor:
    """The router's rows for 2^n copies that part the tokens, [copies E, D].

    Each copy has, on all its rows, a shift along n directions, forwards or backwards as the bits of its number say. A
    token scores those copies of all experts far above the rest whose bits are the sides on which it lies. Among the
    copies that it sees the differences of the scores, and so the weights, are the old ones.
    """
    generator = torch.Generator().manual_seed(seed)
    bits = copies.bit_length() - 1
    direction_bD = torch.randn(bits, weight_ED.shape[1], generator=generator)
    direction_bD *= PARTING * weight_ED.norm(dim=1).mean() / direction_bD.norm(dim=1, keepdim=True)
    sign_cb = torch.tensor([[1.0 if copy >> bit & 1 else -1.0 for bit in range(bits)] for copy in range(copies)])
    return torch.cat([weight_ED + shift for shift in sign_cb @ direction_bD])
