"""Parts of a run, each made from its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moetrain.config.checks import in_steps, steps_in_run
from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.routers import loss_weights
from moetrain.config.schema import OptimConfig, RunConfig
from moetrain.data.loader import NOT_COUNTED, Batches, HeldOutBatch
from moetrain.data.packing import Packing
from moetrain.metrics.load import LoadMeter
from moetrain.metrics.speed import Speed, peak_flops
from moetrain.model.build import build_model, expert_table, initialize_part
from moetrain.model.gpt import GPT
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel.groups import Groups
from moetrain.parallel.host import resident_bytes
from moetrain.parallel.topology import Topology
from moetrain.plan.flops import flops_per_token
from moetrain.train.adopted.stage3 import cut
from moetrain.train.engine import Engine
from moetrain.train.schedule import Schedule


@dataclass(frozen=True)
class Sizes:
    """Numbers that several parts need, worked out once from the settings."""

    sequence_length: int
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    steps: int

    @staticmethod
    def of(run: RunConfig, *, world_size: int) -> Sizes:
        length = run.sequence_length
        tokens_per_step = run.batch.global_batch * length
        micro_batch = run.batch.micro_batch or run.batch.global_batch // world_size
        return Sizes(
            sequence_length=length,
            micro_batch=micro_batch,
            accumulation=run.batch.global_batch // (micro_batch * world_size),
            tokens_per_step=tokens_per_step,
            steps=steps_in_run(run.schedule, tokens_per_step=tokens_per_step),
        )


def build_engine(run: RunConfig, *, groups: Groups, sizes: Sizes, frequency: Callable[[], Tensor]) -> Engine:
    """The model of a run on this rank, and what trains it.

    Args:
        frequency: tells how often each token id occurs in the training text, [V]; see ``expert_table``.
    """
    moe = run.model.moe
    config = deepspeed_config(
        micro_batch=sizes.micro_batch,
        accumulation=sizes.accumulation,
        world_size=groups.topology.world_size,
        zero_stage=run.parallel.zero_stage,
        dtype=run.model.dtype,
        clip=run.optim.clip,
        offload_optimizer=run.parallel.offload_optimizer,
    )
    gpt = build_gpt(run, groups=groups, config=config, frequency=frequency)
    objective = Objective(gpt, loss_weights=loss_weights(moe) if moe else {})
    optimizer = {
        "lr": run.optim.lr,
        "betas": (run.optim.beta1, run.optim.beta2),
        "eps": run.optim.eps,
        "weight_decay": run.optim.weight_decay,
    }
    return Engine(objective.to(groups.device), groups=groups, config=config, optimizer=optimizer, clip=run.optim.clip,
                  rates=learning_rates(run.optim))  # fmt: skip


def build_gpt(run: RunConfig, *, groups: Groups, config: dict[str, Any], frequency: Callable[[], Tensor]) -> GPT:
    """The model of a run on this rank, with its first values; at ZeRO 3 its shares alone.

    Args:
        config: as the engine's.
        frequency: as ``build_engine``.
    """
    moe, topology = run.model.moe, groups.topology

    def made(name: str, part: nn.Module) -> None:
        initialize_part(name, part, num_layers=run.model.num_layers, init_std=run.model.init_std, seed=run.seed)
        if run.parallel.zero_stage == 3:
            cut(part, expert_parallel=topology.expert_parallel, config=config, device=groups.device)

    return build_model(
        run.model,
        local_experts=topology.local_experts(moe.num_experts) if moe else None,
        expert_group=groups.expert,
        all_to_all=groups.all_to_all,
        expert_V=expert_table(run.model, seed=run.seed, frequency=frequency),
        recompute=run.parallel.recompute,
        made=made,
    )


def learning_rates(optim: OptimConfig) -> dict[str, float]:
    """Part of the model -> its learning rate as a share of the schedule's; 0: it is frozen."""
    rates = {"router": optim.router_lr_ratio, "experts": optim.experts_lr_ratio, "dense": 1.0}
    return {part: 0.0 if part in optim.freeze else rate for part, rate in rates.items()}


def micro_batches(
    batches: Batches, step: int, *, packing: Packing, topology: Topology, micro_batch: int, device: torch.device
) -> list[MicroBatch]:
    """What the model takes on this rank at a step.

    Args:
        packing: what documents in one row see of each other.
        micro_batch: rows of each.
    """
    rows = batches.rank_slice(step, rank=topology.rank, world_size=topology.world_size, micro_batch=micro_batch)
    per_row = batches.counted_per_row(step)
    tokens, targets = rows.tokens[..., :-1], rows.tokens[..., 1:]
    if rows.counted is not None:
        targets = np.where(rows.counted[..., 1:], targets, NOT_COUNTED)
    return [
        _on_device(*each, packing=packing, device=device, counted=None if per_row is None else per_row * micro_batch)
        for each in zip(tokens, targets, strict=True)
    ]


def held_out_micro_batch(batch: HeldOutBatch, *, packing: Packing, device: torch.device) -> MicroBatch:
    """The same of held-out text."""
    return _on_device(batch.tokens, batch.targets, packing=packing, device=device)


def _on_device(
    tokens: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    *,
    packing: Packing,
    device: torch.device,
    counted: float | None = None,
) -> MicroBatch:
    def sent(array: npt.NDArray[np.int64] | None) -> Tensor | None:
        if array is None:
            return None
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    token_BS, target_BS = sent(tokens), sent(targets)
    assert token_BS is not None
    assert target_BS is not None
    return MicroBatch(
        token_BS=token_BS,
        target_BS=target_BS,
        document_BS=sent(packing.documents(tokens)),
        position_BS=sent(packing.positions(tokens)),
        counted=counted,
    )


def make_meter(run: RunConfig, device: torch.device, *, dead_after: int = 1) -> LoadMeter | None:
    """What adds up the load of the experts; None for a dense model."""
    moe, layers = run.model.moe, run.model.num_layers
    return LoadMeter(layers // moe.every, moe.num_experts, device, dead_after=dead_after) if moe else None


def make_speed(run: RunConfig, *, groups: Groups, sizes: Sizes) -> Speed:
    """What tells tokens and FLOPs per second."""
    peak = run.log.peak_tflops * 1e12 if run.log.peak_tflops else None
    if peak is None and groups.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(groups.device), run.model.dtype)
    return Speed(
        flops_per_token(run.model, sequence_length=sizes.sequence_length),
        peak_flops=peak,
        world_size=groups.topology.world_size,
    )


class MemoryGauge:
    """The most memory that this rank has needed: on a GPU what PyTorch's allocator held; on a CPU what was resident,
    above what the program itself took before there was a model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = resident_bytes() or 0

    def peak(self) -> int | None:
        """Bytes, so far; None: this system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        peak = resident_bytes(peak=True)
        return None if peak is None else peak - self._before


def make_schedule(run: RunConfig, *, sizes: Sizes) -> Schedule:
    """The learning rate of each step."""
    given, per_step = run.schedule, sizes.tokens_per_step
    decay = in_steps(given.decay_steps, given.decay_tokens, tokens_per_step=per_step)
    return Schedule(
        kind=given.kind,
        peak=run.optim.lr,
        steps=sizes.steps,
        warmup=in_steps(given.warmup_steps, given.warmup_tokens, tokens_per_step=per_step) or 0,
        decay=sizes.steps // 5 if decay is None else decay,
        min_ratio=given.min_lr_ratio,
    )
