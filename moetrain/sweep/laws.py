"""Scaling laws: their forms, a robust fit, and how sure it is.

    compute     L(C) = a C^b + c                    (GPT-4 technical report, arXiv:2303.08774, section 3.1)
    chinchilla  L(N, D) = A N^-alpha + B D^-beta + E   (Hoffmann et al. 2022, arXiv:2203.15556, equation 2)
    routed      log10 L(N, E) = a log10 N + b log10 Ê + c log10 N log10 Ê + d
                1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max  (Clark et al. 2022, arXiv:2202.01169, equation 1)

Losses are fitted in logs, by Huber's loss (Hoffmann et al., D.2), from several starts. Intervals: bootstrap of the
residuals, each divided by 1 - its leverage, as the fit has come nearer to a point than to one more of its kind (HC3 of
MacKinnon & White 1985), and enlarged by the quantile of Student's t over the normal one's, as the points are few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import norm, t

from moetrain.errors import DataError

Array = NDArray[np.float64]
Inputs = Mapping[str, Array]

_HUBER = 1.345
"""Of the noise, where Huber's loss turns from squares to absolute values: 95 percent efficient for normal noise (Huber
1964)."""
_LEAST_NOISE = 1e-5
_ALIKE = 0.04
_EVALUATIONS = 100
"""Of the law in one fit: one that has not settled by then hangs on coefficients that the points do not tell, and where
it wanders shows in their intervals."""


@dataclass(frozen=True)
class Law:
    """A form that a loss may follow."""

    name: str
    formula: str
    inputs: tuple[str, ...]
    """What the loss depends on: compute (FLOPs), parameters, tokens or experts."""
    coefficients: tuple[str, ...]
    distinct: tuple[int, ...]
    """Different values that each input must have at least."""
    exponents: tuple[str, ...]
    """For each input, the coefficient that says whether the loss depends on it at all."""
    log_loss: Callable[[Array, Inputs], Array]
    """Coefficients as the fit has them, inputs -> natural log of the loss."""
    starts: Callable[[Inputs, Array], list[list[float]]]
    bounds: tuple[list[float], list[float]]
    natural: Callable[[Array], Array]
    """Coefficients as the fit has them -> as the formula has them."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law with numbers."""

    law: Law
    theta: Array
    """As the fit has them."""
    samples: Array
    """[resamples][coefficients]: the same of each resample."""
    residuals: Array
    """Of the log loss, enlarged."""
    level: float
    num_points: int
    ranges: dict[str, tuple[float, float]]
    """Input -> smallest and largest value among the points."""

    @property
    def coefficients(self) -> dict[str, float]:
        """As in the formula."""
        return dict(zip(self.law.coefficients, self.law.natural(self.theta).tolist(), strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Coefficient -> its interval."""
        natural = np.array([self.law.natural(sample) for sample in self.samples])
        low, high = _middle(natural, self.level)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(self.law.coefficients)}

    @property
    def noise(self) -> float:
        """Spread of the points about the law, as a share of the loss."""
        return float(np.std(self.residuals))

    def loss(self, inputs: Inputs) -> Array:
        """Loss in nats per token."""
        return np.exp(self.law.log_loss(self.theta, inputs))

    def interval(self, inputs: Inputs, *, of_a_run: bool = True) -> tuple[Array, Array]:
        """Where the loss lies with probability ``level``.

        Args:
            of_a_run: one more run, with its noise; False: the law's mean.
        """
        drawn = np.array([self.law.log_loss(sample, inputs) for sample in self.samples])
        if of_a_run:
            generator = np.random.default_rng(0)
            drawn = drawn + generator.choice(self.residuals, size=drawn.shape)
        low, high = _middle(drawn, self.level)
        return np.exp(low), np.exp(high)


def fit(
    law: Law, inputs: Inputs, loss: Sequence[float] | Array, *, level: float = 0.9, resamples: int = 200, seed: int = 0
) -> Fit:
    """Fit a law to measured losses.

    Args:
        inputs: what the law depends on, a value for each point.
        loss: nats per token, one for each point.
        level: probability of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: the points are too few, or too much alike, for the law.
    """
    given = {name: np.asarray(inputs[name], dtype=np.float64) for name in law.inputs}
    log_loss = np.log(np.asarray(loss, dtype=np.float64))
    _refuse_too_few(law, given, len(log_loss))
    theta, jacobian = _best(law, given, log_loss)
    left = log_loss - law.log_loss(theta, given)
    freedom = len(log_loss) - len(law.coefficients)
    tail = (1 + level) / 2
    leverage = np.einsum("ij,ji->i", jacobian, np.linalg.pinv(jacobian))
    residuals = left / np.maximum(1 - leverage, 0.1)
    residuals = (residuals - np.mean(residuals)) * float(t.ppf(tail, freedom) / norm.ppf(tail))
    generator = np.random.default_rng(seed)
    fitted, scale = log_loss - left, _scale(left)
    samples = np.array(
        [
            _solve(law, given, fitted + generator.choice(residuals, size=len(fitted)), start=theta, scale=scale).x
            for _ in range(resamples)
        ]
    )
    return Fit(
        law=law,
        theta=theta,
        samples=samples,
        residuals=residuals,
        level=level,
        num_points=len(log_loss),
        ranges={name: (float(values.min()), float(values.max())) for name, values in given.items()},
    )


def _refuse_too_few(law: Law, inputs: Inputs, points: int) -> None:
    lacks = [
        f"{_distinct(inputs[name])} of the {least} different values of {name} that it takes"
        for name, least in zip(law.inputs, law.distinct, strict=True)
        if _distinct(inputs[name]) < least
    ]
    least = len(law.coefficients) + 2
    if points < least:
        lacks.insert(0, f"{points} of the {least} runs that it takes")
    if lacks:
        raise DataError(f"the law {law.formula} cannot be fitted: there are {', '.join(lacks)}")


def _distinct(values: Array) -> int:
    """How many different values; those within a few percent are one, as sizes that differ by a router's weights are."""
    return 1 + int(np.sum(np.diff(np.sort(np.log(values))) > _ALIKE))


def _best(law: Law, inputs: Inputs, log_loss: Array) -> tuple[Array, Array]:
    """From several starts; then once more, with Huber's turn where the noise of the first fit puts it.

    Returns:
        The coefficients, and the derivatives [points][coefficients] there.
    """
    tried = [_solve(law, inputs, log_loss, start=start, scale=0.01) for start in law.starts(inputs, log_loss)]
    first = min(tried, key=lambda found: float(found.cost)).x
    scale = _scale(log_loss - law.log_loss(first, inputs))
    found = _solve(law, inputs, log_loss, start=first, scale=scale)
    return found.x, found.jac


def _solve(law: Law, inputs: Inputs, log_loss: Array, *, start: Sequence[float] | Array, scale: float) -> Any:
    low, high = np.array(law.bounds[0]), np.array(law.bounds[1])
    inside = np.clip(np.asarray(start, dtype=np.float64), low + 1e-9, high - 1e-9)
    return least_squares(
        lambda theta: law.log_loss(theta, inputs) - log_loss,
        inside,
        bounds=(low, high),
        loss="huber",
        f_scale=scale,
        x_scale="jac",
        max_nfev=_EVALUATIONS,
    )


def _scale(residuals: Array) -> float:
    spread = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals))))
    return _HUBER * max(spread, _LEAST_NOISE)


