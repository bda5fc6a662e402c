"""What is in a checkpoint, in a form that no layout shows through.

Every rank holds contiguous intervals of flattened global tensors (experts lead their tensor, so a rank's experts are
one interval, and so is a ZeRO share of them). A checkpoint stores those intervals under global names, through
torch.distributed.checkpoint; any other layout reads the intervals it needs. Names are ``PARAMETER/fp32``,
``PARAMETER/exp_avg`` and ``PARAMETER/exp_avg_sq``, and ``NAME/state`` for what routers keep beside their parameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.futures import Future

from moetrain.checkpoint import store
from moetrain.errors import CheckpointError


@dataclass(frozen=True)
class Fragment:
    """A view of part of a global tensor, read by a save and filled by a load."""

    name: str
    """Global name, e.g. ``blocks.0.feed_forward.experts.w_in/exp_avg``."""
    view: Tensor
    """1-D, contiguous."""
    offset: int
    """Where the view begins in the flattened global tensor, elements."""
    global_numel: int
    """Elements of the whole tensor."""


def save(
    root: Path,
    fragments: Iterable[Fragment],
    *,
    manifest: store.Manifest,
    group: dist.ProcessGroup,
) -> Path:
    """Write a whole checkpoint, or none. Every rank calls it; all return, or all raise.

    Args:
        root: directory of the run's checkpoints.
        fragments: this rank's; together the ranks' fragments cover every tensor. Intervals that several ranks hold
            are written once.
        manifest: with ``files`` empty.
        group: all ranks, on a backend that moves host memory.

    Raises:
        CheckpointError: on every rank, when one could not write. The checkpoints before stay as they are.
    """
    try:
        return _save(root, fragments, manifest=manifest, group=group)
    except CheckpointError:
        if dist.get_rank() == 0:
            # a disk that is full of half a checkpoint would have no room for the next one
            shutil.rmtree(store.partial_directory(root, manifest.step), ignore_errors=True)
        raise


def _save(root: Path, fragments: Iterable[Fragment], *, manifest: store.Manifest, group: dist.ProcessGroup) -> Path:
    _agree(lambda: store.open_partial(root, manifest.step) if dist.get_rank() == 0 else None, group, root)
    partial = store.partial_directory(root, manifest.step)
    # nothing copied ahead: that would open, in a thread whose device is not set, a context on the first GPU
    writer = dcp.FileSystemWriter(partial, sync_files=True, overwrite=True, per_thread_copy_ahead=0)
    writer.fs = files = _DigestedFiles()
    state = _by_name(fragments)
    _agree(lambda: dcp.save(state, storage_writer=writer, process_group=group), group, root)
    digests: list[Any] = [None] * dist.get_world_size(group)
    own = [digest for digest in files.digests if digest.name.startswith(f"__{dist.get_rank()}_")]
    dist.all_gather_object(digests, own, group=group)

    def commit() -> None:
        if dist.get_rank() == 0:
            files = [each for rank in digests for each in rank] + [store.digest_file(partial / ".metadata")]
            store.commit(root, replace(manifest, files=files))

    _agree(commit, group, root)
    return store.step_directory(root, manifest.step)


def load(directory: Path, fragments: Iterable[Fragment], *, group: dist.ProcessGroup | None) -> None:
    """Fill the views from a checkpoint of any layout.

    Args:
        group: all ranks, on a backend that moves host memory; None: this process alone reads.

    Raises:
        CheckpointError: a tensor is missing or has another size.
    """
    state = _by_name(fragments)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for without a group
            dcp.load(state, storage_reader=_Reader(directory), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        rank = 0 if group is None else dist.get_rank()
        raise CheckpointError(f"{directory} does not fit this model: {_cause(error, rank=rank)}") from error


def newest_whole(root: Path, *, warn: Any) -> tuple[Path, store.Manifest] | None:
    """The newest checkpoint whose files all match their digests; damaged ones are named through ``warn``."""
    for directory in reversed(store.whole_checkpoints(root)):
        try:
            return directory, store.verify(directory)
        except CheckpointError as error:
            warn(f"checkpoint {directory.name} is damaged and passed over: {error}")
    return None


def _agree(action: Any, group: dist.ProcessGroup, root: Path) -> Any:
    """Run ``action`` on every rank; when it fails on one, raise on all, with that rank's cause."""
    result, failure = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        # now, before the half-written files are cleared away
        failure = f"{_cause(error, rank=dist.get_rank())}; {_free_space(root)}"
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    for message in failures:
        if message is not None:
            raise CheckpointError(
                f"the checkpoint could not be written to {root} ({message}); earlier checkpoints are untouched: free "
                "space or choose another run_dir, then run the same command again"
            )
    return result


def _free_space(root: Path) -> str:
    # the writers below report a full disk in words of their own, or as a short write: say what the disk says
    try:
        return f"{shutil.disk_usage(root).free / 2**20:,.1f} MiB are free on that disk"
    except OSError as error:
        return str(error)


