"""The points of a sweep, with what is kept equal across them; all that is impossible is told before anything runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moetrain.config.checks import check, resolve, steps_in_run
from moetrain.config.freeze import flatten, freeze, to_dict
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError
from moetrain.plan.cluster import Cluster
from moetrain.plan.flops import count_parameters, flops_per_token
from moetrain.plan.layout import Layout
from moetrain.plan.memory.device import memory_of
from moetrain.plan.time import Conditions, step_time
from moetrain.sweep.settings import Axis, Choice, SweepConfig

Make = Callable[[Sequence[str]], RunConfig]
"""Overrides -> the settings of a run, neither resolved nor checked (it may raise ConfigError)."""

_LARGEST = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place of the grid: a run for each seed."""

    name: str
    labels: dict[str, str]
    """Axis -> the label of its choice."""
    overrides: tuple[str, ...]
    """Of train, without seed, name and place."""
    flops: float
    """Of the whole run, as ``plan.flops`` counts them."""
    tokens: int
    parameters: int
    active: int
    memory_bytes: float
    """Of one device, by the plan."""
    adjusted: tuple[str, ...] = ()
    """Those of the overrides that no axis and no setting of the sweep has given."""
    off: float = 0.0
    """How far what is kept is off, as a share."""


@dataclass(frozen=True)
class _Quantity:
    """What is kept, as a function of a run."""

    keep: str
    cluster: Cluster | None
    efficiency: float

    def __call__(self, run: RunConfig) -> float:
        if self.keep == "active_flops":
            return run_flops(run)
        if self.keep == "total_parameters":
            return float(count_parameters(run.model).total)
        if self.keep == "memory":
            return memory_bytes(run, device=self.cluster.device if self.cluster else "cpu")
        assert self.keep == "time"
        assert self.cluster is not None
        length = run.sequence_length
        conditions = Conditions(efficiency=self.efficiency)
        seconds = step_time(run.model, layout_of(run), self.cluster, sequence_length=length, conditions=conditions)
        return seconds.total * run_steps(run)


def make_grid(
    config: SweepConfig,
    axes: Sequence[Axis],
    *,
    make: Make,
    default_processes: int,
    cluster: Cluster | None = None,
    efficiency: float = 1.0,
) -> list[Point]:
    """Every combination of the axes' choices, the first axis slowest.

    Args:
        default_processes: as ``config.checks.resolve``.
        cluster: where time, and memory, are worked out.
        efficiency: share of the peak that matrix products reach on it.

    Raises:
        ConfigError: every point that is impossible, with its reason.
    """
    quantity = _Quantity(config.keep, cluster, efficiency)
    references: dict[tuple[str, ...], float] = {}
    points, problems = [], []
    for chosen in itertools.product(*(axis.choices for axis in axes)):
        labels = {axis.name: choice.label for axis, choice in zip(axes, chosen, strict=True)}
        try:
            run, overrides = _run_of(config, chosen, make=make, default_processes=default_processes)
            given = len(config.settings) + sum(len(choice.overrides) for choice in chosen)
            off = 0.0
            if config.keep != "none":
                within = [each for axis, each in zip(axes, chosen, strict=True) if axis.name in config.within]
                key = tuple(override for each in within for override in each.overrides)
                if key not in references:
                    base, _ = _run_of(config, within, make=make, default_processes=default_processes)
                    references[key] = quantity(base)
                value = solve(run, config.free, target=references[key], quantity=quantity)
                run, overrides = _with(run, config.free, value), [*overrides, f"{config.free}={value}"]
                off = quantity(run) / references[key] - 1
                if abs(off) > config.tolerance:
                    raise ConfigError(
                        [
                            f"{config.keep} would be {off:+.1%} off with {config.free}={value}, the nearest there is, "
                            f"but may be off by {config.tolerance:.1%}: choose another free=… setting, or tolerance="
                            f"{math.ceil(abs(off) * 100) / 100:.2f}"
                        ]
                    )
            check(run, flatten(to_dict(run)))
        except ConfigError as error:
            problems += [f"{_told(labels)}: {problem}" for problem in error.problems]
            continue
        points.append(_point(run, labels, overrides, adjusted=tuple(overrides[given:]), off=off))
    if problems:
        raise ConfigError(_once(problems))
    return points


def solve(run: RunConfig, free: str, *, target: float, quantity: Callable[[RunConfig], float]) -> int:
    """The whole number for setting ``free`` at which ``quantity`` comes nearest to ``target``.

    Raises:
        ConfigError: the setting is no whole number of this run, or does not change the quantity.
    """
    step = _step_of(run, free)

    def at(times: int) -> float:
        return quantity(_with(run, free, times * step))

    if not at(2) > at(1):
        raise ConfigError([f"free is {free}, but it does not change what is kept: name another setting"])
    high = 1
    while at(high) < target:
        high *= 2
        if high * step > _LARGEST:
            raise ConfigError([f"free is {free}, but no value of it reaches {target:.3g}: name another setting"])
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < target else (low, middle)
    candidates = [times for times in (low, high) if times >= 1]
    return step * min(candidates, key=lambda times: abs(math.log(at(times) / target)))


