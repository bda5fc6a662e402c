"""When are two models the same?"""

from __future__ import annotations

import math

import pytest

from moetrain.hub.parity import Parity


@pytest.mark.parametrize(
    ("largest", "rounding", "holds"),
    [(1e-3, 1e-6, True), (0.1, 1e-6, False), (0.1, 0.02, True), (0.3, 0.02, False), (2.0, 1.0, False),
     (math.nan, 1e-6, False)],
)  # fmt: skip
def test_a_difference_is_rounding_or_it_is_not(largest, rounding, holds):
    """Of scores up to 50: 2e-4 of that, or ten times what rounding does to our own, but never more than 2 in 100."""
    assert Parity(largest=largest, scale=50.0, tokens=128, rounding=rounding).holds == holds