def _middle(samples: Array, level: float) -> tuple[Array, Array]:
    """Lower and upper edge of the interval that one more sample lies in with probability ``level``.

    The k-th of n samples has k / (n + 1) of what they were drawn from below it (Weibull's plotting position). NumPy's
    own quantiles take (k - 1) / (n - 1): between those of 40 samples lie 86 percent in place of 90, and 89 of 200.

    Args:
        samples: [n][...].
    """
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return low, high


# The forms. Inputs are scaled by constants of the size of the field's runs, so that coefficients are near 1.

_C0, _N0, _D0 = 1e18, 1e8, 1e9


def _logs_added(one: Array, other: Array | float) -> Array:
    """log(exp(one) + exp(other)), where either may be too small for exp."""
    added: Array = np.logaddexp(one, other)
    return added


def _floors(log_loss: Array) -> list[float]:
    """Logs of the floor to start from: shares of the lowest loss."""
    return [float(np.min(log_loss)) + math.log(share) for share in (0.3, 0.7, 0.95)]


def _compute_log_loss(theta: Array, inputs: Inputs) -> Array:
    return _logs_added(theta[0] - theta[1] * np.log(inputs["compute"] / _C0), theta[2])


def _compute_starts(inputs: Inputs, log_loss: Array) -> list[list[float]]:
    x = np.log(inputs["compute"] / _C0)
    starts = []
    for floor in _floors(log_loss):
        slope, height = np.polyfit(x, np.log(np.maximum(np.exp(log_loss) - math.exp(floor), 1e-6)), 1)
        starts.append([float(height), max(0.01, -float(slope)), floor])
    return starts


