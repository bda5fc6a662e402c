"""`moetrain sweep predict`: what the runs of a sweep say of a larger one, or why they say nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli.options import number
from moetrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moetrain.sweep.answer import Measured
    from moetrain.sweep.laws import Law

_INPUTS = ("compute", "parameters", "tokens", "experts")


def predict(words: Sequence[str]) -> int:
    """`sweep predict [DIR] compute=C …`; exit code 1 where no law tells anything."""
    directory, asked = _asked(words)
    from moetrain.sweep.answer import measured
    from moetrain.sweep.state import Sweep

    runs = measured(Sweep.read(directory))
    if not runs:
        raise DataError(f"{directory} has no finished run yet: see moetrain sweep status {directory}")
    told = False
    for law, at, some, title in _questions(asked, runs):
        told |= _tell(law, at, some, title=title)
    return 0 if told else 1


def _asked(words: Sequence[str]) -> tuple[Path, dict[str, float]]:
    places = [word for word in words if "=" not in word]
    given = {key: number(value) for key, _, value in (word.partition("=") for word in words if "=" in word)}
    problems = [f"'{key}' is not known here: use {', '.join(_INPUTS)}" for key in given if key not in _INPUTS]
    problems += [
        f"{key} is {value!r}, but must be a number above 0, such as 1e21"
        for key, value in given.items()
        if key in _INPUTS and (isinstance(value, str) or not 0 < value < math.inf)
    ]
    asked = {key: float(value) for key, value in given.items() if not isinstance(value, str)}
    if not problems and "compute" not in asked and "parameters" not in asked:
        problems.append("nothing is asked for: give compute=FLOPS, or parameters=N with experts=E or tokens=D")
    if not problems and "parameters" in asked and not {"experts", "tokens"} & set(asked):
        problems.append("parameters is given alone: give experts=E for the routed law, or tokens=D for Chinchilla's")
    if problems:
        raise ConfigError(problems)
    from moetrain.sweep.state import find_sweep

    return find_sweep(places), asked


def _questions(
    asked: dict[str, float], runs: Sequence[Measured]
) -> list[tuple[Law, dict[str, float], list[Measured], str]]:
    """Which law is asked for what, on which runs."""
    from moetrain.sweep.laws import CHINCHILLA, COMPUTE, ROUTED

    counts = sorted({run.experts for run in runs})
    if "experts" in asked and asked["experts"] not in counts and "compute" in asked:
        shown = ", ".join(f"{count:g}" for count in counts)
        raise ConfigError(
            [f"experts is {asked['experts']:g}, but L(C) is fitted for each count by itself: use {shown}"]
        )
    chosen = [count for count in counts if asked.get("experts", count) == count]
    questions = []
    for law, wanted in ((COMPUTE, {"compute"}), (CHINCHILLA, {"parameters", "tokens"})):
        if wanted <= set(asked):
            at = {name: asked[name] for name in law.inputs}
            for count in chosen:
                some = [run for run in runs if run.experts == count]
                questions.append((law, at, some, f"{count:g} experts"))
    if {"parameters", "experts"} <= set(asked):
        questions.append((ROUTED, {name: asked[name] for name in ROUTED.inputs}, list(runs), "all runs"))
    return questions


def _tell(law: Law, at: dict[str, float], runs: Sequence[Measured], *, title: str) -> bool:
    from moetrain.sweep.answer import fit_runs
    from moetrain.sweep.predict import Prediction
    from moetrain.sweep.predict import predict as ask

    where = ", ".join(f"{name} {value:.4g}" for name, value in at.items())
    try:
        fitted = fit_runs(law, runs)
    except DataError as error:
        print(f"{title}: no prediction: {error}")
        return False
    said = ask(fitted, at)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in fitted.coefficients.items())
    print(f"{title}: {law.formula} on {fitted.num_points} runs: {numbers}")
    if isinstance(said, Prediction):
        sure = f"{said.low:.4f} to {said.high:.4f} with {said.level:.0%}"
        print(f"  at {where}: loss {said.loss:.4f} ({sure}), {said.beyond:.3g} times beyond the runs")
        return True
    print(f"  at {where}: no prediction")
    for reason in said.reasons:
        print(f"    - {reason}")
    return False
