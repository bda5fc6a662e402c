"""Fill in the middle: what comes out is what went in, in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.middle import FillInMiddle

PRE, MID, SUF, END = 101, 102, 103, 0


def make(**changed: Any) -> FillInMiddle:
    given = {"rate": 1.0, "spm": 0.5, "prefix": PRE, "middle": MID, "suffix": SUF, "end_of_text": END, "seed": 3}
    return FillInMiddle(**given | changed)


def undo(tokens: list[int]) -> list[int]:
    """The document as it was."""
    if PRE not in tokens:
        return tokens
    rest = tokens[1:]
    suffix, middle = rest.index(SUF), rest.index(MID)
    if suffix == 0:  # SPM
        return rest[middle + 1 :] + rest[1:middle]
    return rest[:suffix] + rest[middle + 1 :] + rest[suffix + 1 : middle]


def documents(row: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in row:
        if token == END:
            found.append([])
        else:
            found[-1].append(token)
    return found


@given(row=st.lists(st.integers(0, 9), min_size=1, max_size=40), sample=st.integers(0, 2**60),
       rate=st.floats(0, 1), spm=st.floats(0, 1))  # fmt: skip
def test_every_document_can_be_put_back_together(row, sample, rate, spm):
    found = make(rate=rate, spm=spm)(np.array([row]), np.array([sample]))[0].tolist()
    assert len(found) == len(row), "what the marks push out is left away"
    before, after = documents(row), documents(found)
    # the last one that is there may be cut
    for old, new in zip(before[: len(after) - 1], after[:-1], strict=True):
        assert undo(new) == old


def test_a_sample_is_rearranged_the_same_whenever_and_with_whatever_it_is_read():
    rows = np.random.default_rng(0).integers(0, 9, size=(8, 30))
    samples = np.arange(100, 108)
    whole = make()(rows, samples)
    for place in (5, 0, 7):
        np.testing.assert_array_equal(make()(rows[place : place + 1], samples[place : place + 1])[0], whole[place])
    assert (make(seed=4)(rows, samples) != whole).any()
    assert (make()(rows, samples + 1) != whole).any()


def test_shares_are_met():
    rows = np.tile(np.arange(1, 9), (4000, 1))
    found = make(rate=0.5, spm=0.25)(rows, np.arange(4000))
    chosen = found[:, 0] == PRE
    spm = chosen & (found[:, 1] == SUF) & (found[:, 2:] != SUF).all(1)
    # PSM with an empty prefix looks like SPM; a standard deviation is 32 of 2,000 and 19 of 500
    assert abs(chosen.sum() - 2000) < 130
    assert 500 - 80 < spm.sum() < 500 + 80 + 1500 * 2 / 9


def test_nothing_changes_at_rate_0():
    rows = np.random.default_rng(0).integers(0, 9, size=(3, 30))
    np.testing.assert_array_equal(make(rate=0)(rows, np.arange(3)), rows)
