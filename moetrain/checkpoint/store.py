"""Checkpoints as directories: names, atomic commit, digests, newest, retention. No torch.

    checkpoints/step_00002000.partial/   being written, or left by a crash; never read
    checkpoints/step_00002000/           whole: the rename happens after every file is on disk and in the manifest
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """One file of a checkpoint."""

    name: str
    size: int
    sha256: str


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
    files: list[FileDigest]
    format: int = FORMAT


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
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest_310(file)
    return FileDigest(name=path.name, size=path.stat().st_size, sha256=digest.hexdigest())


def commit(root: Path, manifest: Manifest) -> Path:
    """Turn the partial checkpoint of ``manifest.step`` into a whole one, by one rename."""
    partial, final = partial_directory(root, manifest.step), step_directory(root, manifest.step)
    with (partial / MANIFEST).open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(partial)
    if final.exists():
        # the same step saved again, after a resume from an older one: out of the way by a rename, so that
        # no moment sees half a checkpoint under a whole one's name
        os.rename(final, final.with_suffix(".replaced.partial"))
    os.rename(partial, final)
    _sync_directory(root)
    return final


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, unreadable or of another format.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
        files = [FileDigest(**each) for each in content.pop("files")]
        manifest = Manifest(files=files, **content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.format}, but this version reads format {FORMAT}")
    return manifest


def verify(directory: Path) -> Manifest:
    """Hold every file against its size and digest in the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or changed.
    """
    manifest = read_manifest(directory)
    for expected in manifest.files:
        path = directory / expected.name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != expected.size:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, but must have {expected.size:,}")
        if digest_file(path).sha256 != expected.sha256:
            raise CheckpointError(f"{path} has changed: its sha256 is not the one in {MANIFEST}")
    return manifest


def whole_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = {
        int(match[1]): path
        for path in root.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    }
    return [found[step] for step in sorted(found)]


def prune(root: Path, *, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what crashes left half-written."""
    for old in whole_checkpoints(root)[:-keep]:
        # off the list first, by one rename: a crash in the middle must not leave half of one that looks whole
        os.rename(old, old.with_suffix(".pruned.partial"))
    for leftover in root.glob("step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def total_size(files: Iterable[FileDigest]) -> int:
    """Bytes."""
    return sum(file.size for file in files)


def _digest_310(file: Any) -> Any:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
