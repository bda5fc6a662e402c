"""Who measures with whom, and what to leave out: pure functions on numbers of nodes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

Pair = tuple[int, int]
"""Two units, the smaller first."""


def rounds(units: int) -> list[list[Pair]]:
    """A tournament in which every two units meet once, and no unit is in two pairs of one round.

    The circle method (Kirkman 1847): one unit stays, the others turn around it; with an odd number, who meets the one
    that is not there sits out. So each link is measured while its two ends send to nobody else.

    Returns:
        ``units - 1`` rounds for an even number, ``units`` for an odd one.
    """
    places: list[int | None] = list(range(units)) + ([None] if units % 2 else [])
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def median_of_others(values: Sequence[float], index: int) -> float | None:
    """What the rest has; None: there is no rest."""
    others = [*values[:index], *values[index + 1 :]]
    return statistics.median(others) if others else None


def slow_links(rates: Mapping[Pair, float], *, below: float) -> list[Pair]:
    """Pairs slower than ``below`` times the median of the other pairs."""
    pairs, values = list(rates), list(rates.values())
    found = []
    for number, pair in enumerate(pairs):
        usual = median_of_others(values, number)
        if usual is not None and values[number] < below * usual:
            found.append(pair)
    return found


def at_fault(bad: Collection[Pair], *, tried: Collection[Pair]) -> list[int]:
    """Units all of whose links are bad, where they have two or more and others have good ones: the unit is at fault."""
    of_bad, of_all = Counter(unit for pair in bad for unit in pair), Counter(unit for pair in tried for unit in pair)
    if len(set(bad)) == len(set(tried)):
        return []  # no link is good: nothing tells one unit from another
    return sorted(unit for unit, many in of_bad.items() if many == of_all[unit] and many > 1)


def leave_out(bad_units: Collection[int], bad_links: Collection[Pair]) -> list[int]:
    """Units without which nothing bad is left: the bad ones, and of each bad link the end that has more of them.

    Where both ends have as many the later one goes: the first has the store that all ranks meet at.
    """
    out = set(bad_units)
    left = {pair for pair in bad_links if not out & set(pair)}
    while left:
        many = Counter(unit for pair in left for unit in pair)
        worst = max(many, key=lambda unit: (many[unit], unit))
        out.add(worst)
        left = {pair for pair in left if worst not in pair}
    return sorted(out)
