"""`moetrain bench layer`: one MoE layer, forward and backward, ours and others', in turns in one process.

Every contestant gets the same weights, the same tokens and the same scores, hence the same routing (``make_inputs``),
and the same gradient of its answer. What adds to its time beyond that: ours computes its balance and z-losses and the
numbers of its load, DeepSpeed's its balance loss; `transformers`' block has no loss of its own. Contestants that do
exact work must give our answer before they are timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.bench import peers
from moetrain.bench.settings import LAYER_CONTESTANTS, LayerSettings, shapes, taking_part
from moetrain.bench.timing import MIB, Contestant, Row, measure, rows_of, runs_of
from moetrain.config.routers import loss_weights
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT
from moetrain.moe.layer import MoELayer

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR = {"fp32": 1e-5, "bf16": 1e-2}
"""Norm of the difference over the norm, up to which two answers are the same."""

Forward = Callable[[], tuple[Tensor, Tensor | None]]
"""The answer, and a loss to be added to what is minimised."""
Tick = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What differs between the groups of rows."""

    dtype: str
    routing: str
    experts: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every contestant gets."""

    x_1TD: Tensor
    """Tokens, as a batch of one sequence."""
    gate_ED: Tensor
    """Weights of the router."""
    upstream_1TD: Tensor
    """The gradient of the answer."""
    expert_TK: Tensor
    """int64, the experts that the router must choose, in any order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant that computes a layer's answer."""

    forward: Forward
    upstream: Tensor
    """The gradient of its answer."""
    leaves: list[Tensor]
    """What gets gradients."""
    note: str = ""


def bench_layer(settings: LayerSettings, *, device: torch.device, tick: Tick) -> list[Row]:
    """Rows of all tables."""
    rows: list[Row] = []
    for dtype, routing in itertools.product(settings.dtype, settings.routing):
        for experts, top_k in shapes(settings):
            case = Case(dtype=dtype, routing=routing, experts=experts, top_k=top_k)
            rows += _one_shape(settings, case, device=device, tick=tick)
    return rows


def runs(settings: LayerSettings) -> int:
    """How often ``bench_layer`` ticks, at most."""
    tables = len(settings.dtype) * len(settings.routing) * len(shapes(settings))
    return tables * runs_of(len(contestants(settings)), repeats=settings.repeats)


def contestants(settings: LayerSettings) -> list[str]:
    """Who takes part and is installed, the yardstick first."""
    return taking_part(settings, LAYER_CONTESTANTS)


