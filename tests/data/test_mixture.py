"""Which source a sample comes from: near its share at every sample, never more than it has, found without walking."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.mixture import Blend, Mixture, Stage, one_source

SAMPLES = 600
whole_weights = st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any)
any_weights = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6)


def walk(mixture: Blend | Mixture, samples: int) -> tuple[list[int], list[int]]:
    found = mixture.locate(np.arange(samples))
    return found.source.tolist(), found.index.tolist()


def check_against_counting(located: tuple[list[int], list[int]]) -> dict[int, int]:
    """Each index is how often the source came before."""
    seen: dict[int, int] = {}
    for source, index in zip(*located, strict=True):
        assert index == seen.get(source, 0)
        seen[source] = index + 1
    return seen


def worst(sources: list[int], weights: list[Fraction], source: int) -> Fraction:
    """The largest distance of a source's count among the first n samples from n times its share, over n."""
    share, count, found = weights[source] / sum(weights), 0, Fraction(0)
    for n, each in enumerate(sources, start=1):
        count += each == source
        found = max(found, abs(count - n * share))
    return found


@settings(max_examples=60)
@given(weights=whole_weights)
def test_every_count_stays_within_the_bound_of_its_share(weights):
    blend = Blend(weights)
    sources, indexes = walk(blend, SAMPLES)
    seen = check_against_counting((sources, indexes))
    assert blend.counts(SAMPLES) == [seen.get(source, 0) for source in range(len(weights))]
    exact = [Fraction(weight) for weight in weights]
    for source in range(len(weights)):
        assert worst(sources, exact, source) <= blend.bound(source) + 1e-9
        assert blend.bound(source) <= (1 if sum(map(bool, weights)) <= 4 else 1.1)


@settings(max_examples=40)
@given(weights=any_weights)
def test_weights_that_are_no_whole_numbers_are_met_to_a_part_in_a_hundred_million(weights):
    blend = Blend(weights)
    sources, _ = walk(blend, SAMPLES)
    for source, weight in enumerate(weights):
        assert blend.share(source) == pytest.approx(weight / sum(weights), abs=2e-8)
        assert worst(sources, [Fraction(each) for each in weights], source) <= blend.bound(source) + 1e-4


@settings(max_examples=10)
@given(weights=st.lists(st.floats(1e-3, 1), min_size=9, max_size=40))
def test_many_sources_stay_near_their_shares_too(weights):
    blend = Blend(weights)
    sources, _ = walk(blend, SAMPLES)
    for source in range(len(weights)):
        assert worst(sources, [Fraction(each) for each in weights], source) <= blend.bound(source) + 1e-4 < 1.7


@given(weights=whole_weights, start=st.integers(0, 2**50))
def test_any_place_is_found_without_walking_there(weights, start):
    blend = Blend(weights)
    found = blend.locate(start + np.arange(40))
    before, after = blend.counts(start), blend.counts(start + 40)
    for source in range(len(weights)):
        indexes = found.index[found.source == source].tolist()
        assert indexes == list(range(before[source], after[source]))


def test_a_source_without_weight_never_comes():
    assert set(walk(Blend([1, 0, 2]), 100)[0]) == {0, 2}


@settings(max_examples=60)
@given(data=st.data(), num_sources=st.integers(1, 4))
def test_stages_and_limits_hold_at_every_sample(data, num_sources):
    weights = st.lists(st.integers(0, 5), min_size=num_sources, max_size=num_sources).filter(any)
    ends = sorted(data.draw(st.sets(st.integers(1, SAMPLES), max_size=3)))
    stages = [Stage(end, tuple(data.draw(weights))) for end in [*ends, None]]
    most = data.draw(st.lists(st.none() | st.integers(1, 200), min_size=num_sources, max_size=num_sources))
    mixture = Mixture(stages, most=most)
    length = SAMPLES if mixture.length is None else min(SAMPLES, mixture.length)
    sources, indexes = walk(mixture, length)
    seen = check_against_counting((sources, indexes))
    assert all(most[source] is None or count <= most[source] for source, count in seen.items())
    for n in (0, length // 2, length):
        assert mixture.counts(n) == [sources[:n].count(source) for source in range(num_sources)]
    for n, source in enumerate(sources):
        stage = next(each for each in stages if each.end is None or n < each.end)
        assert stage.weights[source] > 0, "only sources of the stage"
    for source, at in mixture.used_up.items():
        if at <= length:
            assert sources[:at].count(source) == most[source]
            assert source not in sources[at:]
    if mixture.length is not None:
        last = next(each for each in stages if each.end is None or mixture.length < each.end)
        counts = mixture.counts(mixture.length)
        assert all(most[source] == counts[source] for source, weight in enumerate(last.weights) if weight)


def test_in_each_stage_shares_are_met_anew():
    mixture = Mixture([Stage(100, (3.0, 1.0)), Stage(None, (1.0, 4.0))], most=[None, None])
    sources, _ = walk(mixture, 200)
    assert worst(sources[:100], [Fraction(3), Fraction(1)], 0) <= Fraction(1, 2)
    assert worst(sources[100:], [Fraction(1), Fraction(4)], 0) <= Fraction(1, 2)


def test_when_a_source_is_used_up_the_others_share_its_weight():
    mixture = Mixture([Stage(None, (2.0, 1.0, 1.0))], most=[10, None, None])
    sources, _ = walk(mixture, 120)
    assert mixture.used_up == {0: 19}
    assert sources[:19].count(0) == 10
    assert sources[20:].count(1) == sources[20:].count(2) == 50


def test_one_source_is_read_in_a_row():
    assert walk(one_source(), 50) == ([0] * 50, list(range(50)))


def test_a_place_far_out_costs_no_more_than_the_first():
    blend = Blend([0.31, 0.27, 0.2, 0.11, 0.06, 0.03, 0.015, 0.005])
    begun = time.perf_counter()
    blend.locate(10**15 + np.arange(4096))
    assert time.perf_counter() - begun < 0.01 * 10  # ten times the goal: a busy machine is no fault
