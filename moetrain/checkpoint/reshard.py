"""A checkpoint written again, as other files or without the optimizer's moments; no resume elsewhere needs it."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moetrain.checkpoint import store
from moetrain.checkpoint.stored import BLOCK, Stored
from moetrain.checkpoint.values import MOMENTS
from moetrain.errors import CheckpointError


def reshard(source: Path, root: Path, *, files: int, moments: bool) -> Path:
    """Write ``source`` once more, whole or not at all; in memory are a few blocks.

    Args:
        source: a checkpoint, which is held against its digests first.
        root: directory of checkpoints for the new one, of the same step.
        files: data files to write.
        moments: False leaves the optimizer's moments out; training cannot go on from the result.

    Returns:
        The directory of the new checkpoint.

    Raises:
        CheckpointError: ``source`` is not whole, ``root`` has one of this step, or there is no room to write.
    """
    manifest = store.verify(source)
    target = store.step_directory(root, manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} exists already: name another directory, or remove it first")
    stored = Stored(source)
    names = [name for name in stored.tensors if moments or not name.endswith(MOMENTS)]
    partial = store.open_partial(root, manifest.step)
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, thread_count=files)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as meant
            dcp.save({name: _Whole(stored, name) for name in names}, storage_writer=writer, no_dist=True)
        written = [store.digest_file(path) for path in [*sorted(partial.glob("*.distcp")), partial / ".metadata"]]
        has_moments = moments and manifest.has_moments
        changed = replace(manifest, files=written, has_moments=has_moments, world_size=1, expert_parallel=1)
        return store.commit(root, changed)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, CheckpointException)):
            free = shutil.disk_usage(root).free / 2**20
            raise CheckpointError(
                f"{target} could not be written ({error}); {free:,.1f} MiB are free there: make room or choose another "
                f"place; {source} is untouched"
            ) from error
        raise


class _Whole:
    """A stored tensor as torch.distributed.checkpoint writes it: in intervals, each read when its turn comes."""

    def __init__(self, stored: Stored, name: str) -> None:
        self._stored, self._name = stored, name
        self._numel = stored.tensors[name].numel

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self._stored.tensors[self._name].dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=torch.Size([self._numel])),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return list(self._chunks())

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._stored.read(self._name, index.offset[0], min(self._numel, index.offset[0] + BLOCK))

    def _chunks(self) -> Iterator[ChunkStorageMetadata]:
        for count in range(math.ceil(self._numel / BLOCK)):
            begin = count * BLOCK
            sizes = torch.Size([min(BLOCK, self._numel - begin)])
            yield ChunkStorageMetadata(offsets=torch.Size([begin]), sizes=sizes)
