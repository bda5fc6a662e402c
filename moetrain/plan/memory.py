"""Bytes on one device, part by part, for a layout: what the engine and the layers really hold (docs/plan.md).

Letters (one legend for the file)
    T tokens of a micro-batch on a device    D d_model    V vocab_size    H, G, d query heads, key/value heads, width
    F hidden width of a feed-forward net     g 2 for a gated one, else 1      K experts per token, E experts
    R rows at the fullest device's experts, T x K x imbalance

Four moments can be the fullest, and the fullest one counts: the *turn* from forward to backward (all activations and
the logits), the backward of the *first block*, which comes last (all gradients, one block whole and its gradients),
the *reduction* after it (all gradients, buckets), and the *step* (gradients, and a flat copy of a share).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from moetrain.config.deepspeed import BUCKET_ELEMENTS, LIVE_ELEMENTS
from moetrain.config.routers import resolve_router
from moetrain.config.schema import ModelConfig
from moetrain.plan.flops import GATED, ParameterCount, count_parameters, is_moe_block
from moetrain.plan.layout import Layout

UNSHARDED_BUCKET_ELEMENTS = 500_000_000
"""The same at stage 0: DeepSpeed's constant MEMORY_OPT_ALLREDUCE_SIZE."""
FRAMEWORK_BYTES = {"cuda": 2.0e9, "cpu": 0.0}
"""CUDA context, cuBLAS and NCCL buffers: an assumption, nobody measured it with moetrain. On a CPU nothing is on the
device, and imports are not counted."""
SLACK = 0.06
"""Share of the rest that the allocator holds and cannot use: an assumption for CUDA's caching allocator."""
IMBALANCE = 1.2
"""Rows at the fullest device over the mean. A balance loss keeps experts within 1.1 to 1.2 of the mean after the
warm-up (docs/results.md); at random weights it is more for a few steps."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the fullest moment of a step."""

    weights: float = 0.0
    """In the model's dtype; at ZeRO-3 this device's share and what is gathered."""
    gradients: float = 0.0
    """In fp32 while they are added up, as the engine does."""
    masters: float = 0.0
    """fp32 weights that the optimizer steps on."""
    moments: float = 0.0
    """The two of Adam, fp32."""
    activations: float = 0.0
    """Kept for the backward pass outside the experts."""
    experts: float = 0.0
    """Rows at the experts and their hidden units: dispatch, all-to-all, head-room for imbalance."""
    logits: float = 0.0
    """Scores, their softmax and its gradient."""
    buffers: float = 0.0
    """Buckets of the gradient reduction, and the copies that a reduction or a step makes."""
    slack: float = 0.0
    """What the allocator holds and cannot use."""
    framework: float = 0.0
    """What the device holds before a model is there."""
    host: float = 0.0
    """In the memory of the host, not on the device: the offloaded optimizer."""

    @property
    def total(self) -> float:
        """On the device."""
        return math.fsum(getattr(self, part) for part in PARTS)


PARTS = tuple(field.name for field in fields(Memory) if field.name != "host")


@dataclass(frozen=True)
class _Load:
    """Parameters on one device, and its share of those it steps on."""

    dense: float
    experts: float
    dense_share: float
    experts_share: float
    largest: float
    """Of one tensor."""

    @property
    def local(self) -> float:
        return self.dense + self.experts

    @property
    def share(self) -> float:
        return self.dense_share + self.experts_share


