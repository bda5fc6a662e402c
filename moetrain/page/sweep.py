"""A sweep as sections of a page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from moetrain.page.charts import Chart, Section, Series, Table
from moetrain.plan.flops import format_count
from moetrain.sweep.answer import (
    HeldOut,
    Mean,
    Measured,
    fits,
    groups,
    hold_out_largest,
    margin,
    means,
    measured,
    pareto,
    recommend,
    seed_noise,
    varied_axis,
)
from moetrain.sweep.laws import ROUTED, Fit
from moetrain.sweep.predict import Prediction
from moetrain.sweep.state import Sweep


def sweep_sections(sweep: Sweep) -> list[Section]:
    """Everything that the page of a sweep shows."""
    runs = measured(sweep)
    found = means(runs)
    if not found:
        return [Section(title="Nothing yet", text="No run of the sweep is finished."), _runs(sweep)]
    fitted = fits(runs)
    answer = recommend(sweep, runs)
    sections = [
        Section(title="Answer", text=" ".join([answer.sentence if answer else "", _unfinished(sweep)]).strip()),
        Section(
            title="Loss",
            text=_noise_text(found),
            parts=[_against_axis(sweep, found, fitted), *_iso_flop(sweep, found)],
        ),
        _laws(fitted),
        _held_out(runs),
        Section(
            title="What it costs",
            parts=[
                _pareto(sweep, found, key="pareto_time", label="seconds of training", cost=lambda run: run.seconds),
                _pareto(
                    sweep,
                    found,
                    key="pareto_memory",
                    label="memory of one device by the plan (MB)",
                    cost=lambda run: run.memory_bytes / 1e6,
                ),
            ],
        ),
        _runs(sweep),
    ]
    return sections


def _unfinished(sweep: Sweep) -> str:
    left = [run for run in sweep.runs if run.status != "done"]
    return f"{len(left)} of {len(sweep.runs)} runs are not finished: this may change." if left else ""


def _noise_text(found: Sequence[Mean]) -> str:
    noise, freedom = seed_noise(found)
    if not freedom:
        return "One seed for each point: there are no error bars."
    return (
        f"Between seeds of one point the loss has a standard deviation of {noise:.4f} ({freedom} degrees of freedom)."
    )


def _against_axis(sweep: Sweep, found: Sequence[Mean], fitted: dict[str, Fit | str]) -> Chart:
    """Loss against the varied axis, a line for each of the other axes' choices; the routed law behind it."""
    axis = varied_axis(sweep)
    labels = list(dict.fromkeys(mean.labels[axis] for mean in found))
    numbers = all(_is_number(label) for label in labels)
    law = fitted.get(ROUTED.name)
    with_law = axis == "model.moe.num_experts" and isinstance(law, Fit)
    series = []
    for colour, (name, group) in enumerate(groups(sweep, found).items()):
        ordered = sorted(group, key=lambda mean: float(mean.labels[axis])) if numbers else group
        series.append(
            Series(
                name=name,
                x=[float(mean.labels[axis]) if numbers else mean.labels[axis] for mean in ordered],
                y=[mean.loss for mean in ordered],
                error=_errors(found, ordered),
                lines=not with_law,
                markers=True,
                text=[f"{len(mean.losses)} seeds" for mean in ordered],
                colour=colour,
            )
        )
        if with_law and isinstance(law, Fit):
            series.append(_law_line(law, ordered, name=f"{name}, routed law", colour=colour))
    bars = " Bars: 90% intervals of the mean of a point's seeds, of the spread between seeds over all points."
    return Chart(
        key="loss_against_" + axis.rsplit(".", 1)[-1],
        title=f"loss against {axis.rsplit('.', 1)[-1]}",
        x_label=axis,
        y_label="held-out loss (nats per token)",
        series=series,
        log_x=numbers and min(map(float, labels)) > 0,
        ticks=sorted(map(float, labels)) if numbers else None,
        categories=None if numbers else labels,
        note=("Lines: the routed law with its 90% interval." if with_law else "") + bars,
    )


def _law_line(law: Fit, ordered: Sequence[Mean], *, name: str, colour: int) -> Series:
    low, high = ordered[0].first.experts, ordered[-1].first.experts
    experts = np.geomspace(low, high, 40)
    size = statistics.fmean(mean.first.parameters for mean in ordered)
    inputs = {"parameters": np.full_like(experts, size), "experts": experts}
    edges = law.interval(inputs, of_a_run=False)
    return Series(
        name=name,
        x=experts.tolist(),
        y=law.loss(inputs).tolist(),
        band=(edges[0].tolist(), edges[1].tolist()),
        dashed=True,
        colour=colour,
    )


def _iso_flop(sweep: Sweep, found: Sequence[Mean]) -> list[Chart]:
    """Loss over compute, a line for each choice of the varied axis: where the lines lie apart, the axis matters."""
    axis = varied_axis(sweep)
    by_label: dict[str, list[Mean]] = {}
    for mean in found:
        by_label.setdefault(mean.labels[axis], []).append(mean)
    if max(len({round(math.log(mean.first.compute), 1) for mean in group}) for group in by_label.values()) < 2:
        return []
    series = []
    for label, group in by_label.items():
        ordered = sorted(group, key=lambda mean: mean.first.compute)
        series.append(
            Series(
                name=f"{axis.rsplit('.', 1)[-1]} {label}",
                x=[mean.first.compute for mean in ordered],
                y=[mean.loss for mean in ordered],
                error=_errors(found, ordered),
                markers=True,
                text=[mean.point for mean in ordered],
            )
        )
    return [
        Chart(
            key="loss_against_compute",
            title="loss against compute",
            x_label="FLOPs of the run",
            y_label="held-out loss (nats per token)",
            series=series,
            log_x=True,
            note="Points above one another have the same active FLOPs.",
        )
    ]


