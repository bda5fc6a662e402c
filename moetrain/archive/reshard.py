"""A checkpoint written again, as other files or without the optimizer's moments; no resume elsewhere needs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from moetrain.archive.stored import BLOCK, Stored
from moetrain.archive.values import MOMENTS
from moetrain.checkpoint import store
from moetrain.errors import CheckpointError


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
    target = store.step_directory(root, manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} exists already: name another directory, or remove it first")
    stored = Stored(source)
    names = [name for name in stored.tensors if moments or not name.endswith(MOMENTS)]
    partial = store.open_partial(root, manifest.step)
    try:
        _write(partial, stored, names, files=files)
        written = [store.digest_file(path) for path in [*sorted(partial.glob("*.distcp")), partial / ".metadata"]]
        has_moments = moments and manifest.has_moments
        changed = replace(manifest, files=written, has_moments=has_moments, world_size=1, expert_parallel=1)
        return store.commit(root, changed)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save tells of a full disk by the latter
            free = shutil.disk_usage(root).free / 2**20
            raise CheckpointError(
                f"{target} could not be written ({error}); {free:,.1f} MiB are free there: make room or choose another "
                f"place; {source} is untouched"
            ) from error
        raise


def _write(partial: Path, stored: Stored, names: list[str], *, files: int) -> None:
    """As torch.distributed.checkpoint would, which keeps every tensor of a file in memory until the file is done."""
    results = []
    intervals = [(name, begin, end) for name in names for begin, end in _intervals(stored.tensors[name].numel)]
    total = sum(stored.tensors[name].nbytes for name in names)
    done = 0
    for name, begin, end in intervals:
        path = partial / f"__0_{done * files // total}.distcp"
        values = stored.read(name, begin, end)
        with path.open("ab") as file:
            position = file.tell()
            torch.save(values, file)
            length = file.tell() - position
        index = MetadataIndex(name, torch.Size([begin]))
        results.append(WriteResult(index, length, _StorageInfo(path.name, position, length)))
        done += values.nbytes
    writer = FileSystemWriter(partial, sync_files=True)
    writer.finish(_index(stored, names), [results])


def _intervals(numel: int) -> Iterator[tuple[int, int]]:
    yield from ((begin, min(begin + BLOCK, numel)) for begin in range(0, numel, BLOCK))


def _index(stored: Stored, names: list[str]) -> Metadata:
    tensors = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=stored.tensors[name].dtype),
            size=torch.Size([stored.tensors[name].numel]),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size([begin]), sizes=torch.Size([end - begin]))
                for begin, end in _intervals(stored.tensors[name].numel)
            ],
        )
        for name in names
    }
    return Metadata(state_dict_metadata=dict(tensors), planner_data={name: (name,) for name in names})
