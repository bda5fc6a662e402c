"""A run as sections of a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moetrain.config.freeze import flatten, to_dict
from moetrain.config.schema import RunConfig
from moetrain.page.charts import Chart, HeatMap, Number, Section, Series, Table
from moetrain.page.experts import Experts, experts_section
from moetrain.plan.flops import count_parameters, flops_per_token, format_count
from moetrain.sweep.state import seconds_of

Lines = Sequence[dict[str, Any]]
_MOST_FRAMES = 50
INCIDENTS = "incidents.jsonl"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a page tells of a run besides its metrics."""

    run: RunConfig
    differences: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Setting -> (the preset's value, the run's)."""
    preset: str = ""
    """What the differences are to."""
    checkpoints: Sequence[tuple[str, str, str]] = ()
    """Directory, held-out loss, size."""
    incidents: Sequence[Mapping[str, Any]] = ()
    sample: tuple[str, str] | None = None
    """An opening, and what the model wrote after it."""
    experts: Experts | None = None
    """What they have made their own; None: not counted."""
    planned: tuple[str, float] | None = None
    """A cluster, and tokens per second by the plan for it."""


def run_sections(lines: Lines, facts: Facts) -> list[Section]:
    """Everything that the page of a run shows.

    Args:
        lines: of its metrics.jsonl.
    """
    trained = [line for line in lines if "loss" in line]
    sections = [Section(title="At a glance", parts=[_glance(lines, facts.run)])]
    if trained:
        sections.append(Section(title="Loss", parts=[_loss(lines, facts.run), *_by_source(lines), _steps(trained)]))
    if facts.sample is not None:
        opening, written = facts.sample
        sections.append(Section(title="A sample", text=f"{opening} ⟶ {written}"))
    if any(line.get("load") for line in trained):
        sections.append(Section(title="Experts", text=_dead_text(trained), parts=_experts(trained, facts.run)))
    if facts.run.model.moe is not None:
        sections.append(experts_section(facts.experts))
    if trained:
        sections.append(Section(title="Throughput", parts=[_throughput(trained, facts)]))
    sections.append(_incidents(facts))
    sections.append(
        Section(
            title="Checkpoints",
            text="" if facts.checkpoints else "None.",
            parts=[Table(head=("directory", "held-out loss", "size"), rows=facts.checkpoints)]
            if facts.checkpoints
            else [],
        )
    )
    sections.append(_settings(facts))
    return sections


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of incidents.jsonl; a line that is no JSON object (torn by a crash) is left out."""
    path = run_dir / INCIDENTS
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _glance(lines: Lines, run: RunConfig) -> Table:
    count, moe = count_parameters(run.model), run.model.moe
    final = next((line for line in reversed(lines) if line.get("final")), None)
    last = lines[-1] if lines else {"step": 0, "tokens": 0}
    speeds = sorted(line["tokens_per_second"] for line in lines if line.get("tokens_per_second"))
    rows = [
        ("parameters", f"{format_count(count.total)}, {format_count(count.active)} active per token"),
        ("experts", "dense" if moe is None else f"{moe.num_experts}, top-{moe.top_k}, router {moe.router}"),
        ("layout", f"{run.launch.processes} processes, expert parallel {run.parallel.expert_parallel}, "
                   f"ZeRO-{run.parallel.zero_stage}, {run.model.dtype}"),
        ("trained", f"{last['step']:,} steps, {format_count(last['tokens'])} tokens"
                    + ("" if final else " so far")),
    ]  # fmt: skip
    if final is not None and final.get("held_out_loss") is not None:
        told = f"{final['held_out_loss']:.4f} nats per token, {final['bits_per_byte']:.4f} bits per byte"
        rows.append(("held-out loss", told))
    if speeds:
        rows.append(("speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s in the middle of the run"))
    return Table(head=("", ""), rows=rows)


def _loss(lines: Lines, run: RunConfig) -> Chart:
    seconds = dict(zip(map(id, lines), seconds_of(lines), strict=True))
    per_token = flops_per_token(run.model, sequence_length=run.sequence_length)
    series = []
    for name, key, markers in (("training", "loss", False), ("held out", "held_out_loss", True)):
        some = [line for line in lines if key in line]
        if some:
            series.append(
                Series(
                    name=name,
                    x=[line["step"] for line in some],
                    y=[line[key] for line in some],
                    markers=markers,
                    other_x={
                        "tokens": [line["tokens"] for line in some],
                        "FLOPs": [line["tokens"] * per_token for line in some],
                        "seconds of training": [seconds[id(line)] for line in some],
                    },
                )
            )
    return Chart(key="loss", title="loss", x_label="steps", y_label="loss (nats per token)", series=series)


def _by_source(lines: Lines) -> list[Chart]:
    some = [line for line in lines if line.get("held_out_loss_by_source")]
    names = list(dict.fromkeys(name for line in some for name in line["held_out_loss_by_source"]))
    if not names:
        return []
    series = [
        Series(
            name=name,
            x=[line["step"] for line in some],
            y=[line["held_out_loss_by_source"].get(name) for line in some],
            markers=True,
        )
        for name in names
    ]
    title, label = "held-out loss of each source", "held-out loss (nats per token)"
    return [Chart(key="loss_by_source", title=title, x_label="steps", y_label=label, series=series)]


