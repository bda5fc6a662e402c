"""Duplicates: found as a comparison of all pairs finds them."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.errors import DataError
from moetrain.sources.duplicates import (
    PERMUTATIONS,
    digests,
    exact_duplicates,
    near_duplicates,
    require_rensa,
    rows_per_band,
)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2))))
def test_all_but_the_first_of_equals_are_exact_duplicates(documents):
    places, sizes = (np.array([one[part] for one in documents], dtype=np.uint64) for part in (0, 1))
    assert exact_duplicates(places, sizes).tolist() == [
        one in documents[:number] for number, one in enumerate(documents)
    ]


def words(seed: int, number: int) -> list[str]:
    draw = random.Random(seed)
    return [f"w{draw.randrange(10_000)}" for _ in range(number)]


def jaccard(one: str, other: str) -> float:
    first, second = ({tuple(text.split()[n : n + 5]) for n in range(len(text.split()) - 4)} for text in (one, other))
    return len(first & second) / len(first | second)


def altered(document: list[str], every: int) -> list[str]:
    return [f"x{number}" if number % every == every - 1 else word for number, word in enumerate(document)]


def test_similar_documents_are_found_and_others_are_not():
    pytest.importorskip("rensa")
    originals = [words(seed, 600) for seed in range(30)]
    similar = [" ".join(altered(document, 150)) for document in originals]
    other = [" ".join(altered(document, 12)) for document in originals]
    texts = [" ".join(document) for document in originals] + other + similar
    assert min(jaccard(texts[n], similar[n]) for n in range(30)) > 0.9
    assert max(jaccard(texts[n], other[n]) for n in range(30)) < 0.6
    found = near_duplicates(digests(texts), dropped=np.zeros(90, dtype=bool), similarity=0.8)
    assert found.tolist() == [False] * 60 + [True] * 30


def test_what_is_dropped_already_makes_no_other_a_duplicate():
    pytest.importorskip("rensa")
    texts = [" ".join(words(0, 100))] * 3
    assert near_duplicates(digests(texts), dropped=np.array([True, False, False]), similarity=0.8).tolist() == [
        False, False, True
    ]  # fmt: skip


def test_a_digest_estimates_the_similarity_also_of_text_without_spaces():
    pytest.importorskip("rensa")
    draw = random.Random(0)
    letters = [chr(0x4E00 + draw.randrange(3000)) for _ in range(2000)]
    changed = letters[:1000] + letters[1100:]
    one, other = "".join(letters), "".join(changed)
    sets = [{text[n : n + 10] for n in range(len(text) - 9)} for text in (one, other)]
    truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    found = digests([one, other])
    assert found.shape == (2, PERMUTATIONS)
    assert abs((found[0] == found[1]).mean() - truth) < 0.1


def test_texts_too_short_for_a_shingle_differ_by_their_words():
    pytest.importorskip("rensa")
    found = near_duplicates(digests(["a b", "a c", "a b"]), dropped=np.zeros(3, dtype=bool), similarity=0.8)
    assert found.tolist() == [False, False, True]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_the_bands_bring_similar_pairs_together(similarity):
    rows = rows_per_band(similarity)
    draw = np.random.default_rng(0)
    equal = draw.random((20_000, PERMUTATIONS)) < similarity
    bands = equal[:, : PERMUTATIONS // rows * rows].reshape(20_000, -1, rows)
    assert bands.all(axis=2).any(axis=1).mean() > 0.96


def test_without_rensa_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(DataError, match=r"pip install 'moetrain\[near\]', or set prepare\.duplicates=exact"):
        require_rensa()


def test_a_document_is_compared_with_more_than_the_first_of_those_it_shares_a_band_with():
    draw, rows = np.random.default_rng(0), rows_per_band(0.8)
    text = draw.integers(0, 1 << 32, size=PERMUTATIONS, dtype=np.uint32)
    bands = range(0, PERMUTATIONS - rows + 1, rows)
    others = draw.integers(0, 1 << 32, size=(len(bands), PERMUTATIONS), dtype=np.uint32)
    for other, first in zip(others, bands, strict=True):
        other[first : first + rows] = text[first : first + rows]  # comes before it in this band, and is not alike
    digest = np.vstack([others, text, text])
    found = near_duplicates(digest, dropped=np.zeros(len(digest), dtype=np.bool_), similarity=0.8)
    assert np.flatnonzero(found).tolist() == [len(bands) + 1]
