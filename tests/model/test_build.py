"""From settings to modules and first weights."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from moetrain.config.freeze import freeze
from moetrain.config.routers import ROUTERS, TOP_K
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, expert_table, initialize
from moetrain.model.ffn import FeedForward
from moetrain.model.gpt import GPT
from moetrain.moe.assign import BalancedRouter, DenseRouter, ExpertChoiceRouter, HashRouter, SinkhornRouter
from moetrain.moe.layer import Capacity, MoELayer
from moetrain.moe.router import GShardRouter, NoisyTopKRouter, SigmoidBiasRouter, TopKRouter
from moetrain.plan.flops import count_parameters

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))

SMALL = ModelConfig(
    vocab_size=70,
    context=16,
    num_layers=3,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=48,
    tie_embeddings=False,
    init_std=0.05,
    moe=MoEConfig(num_experts=4, d_expert=24, every=1),
)
DENSE = replace(SMALL, norm="layernorm", positions="learned", activation="gelu", bias=True, moe=None)
ROUTER_CLASSES = {
    "top_k": TopKRouter, "switch": TopKRouter, "gshard": GShardRouter, "noisy_top_k": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter, "sinkhorn": SinkhornRouter, "hash": HashRouter,
    "sigmoid_bias": SigmoidBiasRouter, "dense": DenseRouter, "balanced": BalancedRouter,
}  # fmt: skip
TABLE = torch.zeros(70, dtype=torch.int64)
VARIANTS = {
    "sparse": SMALL,
    "dense with biases": DENSE,
    "every other": replace(SMALL, num_layers=4, moe=MoEConfig(num_experts=4, every=2, activation="relu")),
    "layernorm without biases": replace(SMALL, norm="layernorm", tie_embeddings=True),
    "sparse with biases": replace(DENSE, moe=MoEConfig(num_experts=3, every=2)),
    "wide heads": replace(SMALL, num_kv_heads=None, d_head=20),
    "shared experts": replace(SMALL, moe=MoEConfig(num_experts=4, d_expert=24, num_shared_experts=2, shared_gate=True)),
}


def load_preset(path: Path) -> ModelConfig:
    """As Hydra composes it, without Hydra."""
    settings = yaml.safe_load(path.read_text())
    group = next(entry["moe"] for entry in settings.pop("defaults") if isinstance(entry, dict))
    assert group in ("none", "preset")
    if group == "none":
        settings["moe"] = None
    return freeze({"model": settings}).model


def assert_counts_agree(model: ModelConfig) -> None:
    with torch.device("meta"):
        gpt = build_model(model, expert_V=TABLE)
    planned = count_parameters(model)
    assert sum(each.numel() for each in gpt.parameters()) == planned.total
    experts = sum(each.numel() for name, each in gpt.named_parameters() if ".experts." in name)
    assert experts == planned.experts


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_preset_builds_to_the_planned_number_of_parameters(path: Path) -> None:
    assert_counts_agree(load_preset(path))


@pytest.mark.parametrize("name", VARIANTS)
def test_each_kind_of_model_builds_to_the_planned_number_of_parameters(name: str) -> None:
    assert_counts_agree(VARIANTS[name])


def with_router(router: str, **settings: Any) -> ModelConfig:
    return replace(
        SMALL, moe=MoEConfig(num_experts=4, top_k=TOP_K.get(router, 2), d_expert=24, router=router, **settings)
    )


@pytest.mark.parametrize("shared", [{}, {"num_shared_experts": 2}, {"num_shared_experts": 2, "shared_gate": True}],
                         ids=["no shared experts", "two", "two with a gate"])  # fmt: skip
@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_is_built_and_counted(router: str, shared: dict[str, Any]) -> None:
    model = with_router(router, **shared)
    assert_counts_agree(model)
    layer = build_model(model, expert_V=TABLE).blocks[0].feed_forward
    assert type(layer.router) is ROUTER_CLASSES[router]
    assert (layer.shared is None) == (not shared)
    counted = count_parameters(model)
    assert counted.router == 3 * sum(each.numel() for each in layer.router.parameters())
    assert counted.shared_experts == (3 * sum(each.numel() for each in layer.shared.parameters()) if shared else 0)


def test_each_router_gets_its_settings() -> None:
    def router(name: str, **settings: Any) -> Any:
        return build_model(with_router(name, **settings), expert_V=TABLE).blocks[0].feed_forward.router

    top_k = router("top_k", jitter=0.25, num_groups=2, top_groups=1)
    assert (top_k.top_k, top_k.renormalize, top_k.jitter, top_k.num_groups, top_k.top_groups) == (2, True, 0.25, 2, 1)
    assert router("top_k", renormalize=False).renormalize is False
    assert router("top_k").jitter == 0
    switch = router("switch")
    assert (switch.top_k, switch.renormalize, switch.jitter) == (1, False, 0.01)
    assert router("switch", jitter=0.0).jitter == 0
    sinkhorn = router("sinkhorn", gate="softmax")
    assert (sinkhorn.iterations, sinkhorn.gate, router("sinkhorn", sinkhorn_iterations=3).iterations) == (
        8,
        "softmax",
        3,
    )
    loss_free = router("sigmoid_bias", weight_scale=2.5, num_groups=2, top_groups=1)
    assert (loss_free.update_rate, loss_free.scale, loss_free.num_groups, loss_free.top_groups) == (0.001, 2.5, 2, 1)
    assert router("dense").pooling == "soft"
    assert router("dense", pooling="winner").pooling == "winner"
    assert router("hash").expert_V is TABLE


def test_the_layer_gets_its_settings() -> None:
    layer = build_model(
        with_router("top_k", capacity_factor=1.5, evaluation_capacity_factor=2.0, min_capacity=3, drop="probability",
                    dropout=0.25, balance_scope="sequence")
    ).blocks[0].feed_forward  # fmt: skip
    assert layer.capacity == Capacity(factor=1.5, evaluation_factor=2.0, least=3, drop="probability")
    assert layer.experts.dropout == 0.25
    assert layer.balance_scope == "sequence"
    assert build_model(with_router("top_k")).blocks[0].feed_forward.balance_scope == "global_batch"


def test_the_hash_table_is_that_of_the_run() -> None:
    frequency_V = torch.tensor([100.0] + [1.0] * 69)
    balanced, random = (
        expert_table(with_router("hash", hash_table=kind), seed=1, frequency=frequency)
        for kind, frequency in ((None, lambda: frequency_V), ("random", pytest.fail))
    )
    assert balanced is not None
    assert random is not None
    # 169 copies over four experts: the commonest id fills one by itself
    assert sorted(torch.bincount(balanced).tolist()) == [1, 23, 23, 23]
    assert sorted(torch.bincount(random).tolist()) == [17, 17, 18, 18]
    assert expert_table(SMALL, seed=1, frequency=pytest.fail) is None


@pytest.mark.parametrize("router", ROUTERS)
def test_each_router_trains_in_a_model_and_repeats_its_choices(router: str) -> None:
    """A pass forward and backward leaves finite gradients; handed its choices, the model gives the same scores."""
    model = with_router(router, num_shared_experts=1, shared_gate=True)
    gpt = build_model(model, expert_V=torch.arange(70) % 4)
    initialize(gpt, init_std=0.3, seed=1)
    token_BS = torch.randint(70, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first = gpt(token_BS)
    (first.logit_BSV.logsumexp(-1).mean() + sum(sum(layer.losses.values()) for layer in first.moe)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in gpt.parameters())
    torch.manual_seed(0)
    again = gpt(token_BS, [layer.choice for layer in first.moe])
    assert torch.equal(again.logit_BSV, first.logit_BSV)


@pytest.mark.parametrize(("every", "sparse"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_the_last_block_of_every_n_is_sparse(every: int, sparse: list[int]) -> None:
    gpt = build_model(replace(SMALL, num_layers=4, moe=MoEConfig(num_experts=4, every=every)))
    kinds = [type(block.feed_forward) for block in gpt.blocks]
    assert kinds == [MoELayer if index in sparse else FeedForward for index in range(4)]


def weights(model: ModelConfig, *, seed: int = 7, local: range | None = None) -> dict[str, Tensor]:
    gpt = build_model(model, local_experts=local)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(math.nan)
    initialize(gpt, init_std=model.init_std, seed=seed)
    return {name: parameter.detach() for name, parameter in gpt.named_parameters()}


@pytest.mark.parametrize("expert_parallel", [2, 4])
def test_weights_do_not_depend_on_who_holds_the_experts(expert_parallel: int) -> None:
    whole, each = weights(SMALL), 4 // expert_parallel
    shares = [weights(SMALL, local=range(first, first + each)) for first in range(0, 4, each)]
    for name, weight in whole.items():
        if ".experts." in name:
            assert torch.equal(torch.cat([share[name] for share in shares]), weight), name
        else:
            assert all(torch.equal(share[name], weight) for share in shares), name


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(SMALL)
    torch.manual_seed(2)
    again, other = weights(SMALL), weights(SMALL, seed=8)
    for name, weight in first.items():
        assert torch.equal(again[name], weight), name
        if weight.dim() > 1:
            assert not torch.isclose(other[name], weight).all(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_no_two_weights_start_alike(name: str) -> None:
    """Not two experts, nor two layers, nor two maps of one layer: equal ones would learn the same."""
    rows = []
    for weight_name, weight in weights(VARIANTS[name]).items():
        if ".experts." in weight_name:
            rows += [each.flatten()[:32] for each in weight]
        elif weight.dim() > 1:
            rows.append(weight.flatten()[:32])
    for first, second in combinations(rows, 2):
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.7


@pytest.mark.parametrize("name", VARIANTS)
def test_first_weights_have_the_spread_of_gpt2(name: str) -> None:
    """Normal with init_std; into the residual stream by sqrt(2 num_layers) less; norms 1, biases 0."""
    model = VARIANTS[name]
    into_residual = ("attention.out.weight", "feed_forward.w_out.weight", "feed_forward.experts.w_out",
                     "feed_forward.shared.w_out.weight")  # fmt: skip
    for weight_name, weight in weights(model).items():
        if weight_name.endswith("bias"):
            assert (weight == 0).all(), weight_name
        elif "norm" in weight_name:
            assert (weight == 1).all(), weight_name
        else:
            scale = math.sqrt(2 * model.num_layers) if weight_name.endswith(into_residual) else 1.0
            std = model.init_std / scale
            # five standard errors of a mean and of a standard deviation
            count = weight.numel()
            assert weight.mean().item() == pytest.approx(0.0, abs=5 * std / math.sqrt(count)), weight_name
            assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count)), weight_name


def test_every_weight_is_given_a_value() -> None:
    for name in VARIANTS:
        assert all(weight.isfinite().all() for weight in weights(VARIANTS[name]).values()), name


def test_noise_and_scores_of_noisy_top_k_start_at_zero() -> None:
    """Shazeer et al. 2017, appendix A."""
    found = weights(with_router("noisy_top_k"))
    router = {name: weight for name, weight in found.items() if ".router." in name}
    assert len(router) == 6
    assert not any(weight.any() for weight in router.values())


def test_tied_models_have_one_table_of_tokens() -> None:
    tied: GPT = build_model(replace(SMALL, tie_embeddings=True))
    assert tied.head is None
    assert [name for name, each in tied.named_parameters() if each.shape == (70, 32)] == ["embedding.weight"]
