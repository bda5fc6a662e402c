"""Is a checkpoint whole? Every tensor, every expert and both moments there once, and fit to go on from.

The index and the settings say what must be there, and values are read a block at a time; only the last check, of the
resume certificate, loads the weights into a model. What a check cannot see is in docs/checkpoints.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from moetrain.archive.expected import Expected
from moetrain.archive.stored import Stored
from moetrain.archive.values import MOMENTS, read_through
from moetrain.checkpoint import store
from moetrain.errors import CheckpointError, DataError, MoetrainError

LARGEST_RECORD_FRAME = 4096
"""Bytes that torch.save puts around the values of an interval, at most; some 1,300 are usual."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool | None
    """None: not checked."""
    detail: str
    """What was found, or why it was not checked."""


@dataclass(frozen=True)
class _Patient:
    """A checkpoint as far as it can be read."""

    directory: Path
    manifest: store.Manifest | None
    stored: Stored | None
    expected: Expected | None

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("fp32", *MOMENTS) if self.manifest is None or self.manifest.has_moments else ("fp32",)


def examine(
    directory: Path,
    *,
    expect: Callable[[dict[str, Any]], Expected],
    retake: Callable[[store.Manifest], list[str]] | None = None,
) -> Iterator[Check]:
    """The checks of a checkpoint, one after another; it is whole when none has failed.

    Args:
        directory: of one checkpoint; it exists.
        expect: the settings of a run -> what its checkpoints must hold; raises MoetrainError for unusable settings.
        retake: what of the resume certificate does not hold; raises DataError where there is not the data for it.
            Asked only when all else has passed. None: it is not held.
    """
    failed = False
    for check in _examine(directory, expect=expect):
        failed = failed or check.passed is False
        yield check
    yield _certificate(directory, retake=retake, failed=failed)


def _examine(directory: Path, *, expect: Callable[[dict[str, Any]], Expected]) -> Iterator[Check]:
    manifest = None
    try:
        manifest = store.read_manifest(directory)
        store.check_name(directory, manifest)
        yield Check("manifest", True, f"step {manifest.step:,}, {manifest.tokens:,} tokens, format {manifest.format}")
    except CheckpointError as error:
        yield Check("manifest", False, str(error))
    yield _files(directory, manifest)

    stored = expected = None
    try:
        stored = Stored(directory)
        yield Check("index", True, f"{len(stored.tensors):,} tensors; nothing in it but the index's own classes")
    except CheckpointError as error:
        yield Check("index", False, str(error))
    if manifest is None:
        yield Check("settings", None, "the manifest holds them")
    else:
        try:
            expected = expect(manifest.run)
            yield Check("settings", True, f"a model of {expected.numel:,} parameters")
        except MoetrainError as error:
            yield Check("settings", False, f"those in the manifest are of no model: {error}")

    patient = _Patient(directory, manifest, stored, expected)
    for name, needed, check in _CHECKS:
        missing = [each for each in needed if getattr(patient, each) is None]
        if missing:
            yield Check(name, None, " and ".join(_WITHOUT[each] for each in missing))
        else:
            yield check(name, patient)
    yield from _contents(patient)


def _certificate(directory: Path, *, retake: Callable[[store.Manifest], list[str]] | None, failed: bool) -> Check:
    if failed:
        return Check("certificate", None, "only where nothing else has failed")
    manifest = store.read_manifest(directory)
    if manifest.certificate is None:
        return Check("certificate", None, "this checkpoint carries none")
    if retake is None:
        return Check("certificate", None, "held when the run goes on")
    try:
        problems = retake(manifest)
    except DataError as error:
        return Check("certificate", None, f"it needs the data of the run: {error}")
    return _verdict(
        "certificate", problems, "next batch, random numbers, probe loss and expert counts are as they were"
    )