def make_experts_of(case: Case, *, tokens: int) -> Tensor:
    """The experts of each token, [T, K] int64, all different within a token.

    Balanced: copies go to the experts in turn. Skewed: expert 0 gets half of all copies, or one of each token where K
    is more than 2 (a router that chooses K different experts can give one of them no more than 1/K); the others get
    the rest in turn.
    """
    if case.routing == "balanced":
        return torch.arange(tokens * case.top_k).view(tokens, case.top_k) % case.experts
    top_k, to_first = case.top_k, min(tokens, tokens * case.top_k // 2)
    others_N = torch.arange(tokens * top_k - to_first) % (case.experts - 1) + 1
    with_first_N, without_N = others_N.tensor_split([to_first * (top_k - 1)])
    with_first = torch.cat([torch.zeros(to_first, 1, dtype=torch.int64), with_first_N.view(to_first, top_k - 1)], 1)
    return torch.cat([with_first, without_N.view(tokens - to_first, top_k)])


def make_inputs(case: Case, *, tokens: int, d_model: int, device: torch.device) -> Inputs:
    """Tokens whose first E channels are their scores, read off by a router that is a unit matrix.

    So every contestant sees the same scores to the last bit, in fp32 and in bf16, however it computes them. Chosen
    experts score from 1 to 2, the others from -1 to 0.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = TORCH_DTYPES[case.dtype]
    expert_TK = make_experts_of(case, tokens=tokens)[torch.randperm(tokens, generator=generator)]
    x_TD = torch.randn(tokens, d_model, generator=generator)
    score_TE = torch.rand(tokens, case.experts, generator=generator) - 1
    x_TD[:, : case.experts] = score_TE.scatter_add(1, expert_TK, torch.full(expert_TK.shape, 2.0))
    return Inputs(
        x_1TD=x_TD.to(device, dtype).unsqueeze(0).requires_grad_(),
        gate_ED=torch.eye(case.experts, d_model, dtype=dtype, device=device),
        upstream_1TD=torch.randn(1, tokens, d_model, generator=generator).to(device, dtype),
        expert_TK=expert_TK.to(device),
    )


def make_gpt(settings: LayerSettings, case: Case, *, inputs: Inputs) -> tuple[ModelConfig, GPT]:
    """A model of one block with our layer and the inputs' router, and its settings."""
    moe = MoEConfig(
        router="top_k",
        num_experts=case.experts,
        top_k=case.top_k,
        d_expert=settings.d_ff // case.top_k,
        balance_scope="micro_batch",
    )
    model = ModelConfig(
        vocab_size=1, context=1, num_layers=1, num_heads=1, d_model=settings.d_model, d_ff=settings.d_ff, moe=moe
    )
    gpt = _one_block(model, like=inputs.x_1TD)
    block: Any = gpt.blocks[0]
    with torch.no_grad():
        block.feed_forward.router.weight.copy_(inputs.gate_ED)
    return model, gpt


def make_entry(name: str, *, model: ModelConfig, gpt: GPT, inputs: Inputs) -> Entry:
    """A contestant by name, with the weights of the only block of ``gpt``."""
    assert model.moe is not None
    layer: Any = gpt.blocks[0].feed_forward
    x = inputs.x_1TD
    weights = loss_weights(model.moe)
    module: Any = layer
    forward: Forward
    note = ""
    match name:
        case "dense":
            module = _one_block(replace(model, moe=None), like=x).blocks[0].feed_forward
            forward = partial(_plain, module, x)
        case "floor":
            return _floor(layer, inputs)
        case "moetrain":
            forward = partial(_ours, layer, x, weights)
        case "transformers_grouped" | "transformers_eager":
            module = peers.mixtral_block(layer, model)
            peers.set_experts(module, peers.experts_implementation(name))
            forward = partial(_plain, module, x)
        case "deepspeed_capacity" | "deepspeed_no_drop":
            module = peers.deepspeed_layer(layer, model)
            peers.set_drops(module, name == "deepspeed_capacity")
            forward = partial(_deepspeed, module, x, weights)
        case _:
            raise AssertionError(f"no contestant is named {name}")
    if name == "moetrain":
        note = _held(layer, inputs)
    elif name == "deepspeed_capacity":
        count_E = torch.bincount(inputs.expert_TK.flatten(), minlength=inputs.gate_ED.shape[0])
        note = f"drops {peers.dropped_share(count_E, tokens=x.shape[1], top_k=inputs.expert_TK.shape[1]):.0%}"
    return Entry(
        forward=forward,
        upstream=inputs.upstream_1TD,
        leaves=[x, *module.parameters()],
        note=note,
    )


def _one_block(model: ModelConfig, *, like: Tensor) -> GPT:
    gpt = build_model(model)
    initialize(gpt, init_std=model.init_std, seed=0)
    return gpt.to(like)


def _one_shape(settings: LayerSettings, case: Case, *, device: torch.device, tick: Tick) -> list[Row]:
    inputs = make_inputs(case, tokens=settings.tokens, d_model=settings.d_model, device=device)
    model, gpt = make_gpt(settings, case, inputs=inputs)
    ours = make_entry("moetrain", model=model, gpt=gpt, inputs=inputs)
    admitted = peers.admit(
        {name: LAYER_CONTESTANTS[name] is not None for name in contestants(settings)},
        make=lambda name: make_entry(name, model=model, gpt=gpt, inputs=inputs),
        answer=lambda entry: entry.forward()[0],
        expected=ours.forward()[0].detach(),
        exact=peers.exact(case.top_k),
        error=ERROR[case.dtype],
    )
    found = measure(
        [_contestant(name, entry, inputs) for name, entry in admitted.entries.items()],
        repeats=settings.repeats,
        device=device,
        tick=lambda name: tick(f"{case.dtype} {case.routing} {case.experts}/{case.top_k} {name}"),
    )
    notes = {name: entry.note for name, entry in admitted.entries.items()}
    return rows_of(contestants(settings), found=found, notes=notes | admitted.faults, what=asdict(case))


def _plain(module: nn.Module, x: Tensor) -> tuple[Tensor, None]:
    return module(x), None


def _ours(layer: MoELayer, x: Tensor, weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    output = layer(x)
    loss = x.new_zeros((), dtype=torch.float32)
    for name, weight in weights.items():
        if weight:
            loss = loss + weight * output.losses[name]
    return output.hidden_TD, loss


def _deepspeed(module: nn.Module, x: Tensor, weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    hidden, balance, _ = module(x)
    return hidden, weights["balance"] * balance


def _floor(layer: MoELayer, inputs: Inputs) -> Entry:
    """The experts alone, on rows that are sorted already, with a gradient for each row."""
    top_k = inputs.expert_TK.shape[1]
    order_N = inputs.expert_TK.flatten().argsort(stable=True)
    x_ND = inputs.x_1TD.detach()[0].index_select(0, order_N // top_k).requires_grad_()
    upstream_ND = inputs.upstream_1TD[0].index_select(0, order_N // top_k)
    count_E = torch.bincount(inputs.expert_TK.flatten(), minlength=inputs.gate_ED.shape[0])
    return Entry(
        forward=lambda: (layer.experts(x_ND, count_E), None),
        upstream=upstream_ND,
        leaves=[x_ND, *layer.experts.parameters()],
    )


def _contestant(name: str, entry: Entry, inputs: Inputs) -> Contestant:
    def run() -> None:
        answer, loss = entry.forward()
        if loss is None:
            torch.autograd.backward([answer], [entry.upstream])
        else:
            torch.autograd.backward([answer, loss], [entry.upstream, None])

    def clear() -> None:
        for leaf in entry.leaves:
            leaf.grad = None

    return Contestant(name=name, run=run, clear=clear)


def _held(layer: MoELayer, inputs: Inputs) -> str:
    """What of the layer's peak is the one permuted copy its dispatch holds, and what are weight gradients."""
    top_k, size = inputs.expert_TK.shape[1], inputs.x_1TD.element_size()
    copy = inputs.x_1TD.numel() * top_k * size / MIB
    gradients = sum(weight.numel() for weight in layer.parameters()) * size / MIB
    return f"permuted copy {copy:.1f} MiB, weight gradients {gradients:.1f}"
