"""A checkpoint written again, as other files or without the optimizer's moments; no resume elsewhere needs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moetrain.archive.stored import Stored, blocks
from moetrain.archive.values import MOMENTS
from moetrain.archive.written import Intervals, write_checkpoint
from moetrain.checkpoint import store


def reshard(source: Path, root: Path, *, files: int, moments: bool) -> Path:
    """Write ``source`` once more, whole or not at all; in memory is a block of one tensor.

    Args:
        source: a checkpoint, which is held against its digests first.
        root: directory of checkpoints for the new one, of the same step.
        files: data files to write, at most; each holds an interval at least.
        moments: False leaves the optimizer's moments out; training cannot go on from the result.

    Returns:
        The directory of the new checkpoint.

    Raises:
        CheckpointError: ``source`` is not whole, ``root`` has one of this step, or it cannot be written.
    """
    manifest = store.verify(source)
    stored = Stored(source)
    kept = {name: each for name, each in stored.tensors.items() if moments or not name.endswith(MOMENTS)}

    def fill(intervals: Intervals) -> None:
        for name, each in kept.items():
            for begin, end in blocks(each.numel):
                intervals.write(name, begin, stored.read(name, begin, end))

    return write_checkpoint(
        root,
        replace(manifest, has_moments=moments and manifest.has_moments),
        sizes={name: each.numel for name, each in kept.items()},
        dtypes={name: each.dtype for name, each in kept.items()},
        fill=fill,
        files=files,
    )