def _files(directory: Path, manifest: store.Manifest | None) -> Check:
    if manifest is None:
        return Check("files", None, _WITHOUT["manifest"])
    problems = []
    for each in manifest.files:
        try:
            store.check_file(directory, each)
        except CheckpointError as error:
            problems.append(str(error))
    names = {each.name for each in manifest.files}
    if ".metadata" not in names:
        problems.append("the manifest does not name the index, .metadata")
    strangers = sorted({path.name for path in directory.iterdir()} - names - {store.MANIFEST})
    beside = f"; not of it: {_few(strangers)}" if strangers else ""
    good = f"{len(names)} files, {sum(each.size for each in manifest.files):,} bytes, as the manifest has them{beside}"
    return _verdict("files", problems, good)


def _tensors(name: str, patient: _Patient) -> Check:
    stored, expected = _both(patient)
    problems = list(_differences(stored, expected.tensors(("fp32",))))
    known = expected.tensors(("fp32", *MOMENTS))
    problems += [f"{each} is no tensor of this model" for each in stored.tensors if each not in known]
    return _verdict(name, problems, f"{len(expected.parameters):,} parameters, {len(expected.states):,} router states")


def _moments(name: str, patient: _Patient) -> Check:
    stored, expected = _both(patient)
    if "exp_avg" not in patient.kinds:
        left = [each for each in stored.tensors if each.endswith(MOMENTS)]
        if left:
            return Check(name, False, f"the manifest says there are none, but there is {_few(left)}")
        return Check(name, None, "written without them (reshard … moments=false): training cannot go on from it")
    wanted = {each: n for each, n in expected.tensors(MOMENTS).items() if not each.endswith("/state")}
    return _verdict(
        name, list(_differences(stored, wanted)), f"both of each of {len(expected.parameters):,} parameters"
    )


def _differences(stored: Stored, wanted: dict[str, int]) -> Iterator[str]:
    for name, numel in wanted.items():
        found = stored.tensors.get(name)
        if found is None:
            yield f"{name} is missing"
        elif found.numel != numel:
            yield f"{name} has {found.numel:,} elements, but must have {numel:,}"
        elif found.dtype != torch.float32 and not name.endswith("/state"):
            yield f"{name} is {found.dtype}, but must be torch.float32"


def _intervals(name: str, patient: _Patient) -> Check:
    assert patient.stored is not None
    tensors = patient.stored.tensors
    problems, records = [], []
    for each, tensor in tensors.items():
        problems += [f"no interval holds elements {b:,} to {e - 1:,} of {each}" for b, e in tensor.gaps()]
        problems += [f"several intervals, or none that fits, hold {b:,} to {e - 1:,} of {each}"
                     for b, e in tensor.overlaps()]  # fmt: skip
        records += [(piece.file, piece.position, piece.position + piece.length, each) for piece in tensor.pieces]
        for piece in tensor.pieces:
            frame = piece.length - piece.numel * tensor.dtype.itemsize
            if not 0 <= frame <= LARGEST_RECORD_FRAME:
                problems.append(f"{piece.length:,} bytes are stored for {piece.numel:,} elements of {each}")
    records.sort()
    problems += [f"{one[3]} and {two[3]} share bytes of {one[0]}" for one, two in pairwise(records)
                 if one[0] == two[0] and two[1] < one[2]]  # fmt: skip
    if patient.manifest is not None:
        sizes = {each.name: each.size for each in patient.manifest.files}
        problems += [f"{each} lies in {file}, which the manifest does not name" for file, _, _, each in records
                     if file not in sizes]  # fmt: skip
        problems += [f"{each} lies past the end of {file}" for file, _, end, each in records
                     if end > sizes.get(file, end)]  # fmt: skip
    return _verdict(name, problems, f"{len(records):,} intervals hold every element of {len(tensors):,} tensors once")


