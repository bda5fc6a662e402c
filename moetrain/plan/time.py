"""Seconds of one step, part by part: what is computed, what moves through memory, what crosses which link.

    compute     FLOPs / (peak x EFFICIENCY), what is recomputed included
    elementwise bytes that norms, activations, residuals and dispatch read and write / (memory rate x REACHED)
    collective  rounds x latency + bytes / (link x REACHED)     the alpha-beta model

A group of devices within a node uses NVLink. One that spans nodes is a ring that leaves each node through the ports of
all its members there. An all-to-all sends to each device directly: its share for the own node and that for the others
travel at the same time.

Overlap: an MoE layer's all-to-alls hide behind nothing, for the next thing needs their answer. Gradient reduction and
ZeRO-3's gathers hide behind the backward pass as far as ``overlap`` says: the engine sets overlap_comm false, so 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moetrain.config.schema import ModelConfig
from moetrain.plan.cluster import GB, Cluster
from moetrain.plan.flops import GATED, count_parameters, flops_per_token, is_moe_block
from moetrain.plan.layout import Layout

REACHED = 0.8
"""Of a link's or a memory's peak. DeepEP's dispatch reaches 0.86 to 1 of its links (its README), a streaming kernel
about 0.9 of the memory."""
LATENCY = {"node": 10e-6, "network": 25e-6}
"""Seconds that a collective costs before its first byte, for each doubling of its devices: of the order that NCCL's
tests print."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the slowest device."""

    compute: float = 0.0
    """Matrix products, forward and backward."""
    recompute: float = 0.0
    """Those done a second time."""
    elementwise: float = 0.0
    """Norms, activations, residuals, dispatch, loss."""
    all_to_all_node: float = 0.0
    """Tokens to experts and back over NVLink."""
    all_to_all_network: float = 0.0
    """The same over the network, what NVLink's time does not cover."""
    dense_gradients: float = 0.0
    """Reduction of the gradients of all but the experts, over all devices."""
    expert_gradients: float = 0.0
    """Those of the experts, over the devices that hold the same."""
    gathers: float = 0.0
    """Weights brought together: at ZeRO-3 in every pass, else once after the step."""
    optimizer: float = 0.0
    """AdamW on this device's share."""

    @property
    def total(self) -> float:
        return math.fsum(getattr(self, part) for part in TIMES)


TIMES = tuple(field.name for field in fields(StepTime))


@dataclass(frozen=True)
class Conditions:
    """What a step's time depends on beside model, layout and cluster."""

    efficiency: float
    """Share of the peak that matrix products reach (``plan.published`` calibrates it)."""
    imbalance: float = 1.0
    """Rows at the fullest device over the mean: the others wait for it."""
    overlap: float = 0.0
    """Share of the compute behind which gradient reduction and gathers can hide."""
    gradient_bytes: int = 4
    """Of one gradient as it is reduced: the engine sends fp32."""


def step_time(
    model: ModelConfig, layout: Layout, cluster: Cluster, *, sequence_length: int, conditions: Conditions
) -> StepTime:
    """Seconds of one optimizer step."""
    tokens = layout.micro_batch * sequence_length
    rate = cluster.peak_flops(model.dtype) * conditions.efficiency
    flops = _slowest_flops(model, sequence_length=sequence_length, imbalance=conditions.imbalance) * tokens
    again = {"none": 0.0, "selective": 0.9, "full": 1.0}[layout.recompute] / 3
    memory_rate = cluster.memory_gb_per_second * GB * REACHED
    passes = 1 + again
    moved = _moved_bytes(model, imbalance=conditions.imbalance) * tokens + _weight_bytes(model, layout)
    compute, recompute = flops / rate, again * flops / rate
    near, far = _all_to_all(model, layout, cluster, tokens=tokens, imbalance=conditions.imbalance)
    dense, experts, gathers = _weights_and_gradients(model, layout, cluster, conditions=conditions)
    often = layout.accumulation
    time = StepTime(
        compute=often * compute,
        recompute=often * recompute,
        elementwise=often * passes * moved / memory_rate,
        all_to_all_node=often * near,
        all_to_all_network=often * far,
        dense_gradients=dense,
        expert_gradients=experts,
        gathers=gathers,
        optimizer=_optimizer(model, layout, cluster),
    )
    return _overlapped(time, overlap=conditions.overlap)


def _overlapped(time: StepTime, *, overlap: float) -> StepTime:
    hidden = overlap * (time.compute + time.recompute + time.elementwise)
    left = {}
    for part in ("gathers", "dense_gradients", "expert_gradients"):
        seconds = getattr(time, part)
        left[part] = max(0.0, seconds - hidden)
        hidden = max(0.0, hidden - seconds)
    return StepTime(**{part: left.get(part, getattr(time, part)) for part in TIMES})


def _slowest_flops(model: ModelConfig, *, sequence_length: int, imbalance: float) -> float:
    """FLOPs per token, those of the experts as many as the fullest device has."""
    flops = float(flops_per_token(model, sequence_length=sequence_length))
    return flops + (imbalance - 1) * 6 * count_parameters(model).active_experts


