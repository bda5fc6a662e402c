"""Which layouts fit, how long each takes and what it costs; the best first, and why each of the others does not fit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moetrain.config.schema import ModelConfig
from moetrain.plan.cluster import GB, Cluster
from moetrain.plan.flops import count_parameters, flops_per_token
from moetrain.plan.layout import Layout, Offer
from moetrain.plan.memory.device import IMBALANCE, Memory, memory_of
from moetrain.plan.time import Conditions, StepTime, step_time

OBJECTIVES = ("time", "cost", "gpus")
TOKENS_PER_STEP = 4_000_000
"""When nobody says: GPT-3 (arXiv:2005.14165, table 2.1) took 3.2 M, OLMoE (arXiv:2409.02060) 4.2 M."""
STEPS_AT_LEAST = 1000
"""A short run takes a smaller batch, so that it has this many steps."""
WORTH_TELLING = 0.95
"""What ``train`` does not run is told of where it is better by this factor at least."""
CHECKPOINT_BYTES = 12
"""Of a parameter: master and both moments in fp32."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked."""

    model: ModelConfig
    sequence_length: int
    tokens: float
    """Of the whole run."""
    nodes: tuple[int, ...]
    """Numbers of nodes to try."""
    objective: str = "time"
    global_batch: int | None = None
    """Sequences of a step; None: about ``TOKENS_PER_STEP`` tokens, as many on each device."""
    mask_documents: bool = False
    """Whether attention stays within a document."""
    imbalance: float = IMBALANCE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout that fits, and what the run would be."""

    layout: Layout
    nodes: int
    memory: Memory
    time: StepTime
    steps: int
    tokens_per_second: float
    mfu: float
    """Model FLOPs over the peak of all devices; what is recomputed does not count."""
    days: float
    """Of the whole run, failures and checkpoints included."""
    gpu_hours: float
    cost: float | None
    energy_kwh: float | None
    saving: Saving


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints (Young 1974, Daly 2006)."""

    size_bytes: float
    write_seconds: float
    interval_seconds: float
    """Between two checkpoints: sqrt(2 x write x time between failures)."""
    hours_between_failures: float
    """Of the whole cluster."""
    lost: float
    """Share of the time that goes into writing and into work done twice."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Layouts that do not fit for one reason."""

    reason: str
    many: int
    nearest: str
    """What the one that came nearest lacks."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found."""

    plans: list[Plan]
    """Those that fit and that ``train`` runs, best first."""
    refusals: list[Refusal]
    beyond: Plan | None
    """The best of those that fit but that ``train`` does not run; None: there is none, or none is better."""
    missing: str
    """What is missing where nothing fits; empty where something does."""


