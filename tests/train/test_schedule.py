"""The learning rate at every step, against the formulas written out."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.checks import in_steps
from moetrain.train.schedule import Schedule

PEAK, STEPS, WARMUP, DECAY, RATIO = 2.0, 40, 8, 10, 0.25


def rates(**changed: object) -> list[float]:
    given = {"kind": "cosine", "peak": PEAK, "steps": STEPS, "warmup": WARMUP, "decay": DECAY, "min_ratio": RATIO}
    schedule = Schedule(**(given | changed))
    return [schedule.at(step) for step in range(schedule.steps)]


def cosine(left: int, length: int) -> float:
    return 0.5 - 0.5 * math.cos(math.pi * left / length)


def linear(left: int, length: int) -> float:
    return left / length


def plain(kind: str) -> list[float]:
    """Step by step: up, along, down."""
    found = []
    for step in range(STEPS):
        left = STEPS - 1 - step  # steps after this one
        if step < WARMUP:
            found.append(PEAK / WARMUP * (step + 1))
        elif kind == "constant" or (kind == "wsd" and step <= STEPS - DECAY):
            found.append(PEAK)
        else:
            length = DECAY - 1 if kind == "wsd" else STEPS - 1 - WARMUP
            share = cosine(left, length) if kind == "cosine" else linear(left, length)
            found.append(PEAK * RATIO + PEAK * (1 - RATIO) * share)
    return found


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_every_step_is_as_the_formula_says(kind):
    assert rates(kind=kind) == pytest.approx(plain(kind), rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_warm_up_rises_evenly_from_above_0_and_ends_at_the_peak(kind):
    assert rates(kind=kind)[:WARMUP] == pytest.approx([PEAK * n / WARMUP for n in range(1, WARMUP + 1)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_lowest_rate(kind, ratio):
    found = rates(kind=kind, min_ratio=ratio)
    assert found[-1] == pytest.approx(PEAK * ratio, abs=1e-12)
    assert min(found[WARMUP:]) == found[-1]


def test_wsd_is_constant_until_its_decay():
    found = rates(kind="wsd")
    start = STEPS - DECAY
    assert found[WARMUP : start + 1] == [PEAK] * (start + 1 - WARMUP)
    assert found[start + 1] < PEAK
    assert len([rate for rate in found[WARMUP:] if rate < PEAK]) == DECAY - 1


def test_a_decay_of_one_step_is_the_last_step():
    assert rates(kind="wsd", decay=1) == [*rates(kind="constant")[:-1], PEAK * RATIO]


def test_a_decay_longer_than_the_run_begins_after_the_warm_up():
    assert rates(kind="wsd", decay=10 * STEPS) == rates(kind="linear")


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_without_a_warm_up_the_first_step_has_the_peak(kind):
    assert rates(kind=kind, warmup=0)[0] == PEAK


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_learns_at_the_peak(kind, warmup):
    assert rates(kind=kind, steps=1, warmup=warmup, decay=1) == [PEAK]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_one_step_after_the_warm_up_is_the_last_and_has_the_lowest_rate(kind):
    assert rates(kind=kind, steps=WARMUP + 1)[-1] == PEAK * RATIO


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_only_rises(kind):
    assert rates(kind=kind, steps=5) == pytest.approx([PEAK * n / WARMUP for n in range(1, 6)])


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(1, 300),
    st.integers(0, 320),
    st.integers(1, 320),
    st.floats(0, 1),
)
def test_a_rate_is_never_below_0_nor_above_the_peak_and_never_rises_after_the_warm_up(
    kind, steps, warmup, decay, ratio
):
    found = rates(kind=kind, steps=steps, warmup=warmup, decay=decay, min_ratio=ratio)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in found)
    after = found[max(0, warmup - 1) :]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(after))


@given(st.integers(1, 100), st.integers(0, 100), st.integers(1, 100), st.integers(1, 10_000))
def test_lengths_in_tokens_give_the_same_as_in_steps(steps, warmup, decay, per_step):
    def length(in_number_of_steps: int) -> int | None:
        return in_steps(None, in_number_of_steps * per_step, tokens_per_step=per_step)

    by_tokens = rates(kind="wsd", steps=length(steps), warmup=length(warmup), decay=length(decay))
    assert by_tokens == rates(kind="wsd", steps=steps, warmup=warmup, decay=decay)