def run_flops(run: RunConfig) -> float:
    """FLOPs of the whole run."""
    return float(flops_per_token(run.model, sequence_length=run.sequence_length) * run_tokens(run))


def run_tokens(run: RunConfig) -> int:
    """Tokens of the whole run."""
    return run_steps(run) * run.batch.global_batch * run.sequence_length


def memory_bytes(run: RunConfig, *, device: str) -> float:
    """Bytes on one device, by the plan."""
    memory = memory_of(
        run.model,
        layout_of(run),
        sequence_length=run.sequence_length,
        mask_documents=run.data.mask_documents,
        device=device,
    )
    return memory.total


def layout_of(run: RunConfig) -> Layout:
    """How a resolved run lies over its devices."""
    gpus = (run.launch.processes or 1) * int(getattr(run.launch, "nodes", None) or 1)
    micro_batch = run.batch.micro_batch or 1
    return Layout(
        gpus=gpus,
        expert_parallel=run.parallel.expert_parallel or 1,
        zero_stage=run.parallel.zero_stage,
        recompute=run.parallel.recompute,
        offload_optimizer=run.parallel.offload_optimizer,
        micro_batch=micro_batch,
        accumulation=max(1, run.batch.global_batch // (micro_batch * gpus)),
    )


def _run_of(
    config: SweepConfig, chosen: Sequence[Choice], *, make: Make, default_processes: int
) -> tuple[RunConfig, list[str]]:
    """A run of the grid, before anything is adjusted, and its overrides."""
    overrides = [*config.settings, *(override for choice in chosen for override in choice.overrides)]
    run = make(overrides)
    moe = run.model.moe
    axis_names = {override.partition("=")[0] for choice in chosen for override in choice.overrides}
    # one expert, or two where a token asks for four: all of them answer. A top_k on an axis is meant as it stands.
    if moe is not None and 1 <= moe.num_experts < moe.top_k and "model.moe.top_k" not in axis_names:
        run = replace(run, model=replace(run.model, moe=replace(moe, top_k=moe.num_experts)))
        overrides.append(f"model.moe.top_k={moe.num_experts}")
    return resolve(run, default_processes=default_processes), overrides


def _with(run: RunConfig, name: str, value: int) -> RunConfig:
    settings = to_dict(run)
    *sections, last = name.split(".")
    inner: Any = settings
    for section in sections:
        inner = inner[section]
        if inner is None:
            raise ConfigError([f"free is {name}, but {section} is null in this point: name another setting"])
    inner[last] = value
    return freeze(settings)


def _step_of(run: RunConfig, free: str) -> int:
    """Between two values that ``config.checks`` may take."""
    moe = run.model.moe
    width = 8 if run.model.dtype == "bf16" else 4
    if free in ("model.moe.d_expert", "model.d_ff") and moe is not None:
        return width
    if free == "model.d_model":
        return math.lcm(2 * run.model.num_heads, width)
    if free == "model.num_layers" and moe is not None:
        return moe.every
    return 1


def _point(
    run: RunConfig, labels: dict[str, str], overrides: Sequence[str], *, adjusted: tuple[str, ...], off: float
) -> Point:
    count = count_parameters(run.model)
    name = "_".join(f"{axis.rsplit('.', 1)[-1]}-{label}" for axis, label in labels.items())
    return Point(
        name=re.sub(r"[^\w.@+-]", "-", name),
        labels=labels,
        overrides=tuple(overrides),
        adjusted=adjusted,
        flops=run_flops(run),
        tokens=run_tokens(run),
        parameters=count.total,
        active=count.active,
        memory_bytes=memory_bytes(run, device="cpu"),
        off=off,
    )


def run_steps(run: RunConfig) -> int:
    """Optimizer steps of the whole run."""
    return steps_in_run(run.schedule, tokens_per_step=run.batch.global_batch * run.sequence_length)


def _told(labels: dict[str, str]) -> str:
    return ", ".join(f"{axis}={label}" for axis, label in labels.items())


def _once(problems: Sequence[str]) -> list[str]:
    """What every point says is said once."""
    reasons: dict[str, list[str]] = {}
    for problem in problems:
        where, _, reason = problem.partition(": ")
        reasons.setdefault(reason, []).append(where)
    return [
        f"{where[0]}{f' and {len(where) - 1} more points' if len(where) > 1 else ''}: {reason}"
        for reason, where in reasons.items()
    ]
