"""A layout's trace against that of one process: the largest error of each class, and the first that is too large.

Two float32 runs that add up the same numbers in another order differ by rounding (unit 6e-8). With all presets and all
routers, shrunk, on 1, 2 and 4 ranks, the largest errors measured were 1e-7 for losses, 8e-7 for norms, 1e-6 for
gradients and 6e-6 for what three steps leave; the bounds (``spec.BOUNDS``) are five to twenty times that. The least of
the planted faults of tests/verify changes a gradient by more than a hundred times its bound.

In bf16 every product rounds to 4e-3 of its value, and experts multiply other groups of rows on another layout. Such a
difference in the weights soon sends a token to another expert, so tensors are compared after the first step, and of the
later ones losses and norms. A fault in a small part of the loss would hide under these bounds: a bf16 model is compared
in float32 as well.

The error of a tensor is |found - expected| / |expected|, with a floor under the divisor: FLOOR times the root mean
square over all tensors of its kind. Below it a gradient is rounding of the larger ones (of the keys' biases, say, which
is 0), and is held against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.verify import hints
from moetrain.verify.layouts import Layout
from moetrain.verify.reference import StepTrace, Trace, Whole
from moetrain.verify.spec import BOUNDS, Difference, Result

FLOOR = 0.05
AUX_FLOOR = 0.1
"""Divisor of a router's loss at least; squared variations near 0 are differences of near-equal numbers."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A parameter, or one expert's part of it.

    Attributes:
        parameter: global name.
        column: dense, router or expert.
        expert: global id; None for what is not an expert's.
        first: where the piece begins in the flat parameter.
        numel: elements.
    """

    parameter: str
    column: str
    expert: int | None
    first: int
    numel: int

    @property
    def label(self) -> str:
        """What a person reads."""
        return self.parameter if self.expert is None else f"{self.parameter}, expert {self.expert}"

    def of(self, whole: Tensor) -> Tensor:
        """This piece of the flat parameter, or of another tensor of its shape."""
        return whole[self.first : self.first + self.numel]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What one process did, and its parameters piece by piece, in the order of the model."""

    trace: Trace
    pieces: list[Piece]

    @staticmethod
    def of(trace: Trace, *, gpt: nn.Module) -> Reference:
        return Reference(trace=trace, pieces=list(_pieces(gpt)))


@dataclass(frozen=True, kw_only=True)
class _Check:
    column: str
    what: str
    step: int
    error: float
    bound: float
    hint: str = ""

    @property
    def passes(self) -> bool:
        return self.error <= self.bound  # NaN does not


def compare(found: Trace, reference: Reference, *, layout: Layout) -> Result:
    """Hold a layout against one process."""
    errors: dict[str, float] = {}
    first: Difference | None = None
    for check in _checks(found, reference, layout=layout):
        # as large as can be, where a number is no number
        error = math.inf if math.isnan(check.error) else check.error
        errors[check.column] = max(error, errors.get(check.column, 0.0))
        if first is None and not check.passes:
            first = Difference(what=check.what, step=check.step, error=error, bound=check.bound, hint=check.hint)
    return Result(layout=layout.name, errors=errors, difference=first)


def _checks(found: Trace, reference: Reference, *, layout: Layout) -> Iterator[_Check]:
    """In the order in which a run computes them, so that the first to differ is nearest to the fault."""
    expected, bound = reference.trace, BOUNDS[layout.dtype]
    pairs = _pairs(found.after[0], expected.after[0], "/fp32", reference)
    # what is drawn by name is the same to the bit
    yield from _tensors(pairs, what="initial value", step=0, column="params", bounds={"params": 0.0}, layout=layout)
    last = len(expected.steps)
    for step, (ours, theirs) in enumerate(zip(found.steps, expected.steps, strict=True), start=1):
        yield from _losses(ours, theirs, step=step, layout=layout)
        if step == 1:
            pairs = _pairs(found.gradient, expected.gradient, "", reference)
            yield from _tensors(pairs, what="gradient", step=1, column=None, bounds=bound, layout=layout)
        error = max(_distance(norm, theirs.norms[0]) for norm in ours.norms)
        hint = hints.of_norm(ours.norms, squares=_squares(reference), layout=layout) if step == 1 else ""
        yield _Check(column="norm", what="gradient norm", step=step, error=error, bound=bound["norm"], hint=hint)
        if step == 1 or (step == last and layout.dtype == "fp32"):
            yield from _state(found.after[step], reference, step=step, layout=layout)


