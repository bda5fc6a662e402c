"""Checkpoints as directories: names, atomic commit, digests, newest, retention. No torch.

checkpoints/step_00002000/                    whole: renamed to this after every file is on disk and in the manifest
checkpoints/step_00002000.partial/            being written, or left by a crash; never read
checkpoints/step_00002000.replaced.partial/   whole too, while the same step, saved again, takes its place
checkpoints/step_00002000.pruned.partial/     being removed
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from moetrain.checkpoint.certificate import Certificate
from moetrain.config.freeze import freeze
from moetrain.config.identity import differences, is_fixed, unlike
from moetrain.config.schema import CheckpointConfig, RunConfig
from moetrain.errors import CheckpointError, FormatError

MANIFEST = "manifest.json"
FORMAT = 2
_NAME = re.compile(r"step_(\d{8,})(\.replaced\.partial)?")


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """One file of a checkpoint."""

    name: str
    size: int
    xxh128: str
    """XXH128 (128-bit XXH3): against damage, at the speed of memory. Against ill will no digest beside a file helps."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a whole checkpoint says of itself."""

    step: int
    """Finished optimizer steps."""
    tokens: int
    """Tokens seen in training."""
    seed: int
    """With the step, the position in the data and the state of every random generator."""
    world_size: int
    """Ranks that wrote it."""
    expert_parallel: int
    """Ranks that shared the experts."""
    run: dict[str, Any]
    """The settings of the run."""
    data: dict[str, str]
    """Digests of the token files and the tokenizer."""
    files: list[FileDigest]
    has_moments: bool = True
    """Whether the optimizer's moments are in it; without them it can be evaluated, not trained from."""
    held_out_loss: float | None = None
    """Of the evaluation at this very step; None: there was none."""
    certificate: Certificate | None = None
    """What a run that goes on from here must find again."""
    updates: int | None = None
    """Optimizer steps that were made. None: ``step`` of them."""
    watch: dict[str, Any] = field(default_factory=dict)
    """What the watch over the run must find again: batches left out, what losses are usual (``moetrain.watch``)."""
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay; one that any of the three asks for does."""

    keep: int
    """How many of the newest."""
    every_steps: int | None = None
    """Those whose step is a multiple of this; None: none for that reason."""
    best: int = 0
    """How many of those with the lowest held-out loss."""

    @classmethod
    def of(cls, config: CheckpointConfig) -> Retention:
        """What the settings of a run say."""
        return cls(keep=config.keep, every_steps=config.keep_every_steps, best=config.keep_best)


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def partial_directory(root: Path, step: int) -> Path:
    """Where it is written before it is whole."""
    return root / f"step_{step:08d}.partial"


def open_partial(root: Path, step: int) -> Path:
    """An empty directory to write into; what a crash left there is removed."""
    directory = partial_directory(root, step)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def digest_file(path: Path) -> FileDigest:
    """Size and digest of a file, which is on disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileDigest(name=path.name, size=path.stat().st_size, xxh128=_xxh128(path))


def commit(root: Path, manifest: Manifest) -> Path:
    """Turn the partial checkpoint of ``manifest.step`` into a whole one, by one rename."""
    partial, final = partial_directory(root, manifest.step), step_directory(root, manifest.step)
    with (partial / MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(partial)
    if final.exists():
        # the same step saved again, after a resume from an older one: out of the way by a rename, so that
        # no moment sees half a checkpoint under a whole one's name
        _rename_over(final, _with_suffix(final, ".replaced.partial"))
    os.rename(partial, final)
    sync(root)
    return final


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable or of another format.
    """
    path = directory / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return parse_manifest(text, path=str(path))


def parse_manifest(text: bytes, *, path: str) -> Manifest:
    """What the bytes of a manifest say.

    Args:
        path: where they come from, for the error.

    Raises:
        FormatError: another version of moetrain wrote them.
        CheckpointError: they are no manifest.
    """
    try:
        content = dict(json.loads(text.decode()))
        if content["format"] != FORMAT:
            raise FormatError(
                f"{path} has format {content['format']}, but this version of moetrain reads format {FORMAT}: use the "
                "version that wrote it, or begin another run"
            )
        files = [FileDigest(**each) for each in content.pop("files")]
        foreign = [each.name for each in files if each.name != Path(each.name).name or each.name in ("", MANIFEST)]
        if foreign:  # it may come from a store that others write to, and a path would lead out of the directory
            raise ValueError(f"{foreign[0]!r} is not the name of a file beside it")
        certificate = content.pop("certificate", None)
        return Manifest(files=files, certificate=certificate and Certificate(**certificate), **content)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def verify(directory: Path) -> Manifest:
    """Hold every file against its size and digest in the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, cut short, changed or unreadable.
    """
    manifest = read_manifest(directory)
    check_name(directory, manifest)
    check_files(directory, manifest.files)
    return manifest


def check_files(directory: Path, files: Iterable[FileDigest]) -> None:
    """Hold files against their sizes and digests, several at once: a disk can be faster than what one core moves.

    Raises:
        CheckpointError: naming the first file that is missing, cut short, changed or unreadable.
    """
    with ThreadPoolExecutor(4, "digest") as pool:
        checks = [pool.submit(check_file, directory, each) for each in files]
        try:
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)  # of what is damaged the rest need not be read


def share_of(files: Iterable[FileDigest], *, rank: int, world_size: int) -> list[FileDigest]:
    """The files that a rank wrote itself, and where fewer ranks run than wrote the checkpoint, some of the others'."""
    share = []
    for each in files:
        match = re.match(r"__(\d+)_", each.name)
        if (int(match[1]) if match else 0) % world_size == rank:
            share.append(each)
    return share


def check_name(directory: Path, manifest: Manifest) -> None:
    """Hold the name of a checkpoint's directory against the step in its manifest.

    Raises:
        CheckpointError: it is another step's.
    """
    if directory.name.partition(".")[0] != step_directory(directory.parent, manifest.step).name:
        raise CheckpointError(f"{directory / MANIFEST} is of step {manifest.step}, not of the directory's")


def foreign(manifest: Manifest, *, run: RunConfig, data: dict[str, str]) -> str:
    """Why a checkpoint is not one of this run; empty when it is.

    Args:
        data: digests of the token files and the tokenizer.
    """
    other = [name for name in data if manifest.data.get(name) != data[name]]
    if other:
        return f"was trained on other data: {', '.join(other)} has changed since"
    changed = differences(freeze(manifest.run), run)
    return "; ".join(f"has {name} {old!r}, the run {new!r}" for name, (old, new) in changed.items() if is_fixed(name))


def not_a_start(manifest: Manifest, *, run: RunConfig, tokenizer: str) -> list[str]:
    """Why a run cannot begin from the weights of a checkpoint, a sentence each.

    Args:
        tokenizer: fingerprint of the run's.
    """
    problems = unlike(freeze(manifest.run), run)
    if manifest.data.get("tokenizer", tokenizer) != tokenizer:
        problems.append("data.tokenizer is another than that of init.weights: set it to the tokenizer.json there")
    return problems


def check_file(directory: Path, expected: FileDigest, *, digest: bool = True) -> None:
    """Hold one file against its size and, unless told not to, its digest.

    Raises:
        CheckpointError: it is missing, cut short, changed or unreadable.
    """
    path = directory / expected.name
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected.size:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, but must have {expected.size:,}")
        if digest and _xxh128(path) != expected.xxh128:
            raise CheckpointError(f"{path} has changed: its xxh128 is not the one in {MANIFEST}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def whole_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, in the order of their steps; whether they are damaged shows only ``verify``."""
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _NAME.fullmatch(path.name)
        # sorted: a replaced one comes after the one in its place, and counts only where a crash left a gap
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found)]


