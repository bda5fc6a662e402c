"""What is in a checkpoint, in a form that no layout shows through.

Every rank holds contiguous intervals of flattened global tensors (experts lead their tensor, so a rank's experts are
one interval, and so is a ZeRO share of them). A checkpoint stores those intervals under global names, through
torch.distributed.checkpoint; any other layout reads the intervals it needs, and asks no other rank for them. Names are
``PARAMETER/fp32``, ``PARAMETER/exp_avg`` and ``PARAMETER/exp_avg_sq``, and ``NAME/state`` for what routers keep beside
their parameters.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from moetrain.checkpoint import store
from moetrain.checkpoint.files import Span, digested_stream, on_storage_of_its_own, read_spans
from moetrain.errors import CheckpointError, FormatError

_FILES = 2
"""That a rank writes at once: a disk can be faster than what one core moves."""


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
    writer = _Writer(partial)
    state = {name: _Interval.of(each) for name, each in _by_name(fragments).items()}
    _agree(lambda: dcp.save(state, storage_writer=writer, process_group=group), group, root)
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, writer.digests, group=group)

    def commit() -> None:
        if dist.get_rank() == 0:
            files = [each for rank in digests for each in rank] + [store.digest_file(partial / ".metadata")]
            store.commit(root, replace(manifest, files=files))

    _agree(commit, group, root)
    return store.step_directory(root, manifest.step)


def load(directory: Path, fragments: Iterable[Fragment], *, group: dist.ProcessGroup | None) -> None:
    """Fill the views from a checkpoint of any layout. Every rank reads the intervals it needs, and nothing else.

    Args:
        group: all ranks, on a backend that moves host memory; None: this process alone reads.

    Raises:
        CheckpointError: on every rank; on one of them a tensor is missing, has another size, or cannot be read.
    """
    wanted = _by_name(fragments)
    failure = None
    try:
        index = _unpickle_index(directory / ".metadata")
        read_spans(span for each in wanted.values() for span in _spans(directory, index, each))
    except Exception as error:  # a damaged index raises whatever its bytes happen to say
        failure = _cause(error, rank=0 if group is None else dist.get_rank())
    if group is not None:
        failure = _first_failure(failure, group)
    if failure is None:
        return
    if any(name.endswith("/exp_avg") for name in wanted) and not store.read_manifest(directory).has_moments:
        raise CheckpointError(
            f"{directory} holds the weights alone (it was written by `moetrain checkpoint reshard … "
            "moments=false`): it can be evaluated and sampled from; train from the one it was made of"
        )
    raise CheckpointError(f"{directory} does not fit this model: {failure}")


def _spans(directory: Path, index: Metadata, wanted: Fragment) -> Iterator[Span]:
    """Where the values of a fragment lie."""
    saved = index.state_dict_metadata.get(wanted.name)
    if not isinstance(saved, TensorStorageMetadata):
        raise ValueError(f"it holds no {wanted.name}")
    if saved.size.numel() != wanted.global_numel:
        raise ValueError(
            f"{wanted.name} has {saved.size.numel():,} values there, but {wanted.global_numel:,} in the model"
        )
    begin, end, found = wanted.offset, wanted.offset + wanted.view.numel(), 0
    for chunk in saved.chunks:
        (offset,), (size,) = chunk.offsets, chunk.sizes
        first, last = max(begin, offset), min(end, offset + size)
        if first < last:
            place = index.storage_data[MetadataIndex(wanted.name, chunk.offsets)]
            yield Span(
                path=directory / place.relative_path, archive=(place.offset, place.length), first=first - offset,
                target=wanted.view.detach()[first - begin : last - begin], dtype=saved.properties.dtype,
            )  # fmt: skip
            found += last - first
    if found != wanted.view.numel():
        raise ValueError(f"of {wanted.name} it holds {found:,} of the {wanted.view.numel():,} values from {begin:,} on")


def read_index(directory: Path) -> Metadata:
    """What a checkpoint's index says: which interval of which tensor lies where.

    Raises:
        CheckpointError: it is missing, unreadable, or names what no checkpoint of ours holds; nothing of it is run.
    """
    path = directory / ".metadata"
    try:
        return _unpickle_index(path)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def newest_whole(root: Path, *, warn: Callable[[str], None]) -> tuple[Path, store.Manifest] | None:
    """The newest checkpoint whose files all match their digests; damaged ones are named through ``warn``."""
    for directory, manifest in newest_first(root, warn=warn):
        try:
            store.check_files(directory, manifest.files)
        except CheckpointError as error:
            warn(passed_over(directory, error))
        else:
            return directory, manifest
    return None


def newest_first(
    root: Path, *, warn: Callable[[str], None], accept: Callable[[store.Manifest], bool] = lambda manifest: True
) -> Iterator[tuple[Path, store.Manifest]]:
    """Checkpoints that may be whole, as their manifests say; whether they are shows ``store.check_files``.

    Args:
        warn: names those without a manifest that can be read.
        accept: which of them may be taken.

    Raises:
        FormatError: another version of moetrain wrote one: passed over, it would be lost to an older one.
    """
    for directory in reversed(store.whole_checkpoints(root)):
        try:
            manifest = store.read_manifest(directory)
            store.check_name(directory, manifest)
        except FormatError:
            raise
        except CheckpointError as error:
            warn(passed_over(directory, error))
        else:
            if accept(manifest):
                yield directory, manifest


def passed_over(directory: Path, error: CheckpointError) -> str:
    """What a user is told of a damaged checkpoint."""
    return f"checkpoint {directory.name} is damaged and passed over: {error}"


def _agree(action: Any, group: dist.ProcessGroup, root: Path) -> Any:
    """Run ``action`` on every rank; when it fails on one, raise on all, with that rank's cause."""
    result, failure = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        # now, before the half-written files are cleared away
        failure = f"{_cause(error, rank=dist.get_rank())}; {_free_space(root)}"
    failure = _first_failure(failure, group)
    if failure is not None:
        raise CheckpointError(
            f"the checkpoint could not be written to {root} ({failure}); earlier checkpoints are untouched: free "
            "space or choose another run_dir, then run the same command again"
        )
    return result


