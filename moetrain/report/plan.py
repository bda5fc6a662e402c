"""What the verb plan shows, and the experiment it writes."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moetrain.config.schema import ParallelConfig
from moetrain.plan.cluster import GB, Cluster
from moetrain.plan.flops import count_parameters, flops_per_token, format_count
from moetrain.plan.memory.device import PARTS
from moetrain.plan.published import Run, calibrate
from moetrain.plan.search import Answer, Plan, Question, layout_kind
from moetrain.plan.time import TIMES

MEMORY_COLOURS = dict(zip(PARTS, ("blue", "cyan", "green", "bright_green", "yellow", "bright_yellow", "magenta", "red",
                                  "bright_black", "white"), strict=True))  # fmt: skip
TIME_COLOURS = dict(zip(TIMES, ("blue", "cyan", "green", "yellow", "red", "magenta", "bright_magenta", "bright_red",
                                "bright_black"), strict=True))  # fmt: skip
_BAR = 56
_MOST_REFUSALS = 8


def plan_screen(
    question: Question, cluster: Cluster, answer: Answer, *, title: str, show: int, efficiency: float
) -> None:
    """Print what was found."""
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(_heading(question, cluster, title=title, efficiency=efficiency), markup=False)
    plans = answer.plans[:show]
    if plans:
        console.print(_table(plans, cluster))
        _bars(console, "memory on one device", plans, parts=PARTS, of="memory", colours=MEMORY_COLOURS,
              limit=cluster.memory_gb, unit=("GB", GB))  # fmt: skip
        _bars(console, "time of a step", plans, parts=TIMES, of="time", colours=TIME_COLOURS, limit=None,
              unit=("s", 1.0))  # fmt: skip
        console.print(_saving_text(plans[0]), markup=False)
    else:
        console.print("[bold]no layout that train runs fits[/bold]")
    if answer.missing:
        console.print(answer.missing, markup=False)
    if answer.beyond:
        console.print(_beyond_text(answer), markup=False)
    if answer.refusals:
        console.print(f"\n{sum(each.many for each in answer.refusals):,} layouts do not fit:")
        for each in sorted(answer.refusals, key=lambda refusal: -refusal.many)[:_MOST_REFUSALS]:
            console.print(f"  {each.many:>4}  {escape(each.reason)}; the nearest: {escape(each.nearest)}")


def comparison_screen(runs: Sequence[Run], cluster: Cluster, *, name: str, efficiency: float) -> None:
    """Print runs beside the plan, and the efficiency at which the plan would be right."""
    console = Console(highlight=False, width=None if Console().is_terminal else 140)
    console.print(f"planned for {name} at {efficiency:.0%} of its peak in matrix products", markup=False)
    columns = (
        "run",
        "GPUs",
        "EP",
        "ZeRO",
        "load",
        "tokens/s",
        "planned",
        "off",
        "step",
        "planned",
        "memory",
        "planned",
    )
    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for run in runs:
        planned = run.predicted(cluster, efficiency=efficiency)
        seconds = run.time(cluster, efficiency=efficiency).total
        layout = run.layout
        table.add_row(
            escape(run.name), f"{layout.gpus:,}", str(layout.expert_parallel), str(layout.zero_stage),
            f"{run.imbalance:.2f}", f"{run.measured * layout.gpus:,.0f}", f"{planned * layout.gpus:,.0f}",
            f"{planned / run.measured - 1:+.0%}", f"{seconds * planned / run.measured:.3g} s", f"{seconds:.3g} s",
            "-" if run.memory_bytes is None else f"{run.memory_bytes / GB:,.2f} GB",
            f"{run.planned_memory(cluster.device).total / GB:,.2f} GB",
        )  # fmt: skip
    console.print(table)
    right = calibrate(runs, {name: cluster})
    if right >= 1:
        console.print(
            "the runs are faster than the plan at any efficiency: the rates of the cluster's file are too low"
        )
    else:
        console.print(f"right on these runs: cluster.efficiency={right:.3f}")


def _heading(question: Question, cluster: Cluster, *, title: str, efficiency: float) -> str:
    count = count_parameters(question.model)
    flops = flops_per_token(question.model, sequence_length=question.sequence_length)
    parts = ", ".join(
        f"{name.replace('_', ' ')} {format_count(getattr(count, name))}"
        for name in ("experts", "shared_experts", "attention", "dense_ffn", "embedding", "output", "router")
        if getattr(count, name)
    )
    where = f"calibrated on published runs on {cluster.calibrated_on.upper()}" if cluster.calibrated_on else "given"
    return (
        f"{title}\n"
        f"  {format_count(count.total)} parameters, {format_count(count.active)} active per token ({parts})\n"
        f"  {format_count(round(question.tokens))} tokens in sequences of {question.sequence_length:,}, "
        f"{flops:.3g} FLOPs a token (attention included), {flops * question.tokens:.3g} in all\n"
        f"  {cluster.gpu}: {cluster.memory_gb:,.0f} GB, {cluster.peak_flops(question.model.dtype) / 1e12:,.4g} TFLOP/s "
        f"of {question.model.dtype} at best, {efficiency:.0%} of it reached in matrix products ({where})\n"
        f"  head-room for {question.imbalance:g} times the mean load at the fullest device\n"
    )


def _table(plans: Sequence[Plan], cluster: Cluster) -> Table:
    columns = ("", "nodes", "GPUs", "EP", "ZeRO", "recompute", "micro x accum.", "memory", "step", "tokens/s", "MFU",
               "length", "GPU-hours", f"cost, {cluster.currency}", "energy")  # fmt: skip
    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    for number, plan in enumerate(plans, start=1):
        layout = plan.layout
        table.add_row(
            str(number), f"{plan.nodes:,}", f"{layout.gpus:,}", str(layout.expert_parallel), str(layout.zero_stage),
            layout.recompute + (" +offload" if layout.offload_optimizer else ""),
            f"{layout.micro_batch} x {layout.accumulation}", f"{plan.memory.total / GB:,.1f} GB",
            f"{plan.time.total:,.3g} s", f"{plan.tokens_per_second:,.0f}", f"{plan.mfu:.1%}",
            _duration(86400 * plan.days),
            f"{plan.gpu_hours:,.3g}" if plan.gpu_hours < 1000 else f"{plan.gpu_hours:,.0f}",
            "-" if plan.cost is None else f"{plan.cost:,.{0 if plan.cost >= 100 else 2}f}",
            "-" if plan.energy_kwh is None else _energy(plan.energy_kwh),
        )  # fmt: skip
    return table


def _bars(
    console: Console, title: str, plans: Sequence[Plan], *, parts: Sequence[str], of: str, colours: dict[str, str],
    limit: float | None, unit: tuple[str, float],
) -> None:  # fmt: skip
    name, size = unit
    totals = [getattr(plan, of).total / size for plan in plans]
    full = limit or max(totals)
    of_limit = "" if limit is None else f", the bar being {limit:,.0f} {name}"
    console.print(f"\n{title}{of_limit}")
    for number, (plan, total) in enumerate(zip(plans, totals, strict=True), start=1):
        bar, used = Text(f"{number:>2} "), 0
        reached = 0.0
        for part in parts:
            reached += getattr(getattr(plan, of), part) / size
            width = min(_BAR, round(reached / full * _BAR)) - used
            bar.append("█" * width, style=colours[part])
            used += width
        bar.append("·" * (_BAR - used), style="dim")
        console.print(bar.append(f" {total:,.3g} {name}"))
    threshold = 0.005 * full * size
    shown = [part for part in parts if any(getattr(getattr(plan, of), part) > threshold for plan in plans)]
    line = Text("  ")
    for part in shown:
        label = f" {part.replace('_', ' ')} {getattr(getattr(plans[0], of), part) / size:,.3g}"
        if len(line) + len(label) + 2 > console.width:
            console.print(line)
            line = Text("  ")
        line.append(" █", style=colours[part]).append(label)
    console.print(line.append(f"  ({name} of 1)", style="dim"))


def _saving_text(plan: Plan) -> str:
    saving = plan.saving
    return (
        f"\ncheckpoint  {saving.size_bytes / GB:,.3g} GB, written in {_duration(saving.write_seconds)}; a failure "
        f"every {_duration(saving.hours_between_failures * 3600)}; best saved every "
        f"{_duration(saving.interval_seconds)} (Young/Daly): {saving.lost:.1%} of the time is lost, which the days hold"
    )


def _beyond_text(answer: Answer) -> str:
    assert answer.beyond is not None
    plan, layout = answer.beyond, answer.beyond.layout
    verb = "would fit" if not answer.plans else "would be better"
    return (
        f"\nwhat train does not run in this version {verb}: {layout_kind(layout)}, EP {layout.expert_parallel} on "
        f"{layout.gpus:,} GPUs, micro-batch {layout.micro_batch} x {layout.accumulation}: "
        f"{plan.memory.total / GB:,.1f} GB, {plan.time.total:,.3g} s a step, MFU {plan.mfu:.1%}, "
        f"{_duration(86400 * plan.days)}"
    )


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {name}"
    return f"{seconds:,.3g} s"


def _energy(kwh: float) -> str:
    value, unit = (kwh / 1000, "MWh") if kwh >= 1000 else (kwh, "kWh")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:,.3g} {unit}"


def experiment_text(
    plan: Plan,
    *,
    title: str,
    sequence_length: int,
    tokens: float,
    choices: dict[str, str],
    settings: dict[str, Any],
    command: Sequence[str],
) -> str:
    """The best plan as a file of the group ``experiment``, which train takes as it is.

    Args:
        tokens: length of the run.
        choices: config group -> the file chosen in it: model and model/moe.
        settings: dotted name -> value, of what was asked for beside the layout.
        command: the words that asked for it.
    """
    layout = plan.layout
    content: dict[str, Any] = {}
    for name, value in {**settings, **_layout_settings(plan)}.items():
        place = content
        *sections, last = name.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    content["batch"]["sequence_length"] = sequence_length
    content["schedule"] = {**content.get("schedule", {}), "steps": None, "tokens": round(tokens)}
    defaults = [{f"override /{group}": choices[group]} for group in ("model", "model/moe") if group in choices]
    if plan.nodes > 1:
        defaults.append({"override /launch": "slurm"})  # train's own launch=… wins over it
    head = (
        "# @package _global_\n"
        f"# {title}, planned: {layout.gpus:,} devices, {plan.memory.total / GB:,.1f} GB on each, "
        f"{plan.time.total:,.3g} s a step, {_duration(86400 * plan.days)}.\n"
        f"#   moetrain {shlex.join(command)}\n"
        "# The learning rate and the rest of the training are not planned: they are those of configs/run.yaml.\n"
    )
    return head + yaml.safe_dump({"defaults": defaults, **content}, sort_keys=False, allow_unicode=True)


def _layout_settings(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    settings: dict[str, Any] = {
        "batch.global_batch": layout.global_batch,
        "batch.micro_batch": layout.micro_batch,
        "parallel.expert_parallel": layout.expert_parallel,
        "parallel.zero_stage": layout.zero_stage,
    }
    known = {field.name for field in dataclasses.fields(ParallelConfig)}
    for name in ("recompute", "offload_optimizer"):
        if name in known:
            settings[f"parallel.{name}"] = getattr(layout, name)
    return settings | {"launch.nodes": plan.nodes, "launch.processes": layout.gpus // plan.nodes}


def train_command(path: Path) -> str:
    """How to start the experiment in ``path``."""
    return f"moetrain train --config-dir {shlex.quote(str(path.parent.parent))} experiment={shlex.quote(path.stem)}"
