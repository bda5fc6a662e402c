"""What a sweep has found: its runs as measurements, the laws fitted on them, the recommendation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t

from moetrain.config.freeze import read_run
from moetrain.errors import DataError
from moetrain.sweep.laws import CHINCHILLA, COMPUTE, ROUTED, Array, Fit, Law, fit
from moetrain.sweep.predict import Prediction, Refusal, predict
from moetrain.sweep.state import Sweep


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One finished run."""

    run: str
    point: str
    labels: dict[str, str]
    seed: int
    loss: float
    compute: float
    """FLOPs of the run."""
    parameters: float
    """Active ones, embeddings included: those of the dense model of this size."""
    total_parameters: float
    tokens: float
    experts: float
    """1 for a dense model."""
    seconds: float
    memory_bytes: float
    """Of one device, by the plan."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The runs of one point, one for each seed."""

    point: str
    labels: dict[str, str]
    losses: tuple[float, ...]
    first: Measured

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A point that the fit has not seen, against what the fit said of it."""

    mean: Mean
    predicted: Prediction | Refusal

    @property
    def hits(self) -> int:
        """Of its runs, those inside the interval."""
        said = self.predicted
        return sum(said.low <= loss <= said.high for loss in self.mean.losses) if isinstance(said, Prediction) else 0


@dataclass(frozen=True)
class Recommendation:
    """The answer in a sentence, and what stands behind it."""

    sentence: str
    point: str
    """The point it names."""


def measured(sweep: Sweep) -> list[Measured]:
    """Every finished run."""
    found = []
    results = sweep.results()
    for run in sweep.runs:
        if run.name not in results:
            continue
        point, result = sweep.points[run.point], results[run.name]
        moe = read_run(sweep.run_dir(run)).model.moe
        found.append(
            Measured(
                run=run.name,
                point=run.point,
                labels=point.labels,
                seed=run.seed,
                loss=result.loss,
                compute=point.flops,
                parameters=float(point.active),
                total_parameters=float(point.parameters),
                tokens=float(point.tokens),
                experts=float(moe.num_experts) if moe else 1.0,
                seconds=result.seconds,
                memory_bytes=point.memory_bytes,
            )
        )
    return found


def means(runs: Iterable[Measured]) -> list[Mean]:
    """The runs of each point together, in the order of the grid."""
    by_point: dict[str, list[Measured]] = {}
    for run in runs:
        by_point.setdefault(run.point, []).append(run)
    return [
        Mean(point=point, labels=each[0].labels, losses=tuple(run.loss for run in each), first=each[0])
        for point, each in by_point.items()
    ]


def seed_noise(found: Sequence[Mean]) -> tuple[float, int]:
    """Standard deviation of the loss between seeds of a point, over all points, and its degrees of freedom."""
    several = [mean.losses for mean in found if len(mean.losses) > 1]
    freedom = sum(len(losses) - 1 for losses in several)
    if not freedom:
        return math.nan, 0
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in several)
    return math.sqrt(squares / freedom), freedom


def margin(found: Sequence[Mean], first: int, second: int | None = None, *, level: float = 0.9) -> float:
    """Half of the interval of a mean of ``first`` runs, or of its difference to one of ``second``; NaN: one seed."""
    noise, freedom = seed_noise(found)
    if not freedom:
        return math.nan
    return float(t.ppf((1 + level) / 2, freedom)) * noise * math.sqrt(1 / first + (1 / second if second else 0))


def varied_axis(sweep: Sweep) -> str:
    """The axis that is compared: of those along which something is kept, the one with the most values."""
    counts: dict[str, set[str]] = {}
    for point in sweep.points.values():
        for axis, label in point.labels.items():
            if axis not in sweep.config.within:
                counts.setdefault(axis, set()).add(label)
    return max(counts, key=lambda axis: len(counts[axis])) if counts else next(iter(sweep.config.within))


def groups(sweep: Sweep, found: Sequence[Mean]) -> dict[str, list[Mean]]:
    """Points that differ in the varied axis alone, by the labels of the others."""
    axis = varied_axis(sweep)
    by_rest: dict[str, list[Mean]] = {}
    for mean in found:
        rest = ", ".join(f"{name.rsplit('.', 1)[-1]} {label}" for name, label in mean.labels.items() if name != axis)
        by_rest.setdefault(rest or "all", []).append(mean)
    return by_rest


def fit_runs(law: Law, runs: Sequence[Measured]) -> Fit:
    """A law on measured runs.

    Raises:
        DataError: they are too few, or too much alike.
    """
    inputs = {name: _column(runs, name) for name in law.inputs}
    return fit(law, inputs, [run.loss for run in runs])


def fits(runs: Sequence[Measured]) -> dict[str, Fit | str]:
    """Every law on all runs, or why it cannot be fitted; L(C) and L(N, D) know nothing of experts: one per count."""
    found: dict[str, Fit | str] = {}
    found[ROUTED.name] = _fit_or_why(ROUTED, runs)
    for experts in sorted({run.experts for run in runs}):
        some = [run for run in runs if run.experts == experts]
        for law in (COMPUTE, CHINCHILLA):
            found[f"{law.name}, {experts:g} expert{'' if experts == 1 else 's'}"] = _fit_or_why(law, some)
    return found


def _fit_or_why(law: Law, runs: Sequence[Measured]) -> Fit | str:
    try:
        return fit_runs(law, runs)
    except DataError as error:
        return str(error)


def hold_out_largest(runs: Sequence[Measured]) -> list[HeldOut] | str:
    """Fit the routed law on all but the largest size, and hold its predictions against that size's runs.

    Returns:
        A point of the largest size each; or why the smaller sizes do not do.
    """
    if not runs:
        return "no run is finished"
    largest = max(run.parameters for run in runs)
    # a router's few weights make no other size
    small = [run for run in runs if run.parameters < 0.95 * largest]
    try:
        fitted = fit_runs(ROUTED, small)
    except DataError as error:
        return str(error)
    return [
        HeldOut(
            mean=mean,
            # a step in size is what is asked here: whether the law carries so far is what is seen
            predicted=predict(
                fitted, {"parameters": mean.first.parameters, "experts": mean.first.experts}, reach=math.inf
            ),
        )
        for mean in means(run for run in runs if run.parameters >= 0.95 * largest)
    ]


def recommend(sweep: Sweep, runs: Sequence[Measured]) -> Recommendation | None:
    """The cheapest choice on the varied axis, at the largest compute, that cannot be told from the best one."""
    found = means(runs)
    by_group = groups(sweep, found)
    if not by_group:
        return None
    name, group = max(by_group.items(), key=lambda item: max(mean.first.compute for mean in item[1]))
    by_loss = sorted(group, key=lambda mean: mean.loss)
    best, worst = by_loss[0], by_loss[-1]
    kept = sweep.config.keep.replace("_", " ").replace("flops", "FLOPs")
    at = "" if kept == "none" else f"At equal {kept}, "
    where = "" if name == "all" else f" ({name})"
    if not seed_noise(found)[1]:
        told = f"the lowest loss has {_named(sweep, best)}, {best.loss:.3f}{where}"
        return Recommendation(f"{at}{told}; with one seed each, nobody knows how sure this is.", best.point)
    alike = [m for m in by_loss if m.loss - best.loss <= margin(found, len(m.losses), len(best.losses))]
    chosen = min(alike, key=lambda mean: (mean.first.total_parameters, mean.loss))
    told = f"loss {chosen.loss:.3f} ± {margin(found, len(chosen.losses)):.3f}"
    if worst not in alike:
        span = margin(found, len(chosen.losses), len(worst.losses))
        told += f", {worst.loss - chosen.loss:.3f} ± {span:.3f} below {_named(sweep, worst)}"
    others = [mean.labels[varied_axis(sweep)] for mean in alike if mean is not chosen]
    rest = f"; {', '.join(others)} cannot be told from it" if others else ""
    sure = "90% intervals, from the spread between seeds"
    return Recommendation(f"{at}take {_named(sweep, chosen)}{where}: {told}{rest} ({sure}).", chosen.point)


def _named(sweep: Sweep, mean: Mean) -> str:
    axis = varied_axis(sweep)
    return f"{axis.rsplit('.', 1)[-1]}={mean.labels[axis]}"


def pareto(found: Sequence[Mean], cost: Callable[[Measured], float]) -> list[Mean]:
    """Points with none that is both cheaper and better, cheapest first."""
    front: list[Mean] = []
    for mean in sorted(found, key=lambda each: (cost(each.first), each.loss)):
        if not front or mean.loss < front[-1].loss:
            front.append(mean)
    return front


def _column(runs: Sequence[Measured], name: str) -> Array:
    return np.array([getattr(run, name) for run in runs], dtype=np.float64)
