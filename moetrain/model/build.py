"""Settings to a model, with weights that depend on the seed and their names alone, never on the layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config.routers import resolve_router
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.attention import Attention
from moetrain.model.ffn import FeedForward
from moetrain.model.gpt import GPT, Block, TokenEmbedding
from moetrain.model.recompute import Recompute, Run
from moetrain.moe.assign import BalancedRouter, DenseRouter, ExpertChoiceRouter, HashRouter, SinkhornRouter, hash_table
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts, SharedExpert
from moetrain.moe.layer import Capacity, MoELayer
from moetrain.moe.router import GShardRouter, NoisyTopKRouter, SigmoidBiasRouter, TopKRouter
from moetrain.parallel.collectives import AllToAll
from moetrain.parallel.seeds import derive_seed


def build_model(
    model: ModelConfig,
    *,
    local_experts: range | None = None,
    expert_group: dist.ProcessGroup | None = None,
    all_to_all: AllToAll | None = None,
    expert_V: Tensor | None = None,
    recompute: str = "none",
    made: Callable[[str, nn.Module], None] = lambda name, part: None,
) -> GPT:
    """The model without values in its weights; ``initialize`` gives them.

    Args:
        local_experts: global ids of the experts on this rank; None: all of them.
        expert_group: the ranks that share the experts; None when this rank holds all.
        all_to_all: how these exchange tokens; None: each with each.
        expert_V: the table of the hash router (``assign.hash_table``); None for the others.
        recompute: what the backward pass works out anew (``model.recompute``).
        made: called with the global name of each part that has weights and the part, one block after the other and then
            what is around them, before the next one is built.
    """
    moe, how = model.moe, Recompute.of(recompute)
    blocks = []
    for index in range(model.num_layers):
        if moe is not None and (index + 1) % moe.every == 0:
            experts = range(moe.num_experts) if local_experts is None else local_experts
            feed_forward: FeedForward | MoELayer = _moe_layer(
                model,
                moe,
                local_experts=experts,
                dispatcher=Dispatcher(expert_group, all_to_all=all_to_all),
                expert_V=expert_V,
                run=how.sparse,
            )
        else:
            feed_forward = FeedForward(model.d_model, d_ff=model.d_ff, activation=model.activation, bias=model.bias)
        attention = Attention(
            model.d_model,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            d_head=model.d_head or model.d_model // model.num_heads,
            bias=model.bias,
            qk_norm=model.qk_norm,
            eps=model.norm_eps,
        )
        norms = (_norm(model), _norm(model))
        blocks.append(Block(attention, feed_forward=feed_forward, norms=norms, recompute=how))
        made(f"blocks.{index}", blocks[-1])
    gpt = GPT(
        blocks,
        embedding=TokenEmbedding(model.vocab_size, model.d_model),
        positions=nn.Embedding(model.context, model.d_model) if model.positions == "learned" else None,
        rope_theta=model.rope_theta if model.positions == "rope" else None,
        norm=_norm(model),
        tie_embeddings=model.tie_embeddings,
    )
    for name, part in gpt.named_children():
        if part is not gpt.blocks:
            made(name, part)
    return gpt


def expert_table(model: ModelConfig, *, seed: int, frequency: Callable[[], Tensor]) -> Tensor | None:
    """The table of the hash router, [V] int64; None for a model that has none.

    Args:
        frequency: tells how often each token id occurs in the training text, [V]; called for a balanced table alone.
    """
    moe = model.moe
    if moe is None or moe.router != "hash":
        return None
    return hash_table(
        vocab_size=model.vocab_size,
        num_experts=moe.num_experts,
        seed=derive_seed(seed, "hash table"),
        frequency_V=frequency() if resolve_router(moe).hash_table == "balanced" else None,
    )


@torch.no_grad()
def initialize(gpt: GPT, *, init_std: float, seed: int) -> None:
    """Give every weight its first value, drawn from a generator seeded by (seed, global name).

    Matrices are normal with ``init_std``; those that write into the residual stream are divided by
    sqrt(2 num_layers) (GPT-2, Radford et al. 2019, section 2.3). Norms start at 1, biases at 0. Each expert is drawn
    by its global id: building them in a row would give other weights on another layout.
    """
    initialize_part("", gpt, num_layers=len(gpt.blocks), init_std=init_std, seed=seed)


@torch.no_grad()
def initialize_part(part_name: str, part: nn.Module, *, num_layers: int, init_std: float, seed: int) -> None:
    """The same for one part of a model (``build_model``'s ``made``): what it is called there is all it depends on.

    Args:
        part_name: its global name; empty for the whole model.
    """
    residual_std = init_std / math.sqrt(2 * num_layers)
    for module_name, module in part.named_modules(prefix=part_name):
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            std = residual_std if module_name.endswith((".out", ".w_out")) or name == "w_out" else init_std
            if isinstance(module, Experts):
                for expert, weight in zip(module.global_ids, parameter, strict=True):
                    _draw(weight, std=std, seed=seed, name=f"{full_name}.{expert}")
            elif name == "bias" or getattr(module, "starts_at_zero", False):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                _draw(parameter, std=std, seed=seed, name=full_name)


def _draw(weight: Tensor, *, std: float, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    weight.copy_(torch.randn(weight.shape, generator=generator).mul_(std))


def _norm(model: ModelConfig) -> nn.Module:
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.d_model, eps=model.norm_eps)
    return nn.LayerNorm(model.d_model, eps=model.norm_eps, bias=model.bias)


def _moe_layer(
    model: ModelConfig,
    moe: MoEConfig,
    *,
    local_experts: range,
    dispatcher: Dispatcher,
    expert_V: Tensor | None,
    run: Run,
) -> MoELayer:
    d_expert, activation = moe.d_expert or model.d_ff, moe.activation or model.activation
    shared = None
    if moe.num_shared_experts:
        width = moe.num_shared_experts * d_expert
        shared = SharedExpert(model.d_model, d_expert=width, activation=activation, gate=moe.shared_gate)
    return MoELayer(
        _router(model.d_model, moe, expert_V=expert_V),
        experts=Experts(
            model.d_model,
            d_expert=d_expert,
            activation=activation,
            global_ids=local_experts,
            dropout=moe.dropout,
        ),
        dispatcher=dispatcher,
        balance_scope=moe.balance_scope,
        capacity=Capacity(
            factor=moe.capacity_factor,
            evaluation_factor=moe.evaluation_capacity_factor,
            least=moe.min_capacity,
            drop=moe.drop,
        ),
        shared=shared,
        run=run,
    )


def _router(d_model: int, settings: MoEConfig, *, expert_V: Tensor | None) -> nn.Module:
    moe = resolve_router(settings)
    E, K = {"num_experts": moe.num_experts}, {"top_k": moe.top_k}
    groups = {"num_groups": moe.num_groups, "top_groups": moe.top_groups}
    match moe.router:
        case "top_k":
            return TopKRouter(d_model, **E, **K, renormalize=bool(moe.renormalize), jitter=moe.jitter or 0.0, **groups)
        case "switch":
            return TopKRouter(d_model, **E, top_k=1, renormalize=False, jitter=moe.jitter or 0.0)
        case "gshard":
            return GShardRouter(d_model, **E)
        case "noisy_top_k":
            return NoisyTopKRouter(d_model, **E, **K)
        case "sigmoid_bias":
            assert moe.bias_update_rate is not None
            return SigmoidBiasRouter(d_model, **E, **K, update_rate=moe.bias_update_rate,
                                     scale=moe.weight_scale or 1.0, **groups)  # fmt: skip
        case "expert_choice":
            return ExpertChoiceRouter(d_model, **E, **K)
        case "sinkhorn":
            return SinkhornRouter(d_model, **E, **K, iterations=moe.sinkhorn_iterations or 1, gate=str(moe.gate))
        case "hash":
            assert expert_V is not None, "the hash router needs its table"
            return HashRouter(expert_V, **E)
        case "dense":
            return DenseRouter(d_model, **E, pooling=str(moe.pooling))
        case "balanced":
            return BalancedRouter(**E, **K)
    raise AssertionError(f"config.checks let the router {moe.router} pass")
