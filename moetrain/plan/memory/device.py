"""Bytes on one device, part by part, for a layout: what the engine and the layers really hold (docs/plan.md).

Five moments can be the fullest, and the fullest one counts: the *last block* forward (all activations, and at ZeRO-3
what weights were gathered in), the *turn* from forward to backward (all activations and the logits), the backward of
the *first block*, which comes last (all gradients, one block whole and its gradients), the *reduction* after it (all
gradients, buckets), and the *step* (gradients, and a flat copy of a share).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from moetrain.config.deepspeed import BUCKET_ELEMENTS, LIVE_ELEMENTS
from moetrain.config.schema import ModelConfig
from moetrain.plan.flops import GATED, ParameterCount, count_parameters
from moetrain.plan.layout import Layout
from moetrain.plan.memory.activations import activations_of, document_mask_bytes, width_of

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
    mask_documents: bool = False,
    imbalance: float = IMBALANCE,
    device: str = "cuda",
    slack: float = SLACK,
) -> Memory:
    """Bytes on the fullest device at the fullest moment of a step.

    Args:
        sequence_length: tokens of one sequence.
        mask_documents: whether attention stays within a document.
        imbalance: rows at the fullest device over the mean, at least 1.
        device: cuda or cpu; they keep different activations.
        slack: share of the rest that the allocator holds and cannot use.
    """
    load = _load(model, layout)
    always = _standing(model, layout, load)
    tokens = layout.micro_batch * sequence_length
    kept = activations_of(model, layout, tokens=tokens, imbalance=imbalance, device=device)
    block = kept.block
    mask = document_mask_bytes(model, layout, sequence_length=sequence_length) if mask_documents else 0.0
    forward = replace(
        always,
        activations=kept.activations + mask,
        experts=kept.experts,
        gradients=_gradients_between(model, layout, load),
        buffers=_empty_bucket(model, layout, load, device=device),
    )
    moments = (
        replace(forward, buffers=forward.buffers + _gather_buffer(model, layout, load)),
        replace(forward, logits=12.0 * model.vocab_size * tokens),
        replace(
            always,
            activations=block.outside + kept.activations / model.num_layers + mask,
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
    weights = width_of(model) * load.local
    if layout.zero_stage == 3:
        spread = _spread(layout, load)
        gathered = min(LIVE_ELEMENTS + spread / model.num_layers, spread)
        weights = width_of(model) * (load.share + gathered)
    # at stage 0 the optimizer steps on the weights themselves
    masters = 0.0 if layout.zero_stage == 0 and model.dtype == "fp32" else 4 * load.share
    state = Memory(weights=weights, masters=masters, moments=8 * load.share)
    if not layout.offload_optimizer:
        return state
    # with them the gradients of the share, a buffer for the largest and, below stage 3, its weights on their way back
    on_their_way = width_of(model) if layout.zero_stage < 3 else 0
    waiting = (4 + on_their_way) * load.share + 4 * load.largest
    return replace(state, masters=0.0, moments=0.0, host=state.masters + state.moments + waiting)


def _spread(layout: Layout, load: _Load) -> float:
    """Weights that stage 3 has to gather: experts that no other device has are whole already."""
    return load.dense + (load.experts if layout.expert_data > 1 else 0.0)


def _gather_buffer(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """What weights are gathered into, before each is copied out; it goes when the last of them is asked for."""
    return width_of(model) * min(BUCKET_ELEMENTS, _spread(layout, load)) if layout.zero_stage == 3 else 0.0


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
    return width_of(model) * filled + copies


def _empty_bucket(model: ModelConfig, layout: Layout, load: _Load, *, device: str) -> float:
    """The bucket is there before it is filled; on a CPU its pages are not: at stage 3 those that were filled once."""
    if layout.zero_stage == 0 or _is_bf16_optimizer(model, layout):
        return 0.0
    if layout.zero_stage == 3:
        return 4 * (BUCKET_ELEMENTS if device == "cuda" else min(BUCKET_ELEMENTS, _reduced_together(model, load)))
    return width_of(model) * BUCKET_ELEMENTS if device == "cuda" else 0.0


def _filled_bucket(model: ModelConfig, layout: Layout, load: _Load, *, device: str) -> float:
    """At stage 2 all gradients are in it at the end of the backward pass, as far as it has room."""
    filled = width_of(model) * min(BUCKET_ELEMENTS, load.local) if layout.zero_stage == 2 else 0.0
    return max(filled, _empty_bucket(model, layout, load, device=device))


def _reduced_at_once(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """At stage 3, beside the bucket: gradients as they came, and twice in fp32."""
    together = max(load.largest, min(BUCKET_ELEMENTS, load.local / model.num_layers))
    return (width_of(model) + 8) * together if layout.zero_stage == 3 else 0.0


def _reduced_together(model: ModelConfig, load: _Load) -> float:
    """Elements that stage 3 reduces at once, where the bucket holds them: the experts of a block end what waits."""
    return load.local / (model.num_layers if load.experts else 1)


def _step_copies(model: ModelConfig, layout: Layout, load: _Load) -> float:
    """The flat gradient of one group of parameters, made before it is stepped on; in bf16 a copy of that size, too."""
    if layout.zero_stage == 0 or layout.offload_optimizer:
        return 0.0
    return 4 * max(load.dense_share, load.experts_share)
