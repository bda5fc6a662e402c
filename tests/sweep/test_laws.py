"""Scaling laws: planted ones are found again, published ones too, and a fit that says nothing says so."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.errors import DataError
from moetrain.sweep.laws import CHINCHILLA, COMPUTE, ROUTED, Fit, Law, _middle, effective_experts, fit
from moetrain.sweep.predict import Prediction, Refusal, predict

# Clark et al. 2022, arXiv:2202.01169, table 3
PUBLISHED = {
    "S-Base": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 314.478},
    "RL-R": {"a": -0.083, "b": -0.126, "c": 0.012, "d": 1.111, "E_start": 1.880, "E_max": 469.982},
    "Hash": {"a": -0.087, "b": -0.136, "c": 0.012, "d": 1.157, "E_start": 4.175, "E_max": 477.741},
}
# Hoffmann et al. 2022, arXiv:2203.15556, equation 10
HOFFMANN = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}
OF_COMPUTE = {"a": 80.0, "b": -0.09, "c": 1.7}


def table(router: str) -> tuple[dict[str, Any], list[float]]:
    """The paper's own measurements, of one router and of the dense models, which count as one expert."""
    path = Path(__file__).parent / "clark2022_final.csv"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = [row for row in csv.DictReader(lines) if row["router_type"] in (router, "Dense")]
    inputs = {"parameters": np.array([float(row["dense_parameter_count"]) for row in rows]),
              "experts": np.array([float(row["num_experts"]) for row in rows])}  # fmt: skip
    return inputs, [float(row["loss_validation"]) for row in rows]


def of_compute(inputs: dict[str, Any]) -> Any:
    return OF_COMPUTE["a"] * inputs["compute"] ** OF_COMPUTE["b"] + OF_COMPUTE["c"]


def hoffmann(inputs: dict[str, Any]) -> Any:
    h = HOFFMANN
    return h["A"] / inputs["parameters"] ** h["alpha"] + h["B"] / inputs["tokens"] ** h["beta"] + h["E"]


def clark(inputs: dict[str, Any]) -> Any:
    k = PUBLISHED["S-Base"]
    inverse = 1 / (inputs["experts"] - 1 + 1 / (1 / k["E_start"] - 1 / k["E_max"])) + 1 / k["E_max"]
    n, e = np.log10(inputs["parameters"]), np.log10(1 / inverse)
    return 10 ** (k["a"] * n + k["b"] * e + k["c"] * n * e + k["d"])


def lattice(**axes: Any) -> dict[str, Any]:
    meshes = np.meshgrid(*axes.values())
    return {name: mesh.ravel().astype(float) for name, mesh in zip(axes, meshes, strict=True)}


COMPUTES = {"compute": np.repeat(np.logspace(17, 20, 8), 2)}
PLANTED = [
    (COMPUTE, of_compute, COMPUTES, {"compute": 5e20}, OF_COMPUTE),
    (CHINCHILLA, hoffmann, lattice(parameters=np.logspace(7.5, 9, 4), tokens=np.logspace(9, 10.5, 4)),
     {"parameters": 7e9, "tokens": 1.4e11}, HOFFMANN),
    (ROUTED, clark, lattice(parameters=np.logspace(7, 9, 5), experts=2.0 ** np.arange(10)),
     {"parameters": 5e9, "experts": 64.0}, PUBLISHED["S-Base"]),
]  # fmt: skip
TRIALS = 20


def planted_fit(law: Law = COMPUTE, truth: Any = of_compute, inputs: Any = COMPUTES, *, seed: int = 0,
                noise: float = 0.003, resamples: int = 60) -> Fit:  # fmt: skip
    loss = truth(inputs) * np.exp(np.random.default_rng(seed).normal(0, noise, len(next(iter(inputs.values())))))
    return fit(law, inputs, loss, seed=seed, resamples=resamples)


@pytest.mark.parametrize(
    ("law", "truth", "inputs", "at", "coefficients"), PLANTED, ids=lambda each: getattr(each, "name", "")
)
def test_planted_laws_lie_in_their_intervals(law, truth, inputs, at, coefficients):
    """Of 20 intervals of 90%, 14 or more cover with probability 0.998 (a binomial), were they independent."""
    covered = dict.fromkeys([*coefficients, "one more run"], 0)
    for seed in range(TRIALS):
        found = planted_fit(law, truth, inputs, seed=seed, resamples=40)
        for name, (low, high) in found.intervals.items():
            covered[name] += low <= coefficients[name] <= high
        there = {name: np.array([value]) for name, value in at.items()}
        low, high = found.interval(there)
        run = truth(there) * math.exp(np.random.default_rng(1000 + seed).normal(0, 0.003))
        covered["one more run"] += bool(low[0] <= run[0] <= high[0])
    assert min(covered.values()) >= 14, covered