def _laws(fitted: dict[str, Fit | str]) -> Section:
    rows, refused = [], []
    for name, law in fitted.items():
        if isinstance(law, str):
            refused.append((name, law))
            continue
        numbers = [
            f"{key} = {value:.4g} ({low:.3g} to {high:.3g})"
            for (key, value), (low, high) in zip(law.coefficients.items(), law.intervals.values(), strict=True)
        ]
        rows.append((name, law.law.formula, "; ".join(numbers), f"{law.noise:.2%}", str(law.num_points)))
    parts = [Table(head=("law", "form", "coefficients, 90% intervals", "noise", "runs"), rows=rows)] if rows else []
    if refused:
        parts.append(Table(head=("law", "why not"), rows=refused, title="laws that these runs do not tell", wide=True))
    text = "E_start and E_max are where the gain of more experts begins and ends (Clark et al. 2022, arXiv:2202.01169)."
    return Section(title="Scaling laws", text=text if rows else "", parts=parts)


def _held_out(runs: Sequence[Measured]) -> Section:
    """Does the law carry? The smaller sizes predict the largest."""
    title = "The smaller sizes predict the largest"
    held = hold_out_largest(runs)
    if isinstance(held, str):
        return Section(title=title, text=held)
    total, hits = sum(len(each.mean.losses) for each in held), sum(each.hits for each in held)
    level = next((each.predicted.level for each in held if isinstance(each.predicted, Prediction)), 0.9)
    factor = max((each.predicted.beyond for each in held if isinstance(each.predicted, Prediction)), default=1.0)
    text = (
        f"The routed law, fitted without the largest size, is asked for it ({factor:.2g} times the active parameters): "
        f"{hits} of its {total} runs lie inside the {level:.0%} intervals."
    )
    rows = [(each.mean.point, *_said(each), ", ".join(f"{loss:.4f}" for loss in each.mean.losses)) for each in held]
    predicted = [each for each in held if isinstance(each.predicted, Prediction)]
    parts: list[Chart | Table] = [Table(head=("point", "predicted", "interval", "measured"), rows=rows)]
    if predicted:
        parts.insert(0, _held_out_chart(predicted))
    return Section(title=title, text=text, parts=parts)


def _said(held: HeldOut) -> tuple[str, str]:
    said = held.predicted
    if isinstance(said, Prediction):
        return f"{said.loss:.4f}", f"{said.low:.4f} to {said.high:.4f}"
    return "no prediction", "; ".join(said.reasons)


def _held_out_chart(held: Sequence[HeldOut]) -> Chart:
    said = [each.predicted for each in held if isinstance(each.predicted, Prediction)]
    experts = [each.mean.first.experts for each in held]
    return Chart(
        key="held_out_size",
        title="the largest size, predicted and measured",
        x_label="experts",
        y_label="held-out loss (nats per token)",
        log_x=True,
        ticks=sorted(set(experts)),
        series=[
            Series(
                name="predicted by the smaller sizes",
                x=experts,
                y=[each.loss for each in said],
                band=([each.low for each in said], [each.high for each in said]),
                dashed=True,
            ),
            Series(
                name="measured",
                x=[each.mean.first.experts for each in held for _ in each.mean.losses],
                y=[loss for each in held for loss in each.mean.losses],
                lines=False,
                markers=True,
            ),
        ],
        note="Area: the 90% interval of one more run.",
    )


def _pareto(sweep: Sweep, found: Sequence[Mean], *, key: str, label: str, cost: Callable[[Measured], float]) -> Chart:
    front = pareto(found, cost)
    axis = varied_axis(sweep)
    everything = [
        Series(
            name=name,
            x=[cost(mean.first) for mean in group],
            y=[mean.loss for mean in group],
            lines=False,
            markers=True,
            text=[f"{axis.rsplit('.', 1)[-1]} {mean.labels[axis]}" for mean in group],
        )
        for name, group in groups(sweep, found).items()
    ]
    best = Series(
        name="none is cheaper and better",
        x=[cost(mean.first) for mean in front],
        y=[mean.loss for mean in front],
        dashed=True,
        colour=7,
        text=[mean.point for mean in front],
    )
    return Chart(
        key=key,
        title=f"loss against {label.partition(' by ')[0].partition(' (')[0]}",
        x_label=label,
        y_label="held-out loss (nats per token)",
        series=[*everything, best],
    )


def _errors(found: Sequence[Mean], some: Sequence[Mean]) -> list[float] | None:
    halves = [margin(found, len(mean.losses)) for mean in some]
    return None if any(math.isnan(half) for half in halves) else halves


def _runs(sweep: Sweep) -> Section:
    results = sweep.results()
    rows = []
    for run in sweep.runs:
        result, point = results.get(run.name), sweep.points[run.point]
        told = ("", "", "") if result is None else (
            f"{result.loss:.4f}", f"{result.bits_per_byte:.4f}", f"{result.seconds:,.0f}")  # fmt: skip
        rows.append((run.name, run.status, *told, format_count(point.parameters), format_count(point.active),
                     f"{point.flops:.3g}", run.note))  # fmt: skip
    head = ("run", "status", "loss", "bits per byte", "seconds", "parameters", "active", "FLOPs", "")
    return Section(title="Runs", parts=[Table(head=head, rows=rows, title=f"{len(rows)} runs", wide=True)])


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
