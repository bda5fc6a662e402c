"""Who measures with whom, and who is to blame: properties that hold for any number of nodes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from moetrain.preflight.links import at_fault, leave_out, rounds, slow_links

UNITS = st.integers(min_value=0, max_value=40)


def all_pairs(units: int) -> set[tuple[int, int]]:
    return set(itertools.combinations(range(units), 2))


@given(UNITS)
def test_in_the_tournament_every_two_meet_exactly_once(units):
    met = [pair for pairs in rounds(units) for pair in pairs]
    assert len(met) == len(set(met))
    assert set(met) == all_pairs(units)


@given(UNITS)
def test_no_unit_is_in_two_pairs_of_a_round(units):
    for pairs in rounds(units):
        playing = [unit for pair in pairs for unit in pair]
        assert len(playing) == len(set(playing))


@given(st.integers(min_value=2, max_value=40))
def test_the_tournament_has_no_more_rounds_than_it_must(units):
    assert len(rounds(units)) == (units if units % 2 else units - 1)
    # nobody sits out but the odd one
    assert all(len(pairs) == units // 2 for pairs in rounds(units))


@given(st.integers(min_value=3, max_value=12), st.data())
def test_a_slow_node_is_told_from_slow_links_of_its_partners(units, data):
    slow = data.draw(st.integers(min_value=0, max_value=units - 1))
    rates = {pair: 1.0 if slow in pair else 10.0 for pair in all_pairs(units)}
    found = slow_links(rates, below=0.5)
    assert set(found) == {pair for pair in rates if slow in pair}
    assert at_fault(found, tried=rates) == [slow]
    assert leave_out(at_fault(found, tried=rates), found) == [slow]


@given(st.integers(min_value=4, max_value=12), st.data())
def test_one_slow_link_is_the_fault_of_neither_end(units, data):
    slow = data.draw(st.sampled_from(sorted(all_pairs(units))))
    rates = {pair: 1.0 if pair == slow else 10.0 for pair in all_pairs(units)}
    assert slow_links(rates, below=0.5) == [slow]
    assert at_fault([slow], tried=rates) == []
    assert leave_out([], [slow]) == [slow[1]]


def test_a_single_link_has_nothing_to_be_slower_than():
    assert slow_links({(0, 1): 1.0}, below=0.5) == []


def test_where_no_link_is_good_nobody_is_singled_out():
    assert at_fault(all_pairs(4), tried=all_pairs(4)) == []


@given(st.integers(min_value=2, max_value=10), st.data())
def test_without_those_left_out_no_bad_node_and_no_bad_link_is_left(units, data):
    bad_links = data.draw(st.sets(st.sampled_from(sorted(all_pairs(units)))))
    bad_units = data.draw(st.sets(st.integers(min_value=0, max_value=units - 1)))
    out = set(leave_out(bad_units, bad_links))
    assert bad_units <= out
    assert all(out & set(pair) for pair in bad_links)


def test_the_node_of_many_bad_links_goes_and_its_partners_stay():
    assert leave_out([], [(0, 3), (1, 3), (2, 3)]) == [3]
