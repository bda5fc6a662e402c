"""From a difference to its likely cause, where the numbers are clean enough to tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moetrain.verify.layouts import Layout

CLEAN = 2e-3
"""How near a ratio must be to a number to be taken for it."""


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Squared norms of the gradient.

    Attributes:
        dense: of all that is no expert's.
        of_expert: by global expert id, over all layers.
    """

    dense: float
    of_expert: list[float]


def of_tensor(
    found: Tensor | None,
    expected: Tensor,
    *,
    column: str,
    siblings: dict[int | None, Tensor],
    torn: bool,
    is_start: bool,
    layout: Layout,
) -> str:
    """Why a tensor may differ.

    Args:
        siblings: what one process has for the other experts of the same parameter, by global id.
        torn: two ranks hold different copies.
        is_start: whether these are initial values.
    """
    if torn:
        return "ranks hold different copies of it"
    if found is None or bool(found.isnan().any()):
        return "no rank holds all of it, or it is no number"
    for other, tensor in siblings.items():
        if _is_near(found, tensor):
            return f"it is that of expert {other}: are the experts in their places?"
    if is_start:
        return "drawn by the layout, not by its global name and expert id?"
    scale = (found.double() @ expected.double() / expected.double().square().sum()).item()
    return of_scale(scale, column=column, layout=layout) if _is_near(found, scale * expected) else ""


def of_scale(scale: float, *, column: str, layout: Layout) -> str:
    """Which size of the layout a clean ratio of found to expected points to."""
    if not (scale > 0 and math.isfinite(scale)):
        return ""
    names = [name for name, size in _sizes(column, layout) if size > 1 and math.isclose(scale, size, rel_tol=CLEAN)]
    if names:
        return f"{scale:.2f} times too large: multiplied by {' or '.join(names)}?"
    names = [name for name, size in _sizes(column, layout) if size > 1 and math.isclose(1 / scale, size, rel_tol=CLEAN)]
    if names:
        return f"{1 / scale:.2f} times too small: divided by {' or '.join(names)}?"
    return f"{scale:.3f} times the right one" if abs(scale - 1) > CLEAN else ""


def of_norm(norms: list[float], *, squares: Squares, layout: Layout) -> str:
    """What a gradient norm may have left out or counted twice.

    Args:
        norms: as each rank told it.
    """
    if max(norms) - min(norms) > CLEAN * max(norms):
        told = "the ranks tell different norms"
        each = [_miscounted(norm, squares=squares, layout=layout) for norm in norms]
        return f"{told}: {each[0]}" if each[0] and len(set(each)) == 1 else told
    return _miscounted(norms[0], squares=squares, layout=layout)


def _miscounted(norm: float, *, squares: Squares, layout: Layout) -> str:
    for hint, square in _miscounts(squares, layout=layout):
        if math.isclose(norm, math.sqrt(square), rel_tol=CLEAN / 20):
            return hint
    return ""


def _miscounts(squares: Squares, *, layout: Layout) -> Iterator[tuple[str, float]]:
    dense, experts = squares.dense, sum(squares.of_expert)
    if not experts:
        return
    each = len(squares.of_expert) // layout.expert_parallel
    if layout.expert_parallel > 1:
        for start in range(0, len(squares.of_expert), each):
            yield (
                "a rank's own experts are counted, and those of other ranks missed?",
                dense + sum(squares.of_expert[start : start + each]),
            )
        yield "experts are averaged over expert_parallel?", dense + experts / layout.expert_parallel
        yield "dense gradients are counted expert_parallel times?", dense * layout.expert_parallel + experts
    if layout.ranks > 1:
        yield "dense gradients are counted on every rank?", dense * layout.ranks + experts
    copies = layout.ranks // layout.expert_parallel
    if copies > 1:
        yield "each expert is counted on every rank that has a copy?", dense + experts * copies
    yield "no expert is counted?", dense


def _sizes(column: str, layout: Layout) -> list[tuple[str, int]]:
    sizes = [
        ("the ranks", layout.ranks),
        ("accumulation", layout.accumulation),
        ("expert_parallel", layout.expert_parallel),
        ("the copies of an expert", layout.ranks // layout.expert_parallel),
        ("ranks x accumulation", layout.ranks * layout.accumulation if layout.accumulation > 1 < layout.ranks else 1),
    ]
    # of an expert's tensor, the sizes that concern experts come first
    return sizes[2:4] + sizes[:2] + sizes[4:] if column == "expert" else sizes


def _is_near(found: Tensor, expected: Tensor) -> bool:
    distance = (found.double() - expected.double()).norm().item()
    return distance <= CLEAN * expected.double().norm().item() and bool(expected.any())