def memory_of(
    model: ModelConfig,
    layout: Layout,
    *,
    sequence_length: int,
    imbalance: float = IMBALANCE,
    device: str = "cuda",
    slack: float = SLACK,
) -> Memory:
    """Bytes on the fullest device at the fullest moment of a step.

    Args:
        sequence_length: tokens of one sequence.
        imbalance: rows at the fullest device over the mean, at least 1.
        device: cuda or cpu; they keep different activations.
        slack: share of the rest that the allocator holds and cannot use.
    """
    load = _load(model, layout)
    always = _standing(model, layout, load)
    tokens = layout.micro_batch * sequence_length
    kept = _activations(model, layout, tokens=tokens, imbalance=imbalance, device=device)
    block = kept.block
    moments = (
        replace(
            always,
            activations=kept.activations,
            experts=kept.experts,
            logits=12.0 * model.vocab_size * tokens,
            gradients=_gradients_between(model, layout, load),
            buffers=_empty_bucket(model, layout, load, device=device),
        ),
        replace(
            always,
            activations=block.outside + kept.activations / model.num_layers,
            experts=block.inside + kept.experts / model.num_layers,
            gradients=_gradients_at_the_end(model, layout, load),
            buffers=_filled_bucket(model, layout, load, device=device) + _reduced_at_once(model, layout, load),
        ),
        replace(
            always,
            gradients=_gradients_at_the_end(model, layout, load),
            buffers=_buckets(model, layout, load, device=device),
        ),
        replace(
            always, gradients=_gradients_at_the_step(model, layout, load), buffers=_step_copies(model, layout, load)
        ),
    )
    fullest = max(moments, key=lambda moment: moment.total)
    return replace(fullest, slack=slack * fullest.total, framework=FRAMEWORK_BYTES[device])


def _width(model: ModelConfig) -> int:
    return 2 if model.dtype == "bf16" else 4


def _load(model: ModelConfig, layout: Layout) -> _Load:
    count: ParameterCount = count_parameters(model)
    experts = count.experts / layout.expert_parallel
    spread = layout.zero_stage > 0
    moe, largest = model.moe, float(count.embedding)
    if moe is not None:
        gated = 2 if (moe.activation or model.activation) in GATED else 1
        per_map = moe.num_experts / layout.expert_parallel * gated * (moe.d_expert or model.d_ff) * model.d_model
        largest = max(largest, per_map)
    return _Load(
        dense=count.non_expert,
        experts=experts,
        dense_share=count.non_expert / (layout.gpus if spread else 1),
        experts_share=experts / (layout.expert_data if spread else 1),
        largest=largest,
    )


def _is_bf16_optimizer(model: ModelConfig, layout: Layout) -> bool:
    """DeepSpeed has another optimizer for bf16 at stage 1: it keeps fp32 gradients of all weights in one buffer."""
    return model.dtype == "bf16" and layout.zero_stage <= 1 and not layout.offload_optimizer


def _standing(model: ModelConfig, layout: Layout, load: _Load) -> Memory:
    """What is there all the time."""
    weights = _width(model) * load.local
    if layout.zero_stage == 3:
        gathered = min(LIVE_ELEMENTS + load.local / model.num_layers, load.local)
        weights = _width(model) * (load.share + gathered)
    # at stage 0 the optimizer steps on the weights themselves
    masters = 0.0 if layout.zero_stage == 0 and model.dtype == "fp32" else 4 * load.share
    state = Memory(weights=weights, masters=masters, moments=8 * load.share)
    if not layout.offload_optimizer:
        return state
    # with them the gradients of the share, a buffer for the largest and, below stage 3, its weights on their way back
    on_their_way = _width(model) if layout.zero_stage < 3 else 0
    waiting = (4 + on_their_way) * load.share + 4 * load.largest
    return replace(state, masters=0.0, moments=0.0, host=state.masters + state.moments + waiting)