def _experts(name: str, patient: _Patient) -> Check:
    stored, expected = _both(patient)
    if not expected.experts:
        return Check(name, True, "a dense model has none")
    problems = []
    for parameter, number in expected.experts.items():
        each = math.prod(expected.parameters[parameter]) // number
        for kind in patient.kinds:
            tensor = stored.tensors.get(f"{parameter}/{kind}")
            missing = [(0, number * each)] if tensor is None else [*tensor.gaps(), (tensor.numel, number * each)]
            for word, holes in (("missing", missing), ("there twice", [] if tensor is None else tensor.overlaps())):
                ids = sorted({i for begin, end in holes for i in range(begin // each, min(number, -(-end // each)))})
                if ids:
                    problems.append(f"{parameter}/{kind}: expert {_few(map(str, ids))} is {word}, or part of it")
    layers = {parameter.partition(".experts.")[0] for parameter in expected.experts}
    return _verdict(name, problems, f"{len(layers)} blocks x {max(expected.experts.values())} experts, each once")


def _size(name: str, patient: _Patient) -> Check:
    stored, expected = _both(patient)
    planned = 4 * len(patient.kinds) * expected.numel
    states = sum(each.nbytes for full, each in stored.tensors.items() if full.endswith("/state"))
    held = sum(piece.numel * each.dtype.itemsize for each in stored.tensors.values() for piece in each.pieces)
    per = 4 * len(patient.kinds)
    sum_text = f"{per} bytes x {expected.numel:,} parameters + {states:,} of router state"
    problems = [] if held == planned + states else [f"{held:,} bytes of values, but {sum_text} = {planned + states:,}"]
    return _verdict(name, problems, f"{held:,} bytes of values: {sum_text}")


def _contents(patient: _Patient) -> Iterator[Check]:
    names = ("values", "moments alive", "distinct experts")
    stored, expected, manifest = patient.stored, patient.expected, patient.manifest
    if stored is None:
        yield from (Check(name, None, _WITHOUT["stored"]) for name in names)
        return
    step = None if manifest is None else manifest.step
    found = read_through(stored, experts=expected.experts if expected else {}, step=step)
    yield _verdict("values", found.unreadable + found.bad, "all finite, no second moment below 0")

    unread = f"{len(found.unreadable)} parameters cannot be read" if found.unreadable else ""
    alone = "" if "exp_avg" in patient.kinds else "written without moments"
    young = _WITHOUT["manifest"] if step is None else "" if step else "no step was taken"
    if manifest is not None and _fades_first(manifest.run):
        yield Check("moments alive", None, "with optim.beta2 so far below beta1 a second moment may fade away first")
    else:
        yield _unless(unread or alone or young, "moments alive", found.lost, "no moment was set to 0")
    young = "at step 0 experts may be copies of one (upcycling)" if step == 0 else ""
    unknown = _WITHOUT["expected"] if expected is None else "" if expected.experts else "a dense model has none"
    yield _unless(unread or unknown or young, "distinct experts", found.twins, "no two of a block are byte-equal")


def _fades_first(run: dict[str, Any]) -> bool:
    """Whether a second moment may be 0 where the first is not: else |m| <= c sqrt(v), by Cauchy and Schwarz."""
    optim = run.get("optim")
    beta1, beta2 = (optim.get(name) if isinstance(optim, dict) else None for name in ("beta1", "beta2"))
    return isinstance(beta1, float) and isinstance(beta2, float) and beta1**2 >= beta2


def _unless(reason: str, name: str, problems: list[str], good: str) -> Check:
    return Check(name, None, reason) if reason and not problems else _verdict(name, problems, good)


def _verdict(name: str, problems: list[str], good: str) -> Check:
    return Check(name, not problems, _few(problems, between="; ") if problems else good)


def _few(things: Iterable[str], *, between: str = ", ", most: int = 5) -> str:
    shown = list(things)
    return between.join(shown[:most]) + (f"{between}and {len(shown) - most:,} more" if len(shown) > most else "")


def _both(patient: _Patient) -> tuple[Stored, Expected]:
    assert patient.stored is not None
    assert patient.expected is not None
    return patient.stored, patient.expected


_WITHOUT = {
    "manifest": "the manifest cannot be read",
    "stored": "the index cannot be read",
    "expected": "the settings in the manifest say what must be there, and cannot be used",
}
_CHECKS: tuple[tuple[str, tuple[str, ...], Callable[[str, _Patient], Check]], ...] = (
    ("tensors", ("stored", "expected"), _tensors),
    ("moments", ("stored", "expected"), _moments),
    ("intervals", ("stored",), _intervals),
    ("experts", ("stored", "expected"), _experts),
    ("size", ("stored", "expected"), _size),
)
