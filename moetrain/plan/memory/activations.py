"""Bytes of activations on one device: what a forward pass leaves, and a block in its backward pass (docs/plan.md)."""

from __future__ import annotations

from dataclasses import dataclass

from moetrain.config.routers import resolve_router
from moetrain.config.schema import ModelConfig
from moetrain.plan.flops import GATED, is_moe_block
from moetrain.plan.layout import Layout


def width_of(model: ModelConfig) -> int:
    """Bytes of an activation, and of a weight as the model computes with it."""
    return 2 if model.dtype == "bf16" else 4


def document_mask_bytes(model: ModelConfig, layout: Layout, *, sequence_length: int) -> float:
    """Of the mask that keeps attention within a document (``model.attention.score_bias``): one for all blocks."""
    return float(width_of(model) * layout.micro_batch * sequence_length**2)


@dataclass(frozen=True)
class Block:
    """Bytes of one block: outside its experts and inside."""

    outside: float
    inside: float


@dataclass(frozen=True)
class Kept:
    """What a forward pass leaves."""

    activations: float
    experts: float
    block: Block
    """One block in its backward pass: whole, recomputed or not, with the gradients of its largest parts."""


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass on the fullest device."""

    tokens: float
    rows_at: float
    """Tokens that its experts have work for, before each is copied for K experts."""
    device: str


def activations_of(model: ModelConfig, layout: Layout, *, tokens: float, imbalance: float, device: str) -> Kept:
    """What a forward pass of ``tokens`` tokens leaves on the fullest device.

    Args:
        imbalance: rows at the fullest device over the mean, at least 1.
        device: cuda or cpu; they keep different activations.
    """
    run = _Pass(tokens, tokens * imbalance, device)
    sparse = sum(is_moe_block(model, block=block) for block in range(model.num_layers))
    outside, inside, in_backward = 0.0, 0.0, []
    for is_sparse, many in ((True, sparse), (False, model.num_layers - sparse)):
        if many:
            block = _whole_block(model, layout, run, is_sparse=is_sparse)
            left = block if layout.recompute == "none" else _left(model, layout, run, is_sparse=is_sparse)
            outside, inside = outside + many * left.outside, inside + many * left.inside
            in_backward.append(_in_backward(model, layout, run, block, is_sparse=is_sparse))
    last_norm = _norm(model, device=device) * tokens + width_of(model) * model.d_model * tokens
    fullest = max(in_backward, key=lambda block: block.outside + block.inside)
    return Kept(activations=outside + last_norm, experts=inside, block=fullest)


def _whole_block(model: ModelConfig, layout: Layout, run: _Pass, *, is_sparse: bool) -> Block:
    """A block of which nothing is recomputed."""
    attention = _attention(model, device=run.device) * run.tokens
    if is_sparse:
        return Block(attention + _moe_outside(model) * run.tokens, _moe_inside(model, layout, run))
    dense = width_of(model) * (model.d_model + _hidden(model, model.d_ff, model.activation))
    return Block(attention + dense * run.tokens, 0.0)


def _in_backward(model: ModelConfig, layout: Layout, run: _Pass, block: Block, *, is_sparse: bool) -> Block:
    """A whole block and the gradients that its own backward makes."""
    width, moe = width_of(model), model.moe
    stream = 3 * width * model.d_model * run.tokens
    if not is_sparse or moe is None:
        dense = width * _hidden(model, model.d_ff, model.activation) * run.tokens
        return Block(block.outside + stream + dense, 0.0)
    hidden = _hidden(model, moe.d_expert or model.d_ff, moe.activation or model.activation)
    if run.device == "cpu":
        hidden *= layout.expert_parallel / moe.num_experts  # one expert after the other
    rows = width * moe.top_k * run.rows_at * (hidden + 2 * model.d_model)
    # recomputed part by part, experts and attention are not whole at the same time
    outside = stream if layout.recompute == "selective" else block.outside + stream
    return Block(outside, block.inside + rows)


def _left(model: ModelConfig, layout: Layout, run: _Pass, *, is_sparse: bool) -> Block:
    """What recomputation leaves of a block."""
    stream, moe = width_of(model) * model.d_model, model.moe
    if layout.recompute == "full":
        return Block(stream * run.tokens, 0.0)
    if not is_sparse or moe is None:
        return Block(2 * stream * run.tokens, 0.0)
    routing = (12 * moe.num_experts + 32 * moe.top_k) * run.tokens
    return Block(2 * stream * run.tokens + routing, stream * moe.top_k * (run.rows_at + run.tokens))


def _norm(model: ModelConfig, *, device: str) -> float:
    """Bytes per token beside the normed tokens themselves, which the next map keeps."""
    width = width_of(model)
    if model.norm == "rmsnorm" and device == "cpu":
        # there PyTorch builds it from parts: the input in fp32 and the scaled input in fp32
        return model.d_model * 8.0
    return model.d_model * width


def _attention(model: ModelConfig, *, device: str) -> float:
    """Bytes per token of a block's attention and both its norms."""
    width, d_head = width_of(model), model.d_head or model.d_model // model.num_heads
    query, key = model.num_heads * d_head, (model.num_kv_heads or model.num_heads) * d_head
    heads = query + 2 * key  # the output of the first map, which the values are a part of
    turned = query + key if model.positions == "rope" else 0
    # on a CPU, from turned heads, the answers come in an order that the next map takes as a copy
    answers = query * (2 if device == "cpu" and turned else 1)
    normed = 0.0
    if model.qk_norm is not None:
        # as for the other norms; in fp32 the input is the output of the first map, which is there anyway
        normed = (query + key) * ((4.0 if width == 4 else 8.0) if device == "cpu" else float(width))
        normed += 0 if turned else width * (query + key)
    kept = model.d_model + heads + turned + answers
    return 2 * _norm(model, device=device) + normed + width * kept + 4.0 * model.num_heads


def _hidden(model: ModelConfig, width: int, activation: str) -> float:
    """Elements per row: before the activation and after."""
    return width * ((2 if activation in GATED else 1) + 1.0)


def _moe_outside(model: ModelConfig) -> float:
    """Bytes per token of an MoE block but for the rows at its experts: normed tokens, router, shared experts."""
    moe, width = model.moe, width_of(model)
    assert moe is not None
    # the scores are worked out in fp32, of an fp32 copy of the tokens; without one, of the tokens themselves
    noise = 4.0 * model.d_model * (2 if model.dtype == "fp32" else 1) if resolve_router(moe).jitter else 0.0
    router = 8.0 * moe.num_experts + 24.0 * moe.top_k + 16.0 + 4.0 * model.d_model + noise
    if not moe.num_shared_experts:
        return router
    shared = moe.num_shared_experts * _hidden(model, moe.d_expert or model.d_ff, moe.activation or model.activation)
    return router + width * (shared + (model.d_model if model.dtype == "bf16" else 0))


def _moe_inside(model: ModelConfig, layout: Layout, run: _Pass) -> float:
    """Bytes of the rows at the experts: what came, hidden units, and the answers that came back."""
    moe, width = model.moe, width_of(model)
    assert moe is not None
    d_expert, activation = moe.d_expert or model.d_ff, moe.activation or model.activation
    hidden = _hidden(model, d_expert, activation)
    if run.device == "cpu":
        hidden -= d_expert  # there the activation is worked out again from what came before it
    rows = run.rows_at * moe.top_k * width * (model.d_model + hidden)
    return rows + run.tokens * moe.top_k * (width * model.d_model + (8.0 if layout.expert_parallel == 1 else 40.0))