def _first_failure(own: str | None, group: dist.ProcessGroup) -> str | None:
    failures: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, own, group=group)
    return next((each for each in failures if each is not None), None)


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


def _by_name(fragments: Iterable[Fragment]) -> dict[str, Fragment]:
    held: dict[str, Fragment] = {}
    for fragment in fragments:
        assert fragment.name not in held, f"this rank holds two intervals of {fragment.name}"
        held[fragment.name] = fragment
    return held


class _Writer(dcp.FileSystemWriter):
    """Writes a rank's intervals into files of its own, digested on the way; the first rank adds the index."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, sync_files=False, overwrite=True)
        self.digests: list[store.FileDigest] = []  # of what was written: the results of write_data have no place for it

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shares: list[list[tuple[WriteItem, Tensor]]] = [[] for _ in range(_FILES)]
        sizes = [0] * _FILES
        for item, values in sorted(((each, planner.resolve_data(each)) for each in plan.items), key=_largest_first):
            smaller = sizes.index(min(sizes))
            shares[smaller].append((item, values))
            sizes[smaller] += values.nbytes
        names = [f"__{dist.get_rank()}_{number}.distcp" for number in range(_FILES)]
        if all(values.is_cpu for share in shares for _, values in share):
            with ThreadPoolExecutor(_FILES, "write") as pool:
                written = list(pool.map(self._write, names, shares))
        else:  # a thread whose device is not set would open a context on the first GPU
            written = list(map(self._write, names, shares))
        self.digests = [digest for digest, _ in written]
        done: Future[list[WriteResult]] = Future()
        done.set_result([each for _, results in written for each in results])
        return done

    def _write(self, name: str, share: list[tuple[WriteItem, Tensor]]) -> tuple[store.FileDigest, list[WriteResult]]:
        results = []
        # the digest covers every byte: torch's own sums would be a second one, for a fifth of the time
        with digested_stream(Path(self.path) / name) as stream, config.patch("save.compute_crc32", False):
            for item, values in share:
                begin = stream.size
                torch.save(values.cpu(), stream)
                place = _StorageInfo(relative_path=name, offset=begin, length=stream.size - begin)
                results.append(WriteResult(index=item.index, size_in_bytes=place.length, storage_data=place))
        return store.FileDigest(name=name, size=stream.size, xxh128=stream.digest()), results


def _largest_first(written: tuple[WriteItem, Tensor]) -> int:
    return -written[1].nbytes


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

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return on_storage_of_its_own(self.as_subclass(Tensor))


def _unpickle_index(path: Path) -> Metadata:
    metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}, not an index")
    return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "PosixPath" and module in ("pathlib", "pathlib._local"):
            return PosixPath  # Python 3.13 writes another module than all others
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # as Python 3.11.0 to 3.11.3 write a member of an enum
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which no checkpoint of moetrain holds")


def _memory_format(kind: Any, name: str) -> Any:
    if kind is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"the index asks for {name} of {kind}, which no checkpoint of moetrain does")
    return _MEM_FORMAT_ENCODING[name]


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