def _gradients_between(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """Gradients that wait while the next micro-batch runs forward."""
    if _is_bf16_optimizer(model, layout):
        return 4 * load.local  # one buffer, always there
    if layout.zero_stage == 3 and not layout.offload_optimizer:
        return 4 * load.share  # the same
    if layout.accumulation == 1 or layout.offload_optimizer:
        return 0.0
    return 4 * (load.share if layout.zero_stage >= 2 else load.local)


def _gradients_at_the_end(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """While the last micro-batch's gradients are reduced; those in the bucket are counted in ``_buckets``."""
    if _is_bf16_optimizer(model, layout):
        return 4 * load.local + 6 * load.largest  # one in bf16, and as it is added up in fp32
    if layout.zero_stage == 0:
        return 4 * load.local
    # the reduced share has a buffer of its own, which comes with the first full bucket; in bf16, before
    is_early = model.dtype == "bf16" or layout.zero_stage == 3
    own = 4 * load.share if is_early or load.local > BUCKET_ELEMENTS else 0.0
    if layout.zero_stage == 1:
        return 4 * load.local + own
    if layout.offload_optimizer:
        return 0.0
    waiting = 4 * load.share if layout.accumulation > 1 and not is_early else 0.0
    return waiting + own


def _gradients_at_the_step(model: ModelConfig, layout: Layout, load: _Load) -> float:
    if layout.zero_stage == 0 or _is_bf16_optimizer(model, layout):
        return 4 * load.local
    return 0.0 if layout.offload_optimizer else 4 * load.share


def _buckets(model: ModelConfig, layout: Layout, load: _Load, *, device: str) -> float:
    if _is_bf16_optimizer(model, layout):
        return 0.0  # its one buffer is reduced in place
    if layout.zero_stage == 0:
        return 4 * min(UNSHARDED_BUCKET_ELEMENTS, max(load.dense, load.experts))
    if layout.zero_stage == 3:
        return _empty_bucket(model, layout, load, device=device) + _reduced_at_once(model, layout, load)
    filled = max(min(BUCKET_ELEMENTS, load.local), load.largest if load.largest > BUCKET_ELEMENTS else 0.0)
    # what goes to one group of ranks is copied into one piece, and a bf16 piece then to fp32; a tensor larger than the
    # bucket goes by itself
    together = min(filled, max(load.dense, load.experts))
    copies = together * (4 if model.dtype == "fp32" else 6)
    if layout.zero_stage == 1:
        # gradients move into the bucket, so that what is in it is counted already
        return _empty_bucket(model, layout, load, device=device) + copies
    return _width(model) * filled + copies


def _empty_bucket(model: ModelConfig, layout: Layout, load: _Load, *, device: str) -> float:
    """The bucket is there before it is filled; on a CPU its pages are not: at stage 3 those that a block has filled."""
    if layout.zero_stage == 0 or _is_bf16_optimizer(model, layout):
        return 0.0
    if layout.zero_stage == 3:
        return 4 * (BUCKET_ELEMENTS if device == "cuda" else min(BUCKET_ELEMENTS, load.local / model.num_layers))
    return _width(model) * BUCKET_ELEMENTS if device == "cuda" else 0.0


def _filled_bucket(model: ModelConfig, layout: Layout, load: _Load, *, device: str) -> float:
    """At stage 2 all gradients are in it at the end of the backward pass, as far as it has room."""
    filled = _width(model) * min(BUCKET_ELEMENTS, load.local) if layout.zero_stage == 2 else 0.0
    return max(filled, _empty_bucket(model, layout, load, device=device))


def _reduced_at_once(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """At stage 3 gradients are reduced block by block: as they came, and twice in fp32."""
    together = max(load.largest, min(BUCKET_ELEMENTS, load.local / model.num_layers))
    return (_width(model) + 8) * together if layout.zero_stage == 3 else 0.0


def _step_copies(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """The flat gradient of one group of parameters, made before it is stepped on; in bf16 a copy of that size, too."""
    if layout.zero_stage == 0 or layout.offload_optimizer:
        return 0.0
    return 4 * max(load.dense_share, load.experts_share)


@dataclass(frozen=True)
class _Block:
    """Bytes of one block: outside its experts and inside."""

    outside: float
    inside: float


@dataclass(frozen=True)
class _Kept:
    """What a forward pass leaves."""

    activations: float
    experts: float
    block: _Block
    """One block in its backward pass: whole, recomputed or not, with the gradients of its largest parts."""


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass on the fullest device."""

    tokens: float
    rows_at: float
    """Tokens that its experts have work for, before each is copied for K experts."""
    device: str


def _activations(model: ModelConfig, layout: Layout, *, tokens: float, imbalance: float, device: str) -> _Kept:
    run = _Pass(tokens, tokens * imbalance, device)
    sparse = sum(is_moe_block(model, block=block) for block in range(model.num_layers))
    outside, inside, in_backward = 0.0, 0.0, []
    for is_sparse, many in ((True, sparse), (False, model.num_layers - sparse)):
        if many:
            block = _whole_block(model, layout, run, is_sparse=is_sparse)
            left = block if layout.recompute == "none" else _left(model, layout, run, is_sparse=is_sparse)
            outside, inside = outside + many * left.outside, inside + many * left.inside
            in_backward.append(_in_backward(model, layout, run, block, is_sparse=is_sparse))
    last_norm = _norm(model, device=device) * tokens + _width(model) * model.d_model * tokens
    fullest = max(in_backward, key=lambda block: block.outside + block.inside)
    return _Kept(activations=outside + last_norm, experts=inside, block=fullest)


def _whole_block(model: ModelConfig, layout: Layout, run: _Pass, *, is_sparse: bool) -> _Block:
    """A block of which nothing is recomputed."""
    attention = _attention(model, device=run.device) * run.tokens
    if is_sparse:
        return _Block(attention + _moe_outside(model) * run.tokens, _moe_inside(model, layout, run))
    dense = _width(model) * (model.d_model + _hidden(model, model.d_ff, model.activation))
    return _Block(attention + dense * run.tokens, 0.0)


def _in_backward(model: ModelConfig, layout: Layout, run: _Pass, block: _Block, *, is_sparse: bool) -> _Block:
    """A whole block and the gradients that its own backward makes."""
    width, moe = _width(model), model.moe
    stream = 3 * width * model.d_model * run.tokens
    if not is_sparse or moe is None:
        dense = width * _hidden(model, model.d_ff, model.activation) * run.tokens
        return _Block(block.outside + stream + dense, 0.0)
    hidden = _hidden(model, moe.d_expert or model.d_ff, moe.activation or model.activation)
    if run.device == "cpu":
        hidden *= layout.expert_parallel / moe.num_experts  # one expert after the other
    rows = width * moe.top_k * run.rows_at * (hidden + 2 * model.d_model)
    # recomputed part by part, experts and attention are not whole at the same time
    outside = stream if layout.recompute == "selective" else block.outside + stream
    return _Block(outside, block.inside + rows)


def _left(model: ModelConfig, layout: Layout, run: _Pass, *, is_sparse: bool) -> _Block:
    """What recomputation leaves of a block."""
    stream, moe = _width(model) * model.d_model, model.moe
    if layout.recompute == "full":
        return _Block(stream * run.tokens, 0.0)
    if not is_sparse or moe is None:
        return _Block(2 * stream * run.tokens, 0.0)
    routing = (12 * moe.num_experts + 32 * moe.top_k) * run.tokens
    return _Block(2 * stream * run.tokens + routing, stream * moe.top_k * (run.rows_at + run.tokens))


def _norm(model: ModelConfig, *, device: str) -> float:
    """Bytes per token beside the normed tokens themselves, which the next map keeps."""
    width = _width(model)
    if model.norm == "rmsnorm" and device == "cpu":
        # there PyTorch builds it from parts: the input in fp32 and the scaled input in fp32
        return model.d_model * 8.0
    return model.d_model * width


def _attention(model: ModelConfig, *, device: str) -> float:
    """Bytes per token of a block's attention and both its norms."""
    width, d_head = _width(model), model.d_head or model.d_model // model.num_heads
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
    moe, width = model.moe, _width(model)
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
    moe, width = model.moe, _width(model)
    assert moe is not None
    d_expert, activation = moe.d_expert or model.d_ff, moe.activation or model.activation
    hidden = _hidden(model, d_expert, activation)
    if run.device == "cpu":
        hidden -= d_expert  # there the activation is worked out again from what came before it
    rows = run.rows_at * moe.top_k * width * (model.d_model + hidden)
    return rows + run.tokens * moe.top_k * (width * model.d_model + (8.0 if layout.expert_parallel == 1 else 40.0))
