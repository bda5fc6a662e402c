"""Which source each sample of a run comes from: a pure function of the sample's number, without tables and state.

    weights 3, 2, 1        (a, b, c)             a binary tree over the sources; at each node, of its first m samples
                           /       \\             round(m * share) go to the left. Both counts only grow with m, so the
                          a        (b, c)        next sample goes where a count is about to grow, and a source's own
                                   /    \\        count comes out of the walk down.
                                  b      c

A node's rounding is off by at most 1/2, and a node below takes over its part of it. Of n samples, a source of weight w
gets n w, give or take 1/2 (1 + sum of w / w_node over the inner nodes above it but the root). The tree is the one that
keeps this least where there are few sources: below 1 for up to four, whatever their weights, and hardly above for more
(``Blend.bound``).
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_TOTAL = 1 << 30  # of the whole numbers that weights become: products of two of them fit into int64
_MOST_SEARCHED = 8  # sources; the search for the best tree looks at every way to divide every set of them
_BOUNDS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35)


@dataclass(frozen=True)
class Located:
    """Where some samples come from, each [N]."""

    source: Ints
    index: Ints  # how many samples of this source come before


@dataclass(frozen=True)
class _Node:
    left: _Node | int  # a number is a source
    right: _Node | int
    left_weight: int
    weight: int


class Blend:
    """Samples 0, 1, 2, … shared out by constant weights.

    Args:
        weights: of the sources, at least one above 0; whole numbers that sum to at most 2^30 are taken as they are,
            others are rounded to shares of 2^30.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = _whole(weights)
        self._tree = _best_tree(self._weights)

    def share(self, source: int) -> float:
        """Of a source, in [0, 1]."""
        return self._weights[source] / sum(self._weights)

    def bound(self, source: int) -> float:
        """How far the count of a source among the first n samples may be from n times its share, for any n."""
        return _bound(self._tree, source)

    def counts(self, n: int) -> list[int]:
        """How many of the first ``n`` samples come from each source."""
        counts = [0] * len(self._weights)
        waiting = [(self._tree, n)]
        while waiting:
            node, m = waiting.pop()
            if isinstance(node, int):
                counts[node] = m
            else:
                left = (2 * m * node.left_weight + node.weight) // (2 * node.weight)
                waiting += [(node.left, left), (node.right, m - left)]
        return counts

    def locate(self, samples: Ints) -> Located:
        """Source and place of each of some samples, [N]."""
        found = Located(source=np.empty_like(samples), index=np.empty_like(samples))
        waiting = [(self._tree, np.arange(len(samples)), samples)]
        while waiting:
            node, rows, m = waiting.pop()
            if isinstance(node, int):
                found.source[rows], found.index[rows] = node, m
                continue
            before = _left_count(m, node)
            goes_left = _left_count(m + 1, node) > before
            waiting.append((node.left, rows[goes_left], before[goes_left]))
            waiting.append((node.right, rows[~goes_left], (m - before)[~goes_left]))
        return found


@dataclass(frozen=True)
class Stage:
    """Weights up to a sample.

    Attributes:
        end: the first sample after it; None: it has no end.
        weights: of every source.
    """

    end: int | None
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _Segment:
    start: int
    end: int | None
    before: tuple[int, ...]  # samples of each source in the segments before
    blend: Blend


class Mixture:
    """Blends one after another.

    A source that has given all its samples gives no more: from there on the others share its weight. So there are at
    most as many segments as stages and sources together.

    Args:
        stages: one after another, each longer than nothing.
        most: samples that each source gives at most; None: no limit.
    """

    def __init__(self, stages: Sequence[Stage], *, most: Sequence[int | None]) -> None:
        assert stages[-1].end is None, stages
        self.length: int | None = None
        """Samples there are, when every source has given all it has; None: there is no end."""
        self.used_up: dict[int, int] = {}
        """Source -> the first sample for which it has nothing left."""
        self._segments: list[_Segment] = []
        start, before = 0, tuple(0 for _ in most)
        for stage in stages:
            while stage.end is None or start < stage.end:
                left = [None if limit is None else limit - count for limit, count in zip(most, before, strict=True)]
                weights = [0.0 if rest == 0 else weight for weight, rest in zip(stage.weights, left, strict=True)]
                if not any(weights):
                    self.length = start
                    break
                blend = Blend(weights)
                size = _until_used_up(blend, left=left)
                if stage.end is not None:
                    size = stage.end - start if size is None else min(size, stage.end - start)
                end = None if size is None else start + size
                self._segments.append(_Segment(start, end, before, blend))
                if end is None or size is None:
                    break
                before = tuple(a + b for a, b in zip(before, blend.counts(size), strict=True))
                start = end
                self._note_used_up(before, most=most, now=start)
            if self.length is not None:
                break
        self._starts = np.array([segment.start for segment in self._segments])

    def locate(self, samples: Ints) -> Located:
        """Source and place of each of some samples, [N], below ``length``."""
        assert self.length is None or samples.max(initial=-1) < self.length, "the sources have run out"
        found = Located(source=np.empty_like(samples), index=np.empty_like(samples))
        number = np.searchsorted(self._starts, samples, side="right") - 1
        for each in np.unique(number):
            segment, rows = self._segments[each], number == each
            inside = segment.blend.locate(samples[rows] - segment.start)
            found.source[rows] = inside.source
            found.index[rows] = inside.index + np.array(segment.before)[inside.source]
        return found

    def counts(self, n: int) -> list[int]:
        """How many of the first ``n`` samples come from each source."""
        segment = self._segments[int(np.searchsorted(self._starts, n, side="right")) - 1]
        inside = segment.blend.counts(n - segment.start)
        return [a + b for a, b in zip(segment.before, inside, strict=True)]

    def _note_used_up(self, before: tuple[int, ...], *, most: Sequence[int | None], now: int) -> None:
        for source, (count, limit) in enumerate(zip(before, most, strict=True)):
            if limit is not None and count >= limit:
                self.used_up.setdefault(source, now)