def _steps(trained: Lines) -> Chart:
    steps = [line["step"] for line in trained]
    return Chart(
        key="gradient_norm",
        title="gradient norm",
        x_label="steps",
        y_label="gradient norm before clipping",
        series=[Series(name="gradient norm", x=steps, y=[line.get("grad_norm") for line in trained])],
        log_y=_spans_tens([line.get("grad_norm") for line in trained]),
        note=f"Learning rate: {trained[0]['lr']:.3g} at first, {max(line['lr'] for line in trained):.3g} at most, "
        f"{trained[-1]['lr']:.3g} at the end.",
    )


def _experts(trained: Lines, run: RunConfig) -> list[Chart | HeatMap]:
    loads = [line for line in trained if line.get("load")]
    every = max(1, math.ceil(len(loads) / _MOST_FRAMES))
    shown = loads[::-1][::every][::-1]  # the last one is among them
    experts = len(loads[-1]["load"][0])
    frames = [
        (f"step {line['step']:,}", [[_times(share, experts) for share in layer] for layer in line["load"]])
        for line in shown
    ]
    parts: list[Chart | HeatMap] = [
        HeatMap(
            key="expert_load",
            title="load of every expert",
            x_label="expert",
            y_label="MoE layer",
            frames=frames,
            low=0.0,
            high=2.0,
            scale_label="share x experts",
            note="1 is a fair share. The slider goes through the run.",
        ),
        _by_layer(loads, "max_over_mean", title="fullest expert", label="max / mean load (1 = fair)"),
    ]
    most = math.log(experts)
    bound = f" At most ln {experts} = {most:.2f}: the router knows nothing; 0: it is sure."
    entropy = _by_layer(loads, "entropy", title="routing entropy", label="entropy (nats)", note=bound.strip())
    drops = _by_layer(loads, "dropped_share", title="dropped copies", label="share of the copies", zero=True)
    parts += [entropy, drops]
    moe = run.model.moe
    dropless = moe is None or moe.capacity_factor is None
    return parts[:-1] if dropless else parts


def _by_layer(loads: Lines, key: str, *, title: str, label: str, note: str = "", zero: bool = False) -> Chart:
    layers = len(loads[-1][key])
    series = [
        Series(name=f"layer {layer}", x=[line["step"] for line in loads], y=[line[key][layer] for line in loads])
        for layer in range(layers)
    ]
    return Chart(key=key, title=title, x_label="steps", y_label=label, series=series, note=note, zero=zero)


def _dead_text(trained: Lines) -> str:
    last = next(line for line in reversed(trained) if line.get("load"))
    dead = {layer: ids for layer, ids in enumerate(last.get("dead_experts") or []) if ids}
    ever = max(sum(map(len, line.get("dead_experts") or [])) for line in trained)
    if not dead:
        at_most = f" (at most {ever} on the way)" if ever else ""
        return f"Dead experts at the end: none{at_most}."
    told = "; ".join(f"layer {layer}: {', '.join(map(str, ids))}" for layer, ids in dead.items())
    return f"Dead experts at the end, which no token has chosen for log.dead_after_steps: {told}."


def _throughput(trained: Lines, facts: Facts) -> Chart:
    steps = [line["step"] for line in trained]
    series = [Series(name="measured", x=steps, y=[line.get("tokens_per_second") for line in trained])]
    note = "For the plan beside it: moetrain report RUN cluster=NAME."
    if facts.planned is not None:
        cluster, speed = facts.planned
        series.append(Series(name=f"plan, {cluster}", x=[steps[0], steps[-1]], y=[speed, speed], dashed=True))
        note = f"The plan for {cluster} says {speed:,.0f} tokens/s; docs/plan.md says what it goes by."
    return Chart(
        key="throughput",
        title="throughput",
        x_label="steps",
        y_label="tokens per second",
        series=series,
        zero=True,
        note=note,
    )


def _incidents(facts: Facts) -> Section:
    if not facts.incidents:
        return Section(title="Incidents", text="None recorded.")
    keys = list(dict.fromkeys(key for entry in facts.incidents for key in entry))
    rows = [[_shown(entry.get(key)) for key in keys] for entry in facts.incidents]
    return Section(title="Incidents", parts=[Table(head=keys, rows=rows)])


def _settings(facts: Facts) -> Section:
    changed = [(name, _shown(old), _shown(new)) for name, (old, new) in facts.differences.items()]
    everything = [(name, _shown(value)) for name, value in flatten(to_dict(facts.run)).items()]
    parts = [Table(head=("setting", "value"), rows=everything, title="every setting", wide=True)]
    if changed:
        parts.insert(0, Table(head=("setting", facts.preset, "this run"), rows=changed))
    text = "" if changed else f"As {facts.preset}." if facts.preset else ""
    return Section(title="Settings", text=text, parts=parts)


def _times(share: Number, experts: int) -> Number:
    return None if share is None else share * experts


def _spans_tens(values: Sequence[Number]) -> bool:
    """Whether a logarithmic axis shows more."""
    known = [value for value in values if value is not None]
    return bool(known) and min(known) > 0 and max(known) > 30 * min(known)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