COMPUTE = Law(
    name="compute",
    formula="L(C) = a C^b + c",
    inputs=("compute",),
    coefficients=("a", "b", "c"),
    distinct=(4,),
    exponents=("b",),
    log_loss=_compute_log_loss,
    starts=_compute_starts,
    bounds=([-20.0, 1e-3, -6.0], [20.0, 2.0, 4.0]),
    natural=lambda theta: np.array([math.exp(theta[0] + theta[1] * math.log(_C0)), -theta[1], math.exp(theta[2])]),
)


def _chinchilla_log_loss(theta: Array, inputs: Inputs) -> Array:
    by_size = theta[0] - theta[1] * np.log(inputs["parameters"] / _N0)
    by_tokens = theta[2] - theta[3] * np.log(inputs["tokens"] / _D0)
    return _logs_added(_logs_added(by_size, by_tokens), theta[4])


def _chinchilla_starts(inputs: Inputs, log_loss: Array) -> list[list[float]]:
    middle = [float(np.mean(np.log(inputs[name] / scale))) for name, scale in (("parameters", _N0), ("tokens", _D0))]
    starts = []
    for floor, alpha, beta in itertools.product(_floors(log_loss), (0.1, 0.35, 0.7), (0.1, 0.35, 0.7)):
        half = math.log(max(1e-3, math.exp(float(np.mean(log_loss))) - math.exp(floor)) / 2)
        starts.append([half + alpha * middle[0], alpha, half + beta * middle[1], beta, floor])
    return starts


CHINCHILLA = Law(
    name="chinchilla",
    formula="L(N, D) = A N^-alpha + B D^-beta + E",
    inputs=("parameters", "tokens"),
    coefficients=("A", "alpha", "B", "beta", "E"),
    distinct=(3, 3),
    exponents=("alpha", "beta"),
    log_loss=_chinchilla_log_loss,
    starts=_chinchilla_starts,
    bounds=([-20.0, 1e-3, -20.0, 1e-3, -6.0], [20.0, 2.0, 20.0, 2.0, 4.0]),
    natural=lambda theta: np.array(
        [
            math.exp(theta[0] + theta[1] * math.log(_N0)),
            theta[1],
            math.exp(theta[2] + theta[3] * math.log(_D0)),
            theta[3],
            math.exp(theta[4]),
        ]
    ),
)


def effective_experts(experts: Array, *, start: float, largest: float) -> Array:
    """The saturating count Ê: ``start`` for one expert, never above ``largest`` (Clark et al. 2022, section 4.3)."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / largest)) + 1 / largest)


def _routed_log_loss(theta: Array, inputs: Inputs) -> Array:
    start = math.exp(theta[4])
    n = np.log10(inputs["parameters"] / _N0)
    e = np.log10(effective_experts(inputs["experts"], start=start, largest=start * (1 + math.exp(theta[5]))))
    log_loss: Array = math.log(10) * (theta[0] * n + theta[1] * e + theta[2] * n * e + theta[3])
    return log_loss


def _routed_starts(inputs: Inputs, log_loss: Array) -> list[list[float]]:
    n, starts = np.log10(inputs["parameters"] / _N0), []
    for start, largest in itertools.product((1.2, 2.0, 4.0), (16.0, 100.0, 1000.0)):
        e = np.log10(effective_experts(inputs["experts"], start=start, largest=largest))
        linear = np.linalg.lstsq(np.stack([n, e, n * e, np.ones_like(n)], axis=1), log_loss / math.log(10), rcond=None)
        starts.append([*linear[0].tolist(), math.log(start), math.log(largest / start - 1)])
    return starts


def _routed_natural(theta: Array) -> Array:
    # back from N / N0 to N
    shift = math.log10(_N0)
    start = math.exp(theta[4])
    a, b = theta[0], theta[1] - theta[2] * shift
    return np.array([a, b, theta[2], theta[3] - theta[0] * shift, start, start * (1 + math.exp(theta[5]))])


ROUTED = Law(
    name="routed",
    formula="log L(N, E) = a log N + b log Ê + c log N log Ê + d",
    inputs=("parameters", "experts"),
    coefficients=("a", "b", "c", "d", "E_start", "E_max"),
    distinct=(2, 4),
    exponents=("a", "b"),
    log_loss=_routed_log_loss,
    starts=_routed_starts,
    bounds=([-1.0, -1.0, -0.5, -1.0, 0.0, -2.0], [1.0, 1.0, 0.5, 2.0, 4.0, 9.0]),
    natural=_routed_natural,
)

LAWS = {law.name: law for law in (COMPUTE, CHINCHILLA, ROUTED)}