@pytest.mark.parametrize("samples", [20, 40, 200])
def test_between_the_edges_of_few_samples_lies_what_is_claimed(samples):
    """Of draws whose distribution is known: no fit, no law."""
    draws = np.random.default_rng(0).normal(size=(samples, 40_000))
    low, high = _middle(draws, 0.9)
    one_more = np.random.default_rng(1).normal(size=40_000)
    # a standard error is 0.0015
    assert np.mean((low <= one_more) & (one_more <= high)) == pytest.approx(0.9, abs=0.006)


@pytest.mark.parametrize("router", PUBLISHED)
def test_the_coefficients_of_clark_et_al_are_found_on_their_runs(router):
    inputs, loss = table(router)
    found = fit(ROUTED, inputs, loss)
    for name, (low, high) in found.intervals.items():
        assert low <= PUBLISHED[router][name] <= high, name
    assert found.noise < 0.01


def test_without_noise_the_coefficients_are_exact():
    found = planted_fit(noise=0.0, resamples=5)
    for name, value in OF_COMPUTE.items():
        assert found.coefficients[name] == pytest.approx(value, rel=1e-3)


def test_a_run_that_went_wrong_does_not_bend_the_law():
    loss = of_compute(COMPUTES) * np.exp(np.random.default_rng(0).normal(0, 0.003, 16))
    loss[5] *= 1.3
    found = fit(COMPUTE, COMPUTES, loss, resamples=5)
    assert found.coefficients["b"] == pytest.approx(OF_COMPUTE["b"], rel=0.25)


def test_experts_saturate():
    experts = np.array([1.0, 512.0, 1e9])
    first, middle, last = effective_experts(experts, start=2.0, largest=300.0)
    assert first == pytest.approx(2.0)
    assert 150 < middle < 300
    assert last == pytest.approx(300.0, rel=1e-3)


class TestTooFew:
    def test_runs(self):
        with pytest.raises(DataError, match="there are 3 of the 5 runs"):
            fit(COMPUTE, {"compute": np.array([1e17, 1e18, 1e19])}, [3.0, 2.9, 2.8])

    def test_values(self):
        with pytest.raises(DataError, match="2 of the 4 different values of compute"):
            fit(COMPUTE, {"compute": np.repeat([1e17, 1e18], 6)}, np.linspace(3, 2.9, 12))

    def test_a_routers_few_weights_make_no_other_size(self):
        sizes = np.repeat([1.00e8, 1.01e8, 0.99e8], 4)
        with pytest.raises(DataError, match="1 of the 2 different values of parameters"):
            fit(ROUTED, {"parameters": sizes, "experts": np.tile([1.0, 2, 4, 8], 3)}, np.linspace(3, 2.9, 12))


class TestPredictions:
    def test_a_planted_loss_is_predicted_within_the_interval(self):
        said = predict(planted_fit(), {"compute": 1e21})
        assert isinstance(said, Prediction)
        assert said.low < of_compute({"compute": 1e21}) < said.high
        assert said.beyond == pytest.approx(10.0)

    def test_too_far_is_refused(self):
        said = predict(planted_fit(), {"compute": 1e26})
        assert isinstance(said, Refusal)
        assert (
            "1e+06 times beyond the runs (1e+17 to 1e+20), which carry no further than 1e+03 times" in said.reasons[0]
        )

    def test_a_reach_of_the_users_own_goes_further(self):
        assert isinstance(predict(planted_fit(), {"compute": 1e23}, reach=2.0), Prediction)

    def test_noise_that_hides_the_exponent_is_refused(self):
        flat = {"compute": np.repeat(np.logspace(17, 20, 8), 2)}
        said = predict(planted_fit(truth=lambda inputs: 3 + 0 * inputs["compute"], inputs=flat), {"compute": 1e21})
        assert isinstance(said, Refusal)
        assert any("the exponent b of L(C) = a C^b + c is not identified" in reason for reason in said.reasons)

    def test_an_interval_that_tells_nothing_is_refused(self):
        said = predict(planted_fit(noise=0.08), {"compute": 1e20})
        assert isinstance(said, Refusal)
        assert any("of the loss wide, more than 10%" in reason for reason in said.reasons)

    def test_what_was_not_varied_is_refused(self):
        sizes = lattice(parameters=[1e8, 3e8], experts=[1.0, 2, 4, 8])
        said = predict(planted_fit(ROUTED, clark, sizes), {"parameters": 2e8, "experts": 512.0})
        assert isinstance(said, Refusal)
        assert said.reasons[0].startswith("experts 512 is 64 times beyond the runs (1 to 8)")