def _moved_bytes(model: ModelConfig, *, imbalance: float) -> float:
    """Bytes per token that operations other than matrix products read and write, forward and backward."""
    width, moe = (2 if model.dtype == "bf16" else 4), model.moe
    d_head = model.d_head or model.d_model // model.num_heads
    heads = (model.num_heads + 2 * (model.num_kv_heads or model.num_heads)) * d_head
    # two norms and two residuals, each read and written, and three times that backward; turning of the heads
    attention = width * (16 * model.d_model + 8 * heads)
    total = 0.0
    for block in range(model.num_layers):
        if moe is not None and is_moe_block(model, block=block):
            maps = 3 if (moe.activation or model.activation) in GATED else 2
            d_expert = moe.d_expert or model.d_ff
            # copy, sort, exchange, order, answer, order, exchange, add up; and back
            rows = 20 * model.d_model + 3 * maps * d_expert
            hidden = 3 * maps * moe.num_shared_experts * d_expert
            total += attention + width * (imbalance * moe.top_k * rows + hidden) + 40 * moe.num_experts
        else:
            maps = 3 if model.activation in GATED else 2
            total += attention + width * 3 * maps * model.d_ff
    return total + (5 * 4 + 2 * width) * model.vocab_size


def _weight_bytes(model: ModelConfig, layout: Layout) -> float:
    """Bytes of weights read, and of gradients written and added up, in one micro-batch."""
    count, width = count_parameters(model), (2 if model.dtype == "bf16" else 4)
    return (2 * width + width + 8) * (count.non_expert + count.experts / layout.expert_parallel)


def _all_to_all(
    model: ModelConfig, layout: Layout, cluster: Cluster, *, tokens: float, imbalance: float
) -> tuple[float, float]:
    """Seconds in one micro-batch over NVLink, and what the network takes longer."""
    moe, size = model.moe, layout.expert_parallel
    if moe is None or size == 1:
        return 0.0, 0.0
    layers = sum(is_moe_block(model, block=block) for block in range(model.num_layers))
    # there and back, forward and backward; fully recomputed blocks send once more
    trips = layers * (6 if layout.recompute == "full" else 4)
    sent = tokens * moe.top_k * model.d_model * (2 if model.dtype == "bf16" else 4) * imbalance
    near, far = all_to_all_seconds(sent, size=size, cluster=cluster)
    return trips * near, trips * max(0.0, far - near)


def all_to_all_seconds(sent: float, *, size: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds of one all-to-all among neighbours over NVLink, and meanwhile over the network, 0 inside a node.

    Args:
        sent: bytes from each device, with those that it keeps.
        size: devices.
    """
    in_node = min(size, cluster.gpus_per_node)
    near = LATENCY["node"] * math.log2(max(2, in_node)) + sent * (in_node - 1) / size / _link(
        cluster.nvlink_gb_per_second
    )
    if size <= cluster.gpus_per_node:
        return near, 0.0
    far = LATENCY["network"] * math.log2(size) + sent * (size - in_node) / size / _link(cluster.network_gb_per_second)
    return near, far


def _weights_and_gradients(
    model: ModelConfig, layout: Layout, cluster: Cluster, *, conditions: Conditions
) -> tuple[float, float, float]:
    """Seconds in one step: dense gradients, expert gradients, gathers of weights."""
    count, width = count_parameters(model), (2 if model.dtype == "bf16" else 4)
    parts = (
        (count.non_expert, layout.gpus, 1),
        (count.experts / layout.expert_parallel, layout.expert_data, layout.expert_parallel),
    )
    # stages 0 and 1 reduce once per step, stages 2 and 3 every micro-batch
    often = 1 if layout.zero_stage <= 1 else layout.accumulation
    # an all-reduce is worth two one-way trips; stage 3 scatters, which is one
    ways = 1 if layout.zero_stage == 3 else 2
    gradients, gathers = [], 0.0
    for numel, size, stride in parts:
        if size == 1 or not numel:
            gradients.append(0.0)
            continue
        latency, per_byte = ring(size=size, stride=stride, cluster=cluster)
        waits = model.num_layers * latency  # a call for each block
        gradients.append(often * (waits + ways * conditions.gradient_bytes * numel * per_byte))
        if layout.zero_stage == 3:
            gathers += 2 * layout.accumulation * (waits + width * numel * per_byte)
        elif layout.zero_stage > 0:
            gathers += waits + width * numel * per_byte
    return gradients[0], gradients[1], gathers


def ring(*, size: int, stride: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds before the first byte, and for each byte that goes once around ``size`` devices, ``stride`` apart."""
    in_node = max(1, min(size, cluster.gpus_per_node // stride))
    latency, bandwidth = LATENCY["node"], cluster.nvlink_gb_per_second
    if size > in_node:
        latency, bandwidth = LATENCY["network"], min(bandwidth, in_node * cluster.network_gb_per_second)
    return latency * math.log2(size), (size - 1) / size / _link(bandwidth)


def _optimizer(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """AdamW reads gradient, master and both moments, and writes the last three and the weights."""
    count = count_parameters(model)
    dense = count.non_expert / (layout.gpus if layout.zero_stage else 1)
    experts = count.experts / layout.expert_parallel / (layout.expert_data if layout.zero_stage else 1)
    if not layout.offload_optimizer:
        return 30 * (dense + experts) / (cluster.memory_gb_per_second * GB * REACHED)
    # gradients out and weights in over the host link; AdamW itself on the host, all devices of a node at once
    trip = 6 * (dense + experts) / _link(cluster.host_link_gb_per_second)
    return trip + 28 * (dense + experts) * cluster.gpus_per_node / (HOST_MEMORY_GB_PER_SECOND * GB)


HOST_MEMORY_GB_PER_SECOND = 200.0
"""Of a two-socket server, in AdamW on its processors: an assumption."""


def _link(gb_per_second: float) -> float:
    return gb_per_second * GB * REACHED
