"""What the values of a checkpoint tell, read a block at a time: of one by itself, and of two side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from moetrain.archive.stored import Stored, blocks
from moetrain.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
_SMALLEST_SQUARED = 1e-15
"""A first moment above this has a second moment that float32 can tell from 0."""


@dataclass(frozen=True)
class Findings:
    """Faults, each a sentence."""

    unreadable: list[str] = field(default_factory=list)
    """Parameters whose values could not be read."""
    bad: list[str] = field(default_factory=list)
    """Values that are not finite, second moments below 0."""
    lost: list[str] = field(default_factory=list)
    """Moments that were set to 0."""
    twins: list[str] = field(default_factory=list)
    """Experts of a block that are byte-equal."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A tensor in two checkpoints."""

    name: str
    equal: bool
    """Bit for bit, the same dtype included."""
    numel: int = 0
    largest: float = 0.0
    """Absolute difference of the two values that differ most; NaN where one of them is."""
    relative: float = 0.0
    """The same, over the largest absolute value of the first."""
    problem: str = ""
    """Why values cannot be compared; empty when they were."""


def read_through(stored: Stored, *, experts: dict[str, int], step: int | None) -> Findings:
    """Read every value of a checkpoint once; in memory are a block of each kind of one parameter.

    Args:
        experts: parameters that hold the experts of a block -> how many.
        step: finished steps; None: unknown, which leaves out what only holds after the first.
    """
    found = Findings()
    for parameter in dict.fromkeys(name.rpartition("/")[0] for name in stored.tensors):
        try:
            _read_parameter(stored, parameter, experts=experts.get(parameter, 1), step=step, found=found)
        except CheckpointError as error:
            found.unreadable.append(f"{parameter}: {error}")
    return found


def compare(first: Stored, second: Stored) -> Iterator[Difference]:
    """Every tensor of either, by global name, whatever layouts wrote them.

    Raises:
        CheckpointError: values of one cannot be read.
    """
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        one, two = first.tensors.get(name), second.tensors.get(name)
        if one is None or two is None:
            yield Difference(name=name, equal=False, problem=f"only in the {'second' if one is None else 'first'}")
        elif one.numel != two.numel:
            problem = f"{one.numel:,} elements in the first, {two.numel:,} in the second"
            yield Difference(name=name, equal=False, problem=problem)
        else:
            yield _compare_tensor(name, first, second)


def _compare_tensor(name: str, first: Stored, second: Stored) -> Difference:
    numel = first.tensors[name].numel
    equal = first.tensors[name].dtype == second.tensors[name].dtype
    largest = scale = torch.zeros((), dtype=torch.float64)
    for begin, end in blocks(numel):
        one, two = first.read(name, begin, end), second.read(name, begin, end)
        if equal and torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            scale = torch.maximum(scale, one.double().abs().max())
            continue
        equal = False
        # torch.maximum, unlike max, lets a NaN through
        largest = torch.maximum(largest, (one.double() - two.double()).abs().max())
        scale = torch.maximum(scale, one.double().abs().max())
    relative = largest / scale if scale else largest * float("inf") if largest else largest
    return Difference(name=name, equal=equal, numel=numel, largest=float(largest), relative=float(relative))


@dataclass
class _Slice:
    """One expert of a tensor, or all of a tensor without experts, as far as it was read."""

    hash: xxhash.xxh128 = field(default_factory=xxhash.xxh128)
    is_zero: bool = True


def _read_parameter(stored: Stored, parameter: str, *, experts: int, step: int | None, found: Findings) -> None:
    """All kinds of a parameter side by side."""
    kinds = [kind for kind in ("fp32", *MOMENTS, "state") if f"{parameter}/{kind}" in stored.tensors]
    numel = min(stored.tensors[f"{parameter}/{kind}"].numel for kind in kinds)
    if numel % experts:
        experts = 1  # of another size than the settings say, which is told elsewhere
    slices = {kind: [_Slice() for _ in range(experts)] for kind in kinds}
    for begin, end in blocks(numel, groups=experts):
        expert = begin * experts // numel
        where = f" (expert {expert})" if experts > 1 else ""
        block = {kind: stored.read(f"{parameter}/{kind}", begin, end) for kind in kinds}
        for kind, values in block.items():
            found.bad.extend(_bad_values(f"{parameter}/{kind}{where}", values, is_squared=kind == MOMENTS[1]))
            slices[kind][expert].is_zero &= not values.any()
            if experts > 1:
                slices[kind][expert].hash.update(values.view(torch.uint8).numpy().data)
        if step and all(moment in block for moment in MOMENTS):
            gone = int(((block["exp_avg_sq"] == 0) & (block["exp_avg"].abs() > _SMALLEST_SQUARED)).sum())
            if gone:
                found.lost.append(f"{parameter}/exp_avg_sq{where} is 0 at {gone:,} places where exp_avg is not")
    if step:
        found.lost.extend(_empty_moments(parameter, slices))
    if step != 0 and experts > 1:
        for kind in kinds:
            found.twins.extend(_twins(f"{parameter}/{kind}", slices[kind], is_moment=kind in MOMENTS))


def _bad_values(name: str, values: Tensor, *, is_squared: bool) -> Iterator[str]:
    if infinite := int((~values.isfinite()).sum()):
        yield f"{name}: {infinite:,} values are not finite"
    if is_squared and (negative := int((values < 0).sum())):
        yield f"{name}: {negative:,} values are below 0"


def _empty_moments(parameter: str, slices: dict[str, list[_Slice]]) -> Iterator[str]:
    moments = [kind for kind in slices if kind in MOMENTS]
    empty = [kind for kind in moments if all(each.is_zero for each in slices[kind])]
    # a router may get no gradient at all: with one expert per token, renormalized, its weight is always 1
    if empty and not (len(empty) == len(moments) and ".router." in parameter):
        yield f"{parameter}/{' and '.join(empty)}: all 0, after training"


def _twins(name: str, slices: list[_Slice], *, is_moment: bool) -> Iterator[str]:
    first: dict[bytes, int] = {}
    for expert, each in enumerate(slices):
        # experts that no token has come by have the same moments: none
        if not (is_moment and each.is_zero) and (one := first.setdefault(each.hash.digest(), expert)) != expert:
            yield f"{name}: experts {one} and {expert} are byte-equal"