def _state(found: Whole, reference: Reference, *, step: int, layout: Layout) -> Iterator[_Check]:
    """Weights, moments, and what routers keep beside them."""
    expected, bounds = reference.trace.after[step], BOUNDS[layout.dtype]
    for kind, what in (("/fp32", "weight"), ("/exp_avg", "first moment"), ("/exp_avg_sq", "second moment")):
        pairs = _pairs(found, expected, kind, reference)
        yield from _tensors(pairs, what=what, step=step, column="params", bounds=bounds, layout=layout)
    for name, tensor in expected.tensors.items():
        if name.endswith("/state"):
            error = math.inf if name in found.torn else _error(found.tensors.get(name), tensor, floor=0.0)
            what = f"state of the router, {name.removesuffix('/state')}"
            yield _Check(column="params", what=what, step=step, error=error, bound=bounds["params"])


def _losses(ours: StepTrace, theirs: StepTrace, *, step: int, layout: Layout) -> Iterator[_Check]:
    bounds = BOUNDS[layout.dtype]
    for name, loss in theirs.aux.items():
        found = ours.aux.get(name, math.nan)
        yield _Check(
            column="aux",
            what=f"router's loss, {name}",
            step=step,
            error=_distance(found, loss, floor=AUX_FLOOR),
            bound=bounds["aux"],
            hint=hints.of_scale(found / loss if loss else math.nan, column="aux", layout=layout),
        )
    error = _distance(ours.language, theirs.language)
    hint = hints.of_scale(ours.language / theirs.language, column="loss", layout=layout)
    yield _Check(column="loss", what="language loss", step=step, error=error, bound=bounds["loss"], hint=hint)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    piece: Piece
    found: Tensor | None
    expected: Tensor
    torn: bool


def _pairs(found: Whole, expected: Whole, kind: str, reference: Reference) -> list[_Pair]:
    pairs = []
    for piece in reference.pieces:
        name = piece.parameter + kind
        own = found.tensors.get(name)
        pairs.append(_Pair(piece=piece, found=None if own is None else piece.of(own),
                           expected=piece.of(expected.tensors[name]), torn=name in found.torn))  # fmt: skip
    return pairs


def _tensors(
    pairs: list[_Pair], *, what: str, step: int, column: str | None, bounds: dict[str, float], layout: Layout
) -> Iterator[_Check]:
    """Args:
    column: of the table; None: that of each piece.
    """
    floor = FLOOR * _root_mean_square([pair.expected for pair in pairs])
    for pair in pairs:
        piece, into = pair.piece, column or pair.piece.column
        error = math.inf if pair.torn else _error(pair.found, pair.expected, floor=floor)
        hint = ""
        if not error <= bounds[into]:
            hint = hints.of_tensor(
                pair.found,
                pair.expected,
                column=piece.column,
                siblings={
                    other.piece.expert: other.expected
                    for other in pairs
                    if other.piece.parameter == piece.parameter and other.piece.expert not in (None, piece.expert)
                },
                torn=pair.torn,
                is_start=step == 0,
                layout=layout,
            )
        yield _Check(
            column=into, what=f"{what} of {piece.label}", step=step, error=error, bound=bounds[into], hint=hint
        )


def _error(found: Tensor | None, expected: Tensor, *, floor: float) -> float:
    """Relative error by the tensors' norms; infinite where something is missing."""
    if found is None or found.shape != expected.shape:
        return math.inf
    distance = (found.double() - expected.double()).norm().item()
    return distance / max(expected.double().norm().item(), floor * math.sqrt(expected.numel()), 1e-30)


def _distance(found: float, expected: float, *, floor: float = 1e-30) -> float:
    return abs(found - expected) / max(abs(expected), floor)


def _root_mean_square(tensors: list[Tensor]) -> float:
    squares = sum(tensor.double().square().sum().item() for tensor in tensors)
    return math.sqrt(squares / max(1, sum(tensor.numel() for tensor in tensors)))


def _squares(reference: Reference) -> hints.Squares:
    """The squared norm of the first gradient, expert by expert."""
    dense, of_expert = 0.0, dict[int, float]()
    for piece in reference.pieces:
        square = piece.of(reference.trace.gradient.tensors[piece.parameter]).double().square().sum().item()
        if piece.expert is None:
            dense += square
        else:
            of_expert[piece.expert] = of_expert.get(piece.expert, 0.0) + square
    return hints.Squares(dense=dense, of_expert=[of_expert[expert] for expert in sorted(of_expert)])


def _pieces(gpt: nn.Module) -> Iterator[Piece]:
    modules = dict(gpt.named_modules())
    experts = {name: module for name, module in modules.items() if isinstance(module, Experts)}
    routers = tuple(f"{name}.router." for name, module in modules.items() if isinstance(module, MoELayer))
    for name, parameter in gpt.named_parameters():
        holder = experts.get(name.rpartition(".")[0])
        if holder is None:
            column = "router" if name.startswith(routers) else "dense"
            yield Piece(parameter=name, column=column, expert=None, first=0, numel=parameter.numel())
            continue
        each = parameter.numel() // len(holder.global_ids)
        for index, expert in enumerate(holder.global_ids):
            yield Piece(parameter=name, column="expert", expert=expert, first=index * each, numel=each)