def prune(root: Path, retention: Retention) -> None:
    """Remove the checkpoints that ``superfluous`` names, and what crashes left half-written. Called after a save."""
    for leftover in leftovers(root):
        shutil.rmtree(leftover, ignore_errors=True)
    remove(superfluous(root, retention))


def remove(checkpoints: Iterable[Path]) -> None:
    """Remove whole checkpoints."""
    for each in list(checkpoints):
        # off the list first, by one rename: a crash in the middle must not leave half of one that looks whole
        pruned = _with_suffix(each, ".pruned.partial")
        _rename_over(each, pruned)
        shutil.rmtree(pruned, ignore_errors=True)


def superfluous(root: Path, retention: Retention) -> list[Path]:
    """The checkpoints that need not stay."""
    whole = counted(root)
    going = going_steps(map(step_of, whole), retention, losses=held_out_losses(whole) if retention.best else {})
    return [path for path in whole if step_of(path) in going]


def counted(root: Path) -> list[Path]:
    """The checkpoints up to the one saved last, in the order of their steps.

    Steps beyond that stay and do not count: the run would have gone on from there, had they not been damaged. Counted
    as newest, they would push out the sound ones.
    """
    whole = whole_checkpoints(root)
    last_saved = max(range(len(whole)), key=lambda i: (_saved_at(whole[i]), i), default=0)
    return whole[: last_saved + 1]


def going_steps(steps: Iterable[int], retention: Retention, *, losses: Mapping[int, float]) -> set[int]:
    """Which of these steps need not stay.

    Args:
        losses: held-out loss of the steps that have one.
    """
    known = sorted(steps)
    # of two alike the newer: it has seen more
    best = sorted((step for step in known if step in losses), key=lambda step: (losses[step], -step))
    staying = {*known[-retention.keep :], *best[: retention.best]}
    if retention.every_steps:
        staying |= {step for step in known if step % retention.every_steps == 0}
    return set(known) - staying


def held_out_losses(whole: Iterable[Path]) -> dict[int, float]:
    """Held-out loss by step, of the checkpoints that have one; one that is damaged goes with its age."""
    losses = {}
    for path in whole:
        with contextlib.suppress(CheckpointError):
            loss = read_manifest(path).held_out_loss
            if loss is not None and loss == loss:
                losses[step_of(path)] = loss
    return losses


def leftovers(root: Path) -> list[Path]:
    """Directories that a crash left half-written or half-removed, or that a save writes at this moment."""
    whole = whole_checkpoints(root)
    return [path for path in sorted(root.glob("step_*.partial")) if path not in whole]


def step_of(directory: Path) -> int:
    """The step in the name of a checkpoint's directory."""
    match = _NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def _saved_at(directory: Path) -> int:
    path = directory / MANIFEST
    return path.stat().st_mtime_ns if path.is_file() else 0


def _with_suffix(directory: Path, suffix: str) -> Path:
    return directory.with_name(directory.name.partition(".")[0] + suffix)


def _rename_over(source: Path, target: Path) -> None:
    """Rename a directory, in the place of what a crash has left there."""
    shutil.rmtree(target, ignore_errors=True)
    os.rename(source, target)


def _xxh128(path: Path) -> str:
    digest = xxhash.xxh128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file or the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