def _cause(error: BaseException, *, rank: int) -> str:
    # torch.distributed.checkpoint gives every rank the failures of all: the first one is the cause
    failures = getattr(error, "failures", None)
    if failures:
        failed, (inner, _) = next(iter(failures.items()))
        return _cause(inner, rank=failed)
    return f"rank {rank}: {type(error).__name__}: {error}".strip(": ")


def _by_name(fragments: Iterable[Fragment]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for fragment in fragments:
        assert fragment.name not in state, f"this rank holds two intervals of {fragment.name}"
        state[fragment.name] = _Interval.of(fragment)
    return state


class _Interval(Tensor):
    """A 1-D tensor that tells torch.distributed.checkpoint which interval of a global tensor it is."""

    offset: int
    global_numel: int

    @staticmethod
    def of(fragment: Fragment) -> _Interval:
        interval = Tensor._make_subclass(_Interval, fragment.view.detach())
        interval.offset, interval.global_numel = fragment.offset, fragment.global_numel
        return interval

    def size(self, *dim: int) -> Any:
        whole = torch.Size([self.global_numel])
        return whole[dim[0]] if dim else whole

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.offset]), sizes=torch.Size([self.numel()]))

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self._chunk(),
            properties=TensorProperties.create_from_tensor(self.as_subclass(Tensor)),
            size=torch.Size([self.global_numel]),
        )
        index = MetadataIndex(name, torch.Size([self.offset]))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return _on_storage_of_its_own(self.as_subclass(Tensor))


def _on_storage_of_its_own(view: Tensor) -> Tensor:
    """The same memory, as a tensor that ends where its storage does.

    torch.save writes whole storages, and so torch.distributed.checkpoint makes copies of views into longer ones, all of
    them at once: as much memory again as the state.
    """
    if not view.is_cpu:
        return view
    return torch.from_numpy(view.view(torch.uint8).numpy()).view(view.dtype)


class _DigestedFiles(FileSystem):
    """Digests what is written on its way to the disk, so that nothing is read again."""

    def __init__(self) -> None:
        self.digests: list[store.FileDigest] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file, ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
            stream = _DigestedStream(file, beside)
            yield stream
        self.digests.append(store.FileDigest(name=Path(path).name, size=stream.size, sha256=stream.sha256.hexdigest()))


class _DigestedStream(io.RawIOBase):
    """An open file that keeps the digest of what goes through it; torch writes front to back and never seeks."""

    def __init__(self, file: Any, beside: ThreadPoolExecutor) -> None:
        super().__init__()
        self._file, self._beside = file, beside
        self.size, self.sha256 = 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        # both leave Python's lock to the training thread; a small piece is not worth the hand-over
        digested = self._beside.submit(self.sha256.update, data) if len(data) > 1 << 18 else self.sha256.update(data)
        try:
            self._file.write(data)
        finally:
            if digested is not None:
                digested.result()
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())


class _Reader(dcp.FileSystemReader):
    """Reads the index through an unpickler that can build the index's own classes and nothing else, and values straight
    into their place: the interval that is asked for and no more, and nothing of a tensor is unpickled."""

    _index: Metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        raw = (Path(self.path) / ".metadata").read_bytes()
        metadata: Metadata = _IndexUnpickler(io.BytesIO(raw)).load()
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._index = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (Path(self.path) / name).open("rb", buffering=0) as file:
                for item in sorted(items, key=lambda each: self.storage_data[each.storage_index].offset):
                    target = planner.resolve_tensor(item).detach()
                    self._read_into(target, file, item)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_into(self, target: Tensor, file: io.FileIO, item: ReadItem) -> None:
        saved = self._index.state_dict_metadata[item.storage_index.fqn]
        dtype = saved.properties.dtype
        is_in_place = target.is_cpu and target.is_contiguous() and target.dtype == dtype
        values = target if is_in_place else torch.empty(target.shape, dtype=dtype)
        place = self.storage_data[item.storage_index]
        # what torch.save wrote is a zip archive whose values lie in it uncompressed, in one piece
        archive = torch._C.PyTorchFileReader(_Window(file, place.offset, place.length))
        begin = archive.get_record_offset("data/0") + item.storage_offsets[0] * dtype.itemsize
        if begin + values.nbytes > place.length:
            raise ValueError(f"{file.name} ends before {item.storage_index.fqn} does")
        file.seek(place.offset + begin)
        rest = memoryview(values.view(torch.uint8).numpy())
        while rest:
            count = file.readinto(rest)
            if not count:
                raise ValueError(f"{file.name} ends before {item.storage_index.fqn} does")
            rest = rest[count:]
        if values is not target:
            target.copy_(values)


class _Window(io.RawIOBase):
    """Part of a file, read as if it were all of one."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = min(max(0, base + offset), self._length)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: self._length - self._at]) or 0
        self._at += count
        return count

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "PosixPath" and module in ("pathlib", "pathlib._local"):
            return PosixPath  # Python 3.13 writes another module than all others
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint of moetrain holds")


_INDEX_NAMES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
