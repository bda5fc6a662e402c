"""Which documents say again what an earlier one said.

Exact: equal hash and length. Near: the Jaccard similarity of the sets of word 5-grams, estimated by MinHash (Broder
1997, "On the resemblance and containment of documents"), candidates found by hashing bands of it (Leskovec,
Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4). Of documents alike the first stays.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.errors import DataError

PERMUTATIONS = 128
"""Numbers in a digest: a similarity is estimated to about 0.04, one standard deviation."""

_SHINGLE = 5  # words; of text without spaces characters, twice as many
_FOUND = 0.97  # share of the pairs just at the threshold that the bands must bring together
_LEADERS = 64  # of one band's documents alike: with how many different ones another is compared
_SEED = 1


def exact_duplicates(places: npt.NDArray[np.uint64], sizes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[documents], True for each that equals an earlier one.

    Args:
        places: [documents], hash of each document's text.
        sizes: [documents], its bytes.
    """
    order = np.lexsort((sizes, places))  # stable: of equals, the first comes first
    same = (places[order][1:] == places[order][:-1]) & (sizes[order][1:] == sizes[order][:-1])
    dropped = np.zeros(len(places), dtype=np.bool_)
    dropped[order[1:][same]] = True
    return dropped


def digests(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """[texts, PERMUTATIONS]: MinHash of each text.

    Raises:
        DataError: rensa is not installed.
    """
    minhash = require_rensa().RMinHash
    found = minhash.digests_from_token_sets([_shingles(text) for text in texts], PERMUTATIONS, _SEED)
    return np.array(found, dtype=np.uint32).reshape(len(texts), PERMUTATIONS)


def require_rensa() -> Any:
    """The module rensa.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module("rensa")
    except ImportError as error:
        raise DataError(
            "prepare.duplicates=near needs rensa: pip install 'moetrain[near]', or set prepare.duplicates=exact"
        ) from error


def near_duplicates(
    digest: npt.NDArray[np.uint32], *, dropped: npt.NDArray[np.bool_], similarity: float
) -> npt.NDArray[np.bool_]:
    """[documents], True for each that is similar to an earlier one that was not dropped when the two were compared.

    Eight bytes a document are in memory for the band at hand; the digests are read where they lie.

    Args:
        digest: [documents, PERMUTATIONS], may be a memory map.
        dropped: [documents], those that are not looked at.
        similarity: from which on two are alike.
    """
    found = np.zeros(len(digest), dtype=np.bool_)
    rows = rows_per_band(similarity)
    for first in range(0, PERMUTATIONS - rows + 1, rows):
        alive = np.flatnonzero(~(dropped | found))
        keys = _band_keys(digest, alive, first=first, rows=rows)
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order])) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(order)]])
        for group in np.flatnonzero(ends - starts > 1):
            members = alive[order[starts[group] : ends[group]]]
            found[_followers(digest, members, similarity=similarity)] = True
    return found


def rows_per_band(similarity: float) -> int:
    """The most numbers in a band with which a pair of this similarity shares a band with probability ``_FOUND``."""

    def chance(rows: int) -> float:
        return 1.0 - (1.0 - float(similarity) ** rows) ** (PERMUTATIONS // rows)

    return max((rows for rows in range(1, PERMUTATIONS + 1) if chance(rows) >= _FOUND), default=1)


def _band_keys(
    digest: npt.NDArray[np.uint32], documents: npt.NDArray[np.intp], *, first: int, rows: int
) -> npt.NDArray[np.uint64]:
    keys = np.zeros(len(documents), dtype=np.uint64)
    for start in range(0, len(documents), 1 << 16):
        piece = np.asarray(digest[documents[start : start + (1 << 16)], first : first + rows], dtype=np.uint64)
        key = np.zeros(len(piece), dtype=np.uint64)
        for column in piece.T:
            key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        keys[start : start + (1 << 16)] = key
    return keys


def _followers(digest: npt.NDArray[np.uint32], members: npt.NDArray[np.intp], *, similarity: float) -> list[int]:
    """Those of some documents, in order, that are similar to an earlier one of them that is not."""
    leaders: list[npt.NDArray[np.uint32]] = []
    followers = []
    for member in members.tolist():
        own = np.asarray(digest[member])
        if any(np.count_nonzero(own == leader) >= similarity * PERMUTATIONS for leader in leaders):
            followers.append(member)
        elif len(leaders) < _LEADERS:
            leaders.append(own)
    return followers


def _shingles(text: str) -> list[str]:
    words = text.split()
    if len(words) * 32 < len(text):  # a script without spaces
        size = 2 * _SHINGLE
        return [text[start : start + size] for start in range(max(1, len(text) - size + 1))]
    return [" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))]