def one_source(most: int | None = None) -> Mixture:
    """Everything from source 0."""
    return Mixture([Stage(end=None, weights=(1.0,))], most=[most])


def _until_used_up(blend: Blend, *, left: Sequence[int | None]) -> int | None:
    """The least n at which a source has given all it has left; None: there is none."""

    def is_used_up(n: int) -> bool:
        return any(rest is not None and 0 < rest <= count for rest, count in zip(left, blend.counts(n), strict=True))

    if not any(rest and blend.share(source) for source, rest in enumerate(left)):
        return None
    high = 1
    while not is_used_up(high):
        high *= 2
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_used_up(middle) else (middle, high)
    return high


def _whole(weights: Sequence[float]) -> list[int]:
    assert min(weights) >= 0 < max(weights), weights
    if all(float(weight).is_integer() for weight in weights) and sum(weights) <= _TOTAL:
        return [int(weight) for weight in weights]
    total = sum(weights)
    # the half is room for what rounding up adds
    return [max(1, round(weight / total * (_TOTAL // 2))) if weight else 0 for weight in weights]


def _left_count(m: Ints, node: _Node) -> Ints:
    """round(m * left_weight / weight), halves up, without a product that could overflow."""
    whole, rest = np.divmod(m, node.weight)
    count: Ints = whole * node.left_weight + (2 * rest * node.left_weight + node.weight) // (2 * node.weight)
    return count


def _bound(tree: _Node | int, source: int) -> float:
    """Zero for a source that is not in the tree, and for one alone."""

    def above(node: _Node | int) -> list[int] | None:
        """Weights on the way down to the source, its own first."""
        if isinstance(node, int):
            return [] if node == source else None
        for child, weight in ((node.left, node.left_weight), (node.right, node.weight - node.left_weight)):
            found = above(child)
            if found is not None:
                return [*found, weight]
        return None

    path = above(tree)
    return 0.5 * sum(path[0] / weight for weight in path) if path else 0.0


def _best_tree(weights: Sequence[int]) -> _Node | int:
    used = [source for source, weight in enumerate(weights) if weight]
    if len(used) > _MOST_SEARCHED:
        return _huffman(weights, used)
    for bound in _BOUNDS:
        tree = _search(weights, used, bound=bound)
        if tree is not None:
            return tree
    return _huffman(weights, used)


def _search(weights: Sequence[int], used: Sequence[int], *, bound: float) -> _Node | int | None:
    """A tree in which no source's count is off by more; None: there is none.

    By sets of sources: the room of a set is how large the sum of 1 / w_node over the inner nodes above it may be.
    """

    def weight(members: int) -> int:
        return sum(weights[source] for place, source in enumerate(used) if members >> place & 1)

    @functools.cache
    def best(members: int) -> tuple[float, int]:
        """The room inside, and the left part of the division that has it; for one source the room alone."""
        if members & (members - 1) == 0:
            return (2 * bound - 1) / weight(members), 0
        first = members & -members
        part, found = members ^ first, (-np.inf, 0)
        while part:  # every right part: the subsets without the first source
            found = max(found, (min(room(members ^ part), room(part)), members ^ part))
            part = part - 1 & members ^ first
        return found

    def room(members: int) -> float:
        inside = best(members)[0]
        return inside if members & (members - 1) == 0 else inside - 1 / weight(members)

    def grow(members: int) -> _Node | int:
        left = best(members)[1]
        if not left:
            return used[members.bit_length() - 1]
        return _Node(grow(left), grow(members ^ left), left_weight=weight(left), weight=weight(members))

    everything = (1 << len(used)) - 1
    return grow(everything) if best(everything)[0] >= 0 else None


def _huffman(weights: Sequence[int], used: Sequence[int]) -> _Node | int:
    """For many sources: an inner node has at most 2/3 of the node above it, so what is taken over shrinks fast."""
    heap: list[tuple[int, int, Any]] = [(weights[source], source, source) for source in used]
    heapq.heapify(heap)
    for number in range(len(used) - 1):
        (one, _, left), (other, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        node = _Node(left, right, left_weight=one, weight=one + other)
        heapq.heappush(heap, (one + other, len(weights) + number, node))
    tree: _Node | int = heap[0][2]
    return tree