def search(question: Question, cluster: Cluster, *, efficiency: float, offer: Offer, modelled: Offer) -> Answer:
    """Try every layout.

    Args:
        efficiency: share of the peak that matrix products reach on the cluster.
        offer: what ``train`` runs.
        modelled: what is tried to see what it would take.
    """
    fitting: list[Plan] = []
    refused: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for nodes in question.nodes:
        gpus = nodes * cluster.gpus_per_node
        batch = global_batch(question, gpus=gpus)
        if batch % gpus:
            told = f"{batch} sequences on {gpus} devices"
            refused["the global batch is no multiple of the devices"].append((batch % gpus, told))
            continue
        for layout in _layouts(question.model, gpus=gpus, per_gpu=batch // gpus, modelled=modelled):
            memory = _memory(question, layout, cluster)
            lacks = _lacks(memory, layout, cluster)
            if lacks:
                if offer.takes(layout):
                    refused[lacks[0]].append(lacks[1:])
                continue
            fitting.append(_plan(question, layout, cluster, nodes=nodes, memory=memory, efficiency=efficiency))
    order = _order(question.objective)
    plans = sorted((plan for plan in fitting if offer.takes(plan.layout)), key=order)
    others = sorted((plan for plan in fitting if not offer.takes(plan.layout)), key=order)
    is_better = bool(others) and (not plans or order(others[0])[0] < WORTH_TELLING * order(plans[0])[0])
    beyond = others[0] if is_better else None
    return Answer(
        plans=plans,
        refusals=[_refusal(reason, found) for reason, found in refused.items()],
        beyond=beyond,
        missing="" if plans or beyond else _missing(question, cluster),
    )


def global_batch(question: Question, *, gpus: int) -> int:
    """Sequences of a step: the given number, or a power of two for each device, near the usual number of tokens."""
    if question.global_batch is not None:
        return question.global_batch
    tokens = min(TOKENS_PER_STEP, question.tokens / STEPS_AT_LEAST)
    per_gpu = max(1.0, tokens / question.sequence_length / gpus)
    return gpus * (1 << round(math.log2(per_gpu)))


def _layouts(model: ModelConfig, *, gpus: int, per_gpu: int, modelled: Offer) -> Iterator[Layout]:
    shared = 1 if model.moe is None else math.gcd(gpus, model.moe.num_experts)
    for expert_parallel in (size for size in range(1, shared + 1) if shared % size == 0):
        for stage in modelled.zero_stages:
            for recompute in modelled.recompute:
                for offload in modelled.offload_optimizer:
                    if offload and stage == 0:
                        continue  # there is no share to send away
                    for micro_batch in (size for size in range(1, min(per_gpu, 64) + 1) if per_gpu % size == 0):
                        yield Layout(
                            gpus=gpus,
                            expert_parallel=expert_parallel,
                            zero_stage=stage,
                            recompute=recompute,
                            micro_batch=micro_batch,
                            accumulation=per_gpu // micro_batch,
                            offload_optimizer=offload,
                        )


def _memory(question: Question, layout: Layout, cluster: Cluster) -> Memory:
    return memory_of(
        question.model,
        layout,
        sequence_length=question.sequence_length,
        mask_documents=question.mask_documents,
        imbalance=question.imbalance,
        device=cluster.device,
    )


def _lacks(memory: Memory, layout: Layout, cluster: Cluster) -> tuple[str, float, str] | None:
    """Reason, by how much, and in words; None where it fits."""
    if memory.total > cluster.memory_bytes:
        told = (
            f"{memory.total / GB:,.0f} GB of {cluster.memory_gb:,.0f} with EP {layout.expert_parallel}, micro-batch "
            f"{layout.micro_batch}: {_largest_parts(memory)}"
        )
        return f"memory, {layout_kind(layout)}", memory.total, told
    host = memory.host * cluster.gpus_per_node
    if host > cluster.host_memory_gb * GB:
        return f"host memory, {layout_kind(layout)}", host, f"{host / GB:,.0f} GB of {cluster.host_memory_gb:,.0f}"
    return None


def layout_kind(layout: Layout) -> str:
    """What ``train`` may not offer, in a few words."""
    offload = ", optimizer offloaded" if layout.offload_optimizer else ""
    return f"ZeRO-{layout.zero_stage}, recompute {layout.recompute}{offload}"


def _largest_parts(memory: Memory) -> str:
    sizes = [(name, getattr(memory, name)) for name in ("weights", "gradients", "masters", "moments", "activations",
                                                        "experts", "logits", "buffers")]  # fmt: skip
    largest = sorted(sizes, key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size / GB:,.0f}" for name, size in largest)


def _refusal(reason: str, found: Sequence[tuple[float, str]]) -> Refusal:
    return Refusal(reason=reason, many=len(found), nearest=min(found)[1])


def _plan(
    question: Question, layout: Layout, cluster: Cluster, *, nodes: int, memory: Memory, efficiency: float
) -> Plan:
    # memory must hold the worst moment, while time adds up over all of them: half the head-room on average
    conditions = Conditions(efficiency=efficiency, imbalance=(1 + question.imbalance) / 2)
    time = step_time(question.model, layout, cluster, sequence_length=question.sequence_length, conditions=conditions)
    per_step = layout.global_batch * question.sequence_length
    steps = math.ceil(question.tokens / per_step)
    saving = _saving(question.model, cluster, nodes=nodes)
    seconds = steps * time.total / (1 - saving.lost)
    flops = flops_per_token(question.model, sequence_length=question.sequence_length)
    gpu_hours = layout.gpus * seconds / 3600
    return Plan(
        layout=layout,
        nodes=nodes,
        memory=memory,
        time=time,
        steps=steps,
        tokens_per_second=per_step / time.total,
        mfu=per_step / time.total * flops / (cluster.peak_flops(question.model.dtype) * layout.gpus),
        days=seconds / 86400,
        gpu_hours=gpu_hours,
        cost=None if cluster.price_per_gpu_hour is None else gpu_hours * cluster.price_per_gpu_hour,
        energy_kwh=None if cluster.watts_per_gpu is None else gpu_hours * cluster.watts_per_gpu / 1000,
        saving=saving,
    )


def _saving(model: ModelConfig, cluster: Cluster, *, nodes: int) -> Saving:
    size = CHECKPOINT_BYTES * count_parameters(model).total
    write = size / (nodes * cluster.storage_gb_per_second * GB)
    between = cluster.hours_between_failures / (nodes * cluster.gpus_per_node)
    interval = math.sqrt(2 * write * between * 3600)
    # half an interval is done twice after a failure; a cluster that fails faster than it writes gets nowhere
    lost = min(0.99, write / interval + interval / (2 * between * 3600))
    return Saving(
        size_bytes=size,
        write_seconds=write,
        interval_seconds=interval,
        hours_between_failures=between,
        lost=lost,
    )


def _order(objective: str) -> Callable[[Plan], tuple[float, float]]:
    if objective == "cost":
        return lambda plan: (plan.cost if plan.cost is not None else plan.gpu_hours, plan.days)
    if objective == "gpus":
        return lambda plan: (plan.layout.gpus, plan.days)
    return lambda plan: (plan.days, plan.layout.gpus)


def _missing(question: Question, cluster: Cluster) -> str:
    """What no layout gets round: told where not even one that ``train`` does not run would fit."""
    gpus = max(question.nodes) * cluster.gpus_per_node
    experts = 1 if question.model.moe is None else math.gcd(gpus, question.model.moe.num_experts)
    layout = Layout(gpus=gpus, expert_parallel=experts, zero_stage=3, recompute="full", offload_optimizer=True)
    memory = _memory(question, layout, cluster)
    return (
        f"Even spread over all {gpus:,} devices, with all that is known here to save memory ({layout_kind(layout)}, EP "
        f"{experts}, micro-batch 1), it takes {memory.total / GB:,.0f} GB of {cluster.memory_gb:,.0f} on each "
        f"({_largest_parts(memory)}) and {memory.host * cluster.gpus_per_node / GB:,.0f} GB of "
        f"{cluster.host_memory_gb:,.0f} on each host. Use more nodes, shorter sequences (batch.sequence_length) or a "
        "cluster with more memory. Tensor and pipeline parallelism, which would split a block or the stack of blocks, "
        "are not there."
    )
