"""A checkpoint written by one process, an interval at a time; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from moetrain.checkpoint import store
from moetrain.errors import CheckpointError, ConfigError

FILE_ELEMENTS = 1 << 30
"""In one data file, about."""


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A directory to write in, beside ``out``: it gets that name, on the disk, when all went well, else it goes.

    Raises:
        ConfigError: ``out`` is there already.
    """
    if out.exists():
        raise ConfigError([f"out is {out}, but that exists already: name another directory, or remove it first"])
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            store.sync(path)
        os.rename(partial, out)
        store.sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Intervals:
    """Takes the intervals of a checkpoint's tensors and appends them to its data files.

    torch.distributed.checkpoint itself would keep every tensor of a file in memory until the file is done.

    Args:
        directory: where they go.
        sizes: elements of each tensor, by full name.
        dtypes: of those that are not fp32.
        files: data files to write, at most; each holds an interval at least.
    """

    def __init__(
        self, directory: Path, *, sizes: Mapping[str, int], dtypes: Mapping[str, torch.dtype] | None = None, files: int
    ) -> None:
        self._directory, self._sizes, self._files = directory, sizes, files
        self._dtypes = dict.fromkeys(sizes, torch.float32) | dict(dtypes or {})
        self._total = sum(size * self._dtypes[name].itemsize for name, size in sizes.items())
        self._done = 0
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in sizes}
        self._results: list[WriteResult] = []

    def write(self, name: str, begin: int, values: Tensor) -> None:
        """Elements of a tensor from ``begin`` on, 1-D."""
        assert values.dtype == self._dtypes[name], name
        # the number of the file follows from the bytes before it, so that the files are even
        path = self._directory / f"__0_{self._done * self._files // max(1, self._total)}.distcp"
        with path.open("ab") as file:
            position = file.tell()
            torch.save(values.contiguous().clone(), file)
            length = file.tell() - position
        offsets = torch.Size([begin])
        info = _StorageInfo(path.name, position, length)
        self._results.append(WriteResult(MetadataIndex(name, offsets), length, info))
        self._chunks[name].append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([values.numel()])))
        self._done += values.nbytes

    def finish(self) -> None:
        """Write the index; every element of every tensor must have come."""
        for name, size in self._sizes.items():
            given = sum(int(chunk.sizes[0]) for chunk in self._chunks[name])
            assert given == size, f"{given:,} of {size:,} elements of {name} were written"
        tensors = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=self._dtypes[name]),
                size=torch.Size([size]),
                chunks=sorted(self._chunks[name], key=lambda chunk: chunk.offsets[0]),
            )
            for name, size in self._sizes.items()
        }
        index = Metadata(state_dict_metadata=dict(tensors), planner_data={name: (name,) for name in tensors})
        FileSystemWriter(self._directory, sync_files=True).finish(index, [self._results])


def write_checkpoint(
    root: Path,
    manifest: store.Manifest,
    *,
    sizes: Mapping[str, int],
    fill: Callable[[Intervals], None],
    dtypes: Mapping[str, torch.dtype] | None = None,
    files: int | None = None,
) -> Path:
    """Write a checkpoint in one process.

    Args:
        root: directory of checkpoints for it.
        manifest: with ``files`` empty.
        sizes, dtypes: as ``Intervals``.
        files: data files, at most; None: one for each ``FILE_ELEMENTS``.
        fill: writes every interval.

    Returns:
        The directory of the checkpoint.

    Raises:
        CheckpointError: ``root`` has one of this step, or the disk would not take it.
    """
    target = store.step_directory(root, manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} exists already: name another directory, or remove it first")
    partial = store.open_partial(root, manifest.step)
    try:
        files = files or 1 + sum(sizes.values()) // FILE_ELEMENTS
        intervals = Intervals(partial, sizes=sizes, dtypes=dtypes, files=files)
        fill(intervals)
        intervals.finish()
        written = [store.digest_file(path) for path in [*sorted(partial.glob("*.distcp")), partial / ".metadata"]]
        return store.commit(root, replace(manifest, files=written, world_size=1, expert_parallel=1))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save tells of a full disk by the latter
            free = shutil.disk_usage(root).free / 2**20
            raise CheckpointError(
                f"{target} could not be written ({error}); {free:,.1f} MiB are free there: make room or choose another "
                "place; nothing else was touched"
            ) from error
        raise
