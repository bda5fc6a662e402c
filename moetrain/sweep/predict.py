"""What a fitted law says of a run that nobody has trained, or why it says nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moetrain.sweep.laws import Fit

REACH = 1.0
"""How far beyond the runs, in logs, as a multiple of the range they cover: runs over a factor of 30 predict 30 times
more, no further."""
WIDEST = 0.1
"""Widest interval that still tells something, as a share of the loss: from 16 to 512 experts the loss of Clark et al.'s
smallest model falls by about as much."""
_NEAR = 1.02
_LEAST_FACTOR = 1.5


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Loss of one more run, in nats per token."""

    loss: float
    low: float
    high: float
    level: float
    beyond: float
    """Factor between what was asked for and the farthest run; 1: inside of what was measured."""


@dataclass(frozen=True)
class Refusal:
    """Why the law says nothing."""

    reasons: list[str]


def predict(fit: Fit, at: Mapping[str, float], *, reach: float = REACH, widest: float = WIDEST) -> Prediction | Refusal:
    """The loss of one more run at ``at``, with its interval; or every reason why the fit does not tell it.

    Args:
        at: a value for each input of the law.
        reach: how far beyond the runs, in logs, as a multiple of the range they cover.
        widest: interval that still tells something, as a share of the loss.
    """
    reasons, beyond = [], 1.0
    for name, exponent in zip(fit.law.inputs, fit.law.exponents, strict=True):
        low, high = fit.ranges[name]
        factor = max(at[name] / high, low / at[name], 1.0)
        allowed = max((high / low) ** reach, _NEAR)
        beyond = max(beyond, factor)
        if factor > allowed:
            reasons.append(
                f"{name} {at[name]:.4g} is {factor:.3g} times beyond the runs ({low:.3g} to {high:.3g}), which carry "
                f"no further than {allowed:.3g} times: train points nearer to it"
            )
        if factor > _LEAST_FACTOR and (why := _not_identified(fit, exponent)):
            reasons.append(why)
    inputs = {name: np.array([float(at[name])]) for name in fit.law.inputs}
    loss = float(fit.loss(inputs)[0])
    low_loss, high_loss = (float(each[0]) for each in fit.interval(inputs))
    if (high_loss - low_loss) / loss > widest:
        reasons.append(
            f"the interval {low_loss:.3f} to {high_loss:.3f} is {(high_loss - low_loss) / loss:.0%} of the loss wide, "
            f"more than {widest:.0%}: more seeds, or more points, make it narrower"
        )
    if reasons:
        return Refusal(reasons)
    return Prediction(loss=loss, low=low_loss, high=high_loss, level=fit.level, beyond=beyond)


def _not_identified(fit: Fit, exponent: str) -> str:
    """Why the runs do not tell an exponent; empty where they do."""
    low, high = fit.intervals[exponent]
    told = f"the exponent {exponent} of {fit.law.formula} is not identified: "
    if fit.law.name == "routed":
        # its a and b are slopes, and may have either sign; zero among them means that nothing is known of the direction
        return f"{told}{low:.3g} to {high:.3g} includes 0" if low <= 0 <= high else ""
    small, large = sorted((abs(low), abs(high)))
    on_a_bound = small < 2e-3 or large > 1.99
    if on_a_bound or math.log(large / small) > math.log(4):
        return f"{told}it may be {low:.3g} or {high:.3g}; points over a wider range tell"
    return ""
