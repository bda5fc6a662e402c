"""Saving while training goes on: the training thread copies in memory, another one writes.

    training   … step | copy | step   step   step … | wait, copy | step …
    writer                   | write, digest, agree, commit, prune, copy to the remote place |

The copy lies in host memory that is taken once and used by every save. There is at most one save in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint import remote, state, store
from moetrain.checkpoint.remote import Remote
from moetrain.checkpoint.state import Fragment
from moetrain.errors import CheckpointError

_ALIGNMENT = 64  # bytes; copies run faster between whole cache lines


class Snapshot:
    """Host copies of fragments, in one buffer for each dtype; pinned where the fragments lie on a GPU."""

    def __init__(self) -> None:
        self._shape: list[tuple[str, int, torch.dtype]] = []
        self._views: list[Tensor] = []

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The same fragments on copies of their views, valid until the next call. Waits for the device."""
        taken = list(fragments)
        shape = [(each.name, each.view.numel(), each.view.dtype) for each in taken]
        if shape != self._shape:
            self._shape, self._views = shape, _host_views([each.view for each in taken])
        copies = []
        for each, copy in zip(taken, self._views, strict=True):
            copy.copy_(each.view, non_blocking=True)
            copies.append(Fragment(each.name, copy, each.offset, each.global_numel))
        for device in {each.view.device for each in taken}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return copies


def _host_views(tensors: list[Tensor]) -> list[Tensor]:
    sizes: dict[torch.dtype, int] = {}
    places = []
    for tensor in tensors:
        begin = sizes.get(tensor.dtype, 0)
        step = _ALIGNMENT // tensor.element_size()
        places.append((tensor.dtype, begin, tensor.numel()))
        sizes[tensor.dtype] = begin + -(-tensor.numel() // step) * step
    pinned = any(tensor.is_cuda for tensor in tensors)
    buffers = {dtype: torch.empty(size, dtype=dtype, pin_memory=pinned) for dtype, size in sizes.items()}
    return [buffers[dtype].narrow(0, begin, numel) for dtype, begin, numel in places]


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    failure: CheckpointError | None
    """The same on every rank; None: it is committed."""
    warnings: list[str]
    """What went wrong beside it."""


class Saver:
    """Writes checkpoints of one run, one at a time; what became of each is told once, by ``wait`` or ``poll``.

    Args:
        root: directory of the run's checkpoints.
        group: all ranks, on a backend that moves host memory. In use while training goes on: nothing else may use it.
        retention: what stays.
        asynchronous: write beside the training, from a copy; else before ``begin`` returns, without one.
        remote: where copies go, in the same thread after the commit; None: nowhere.
    """

    def __init__(
        self,
        root: Path,
        *,
        group: dist.ProcessGroup,
        retention: store.Retention,
        asynchronous: bool,
        remote: Remote | None = None,
    ) -> None:
        self.asynchronous = asynchronous
        self._root, self._group, self._retention, self._remote = root, group, retention, remote
        self._snapshot = Snapshot() if asynchronous else None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future[Outcome] | None = None

    def begin(self, fragments: Iterable[Fragment], *, manifest: store.Manifest) -> None:
        """Save. Every rank calls it at the same step, after ``wait``."""
        assert self._in_flight is None, "the save before was not waited for"
        if self._snapshot is None:
            self._in_flight = Future()
            self._in_flight.set_result(self._write(list(fragments), manifest))
        else:
            self._in_flight = self._writer.submit(self._write, self._snapshot.take(fragments), manifest)

    def wait(self) -> Outcome | None:
        """How the save in flight ended; None: there is none that has not been told."""
        if self._in_flight is None:
            return None
        outcome, self._in_flight = self._in_flight.result(), None
        return outcome

    def poll(self) -> Outcome | None:
        """The same without waiting; None also while it is being written. Ranks may see it at different steps."""
        return self.wait() if self._in_flight is not None and self._in_flight.done() else None

    def has_failed(self) -> bool:
        """Whether a save has ended badly and has not been told yet. Ranks may see it at different steps."""
        flying = self._in_flight
        return flying is not None and flying.done() and flying.result().failure is not None

    def _write(self, fragments: list[Fragment], manifest: store.Manifest) -> Outcome:
        try:
            state.save(self._root, fragments, manifest=manifest, group=self._group)
        except CheckpointError as error:
            return Outcome(manifest.step, error, [])
        warnings = []
        if dist.get_rank(self._group) == 0:
            try:
                store.prune(self._root, self._retention)
            except OSError as error:
                # the new checkpoint is whole: an old one that will not go is no reason to stop
                warnings.append(f"old checkpoints could not be removed: {error}")
        if self._remote is not None:
            try:
                self._copy(self._remote)
            except CheckpointError as error:
                # here it is whole, and training can go on from it
                warnings.append(
                    f"step {manifest.step:,} is saved, but not all copies are; the next save tries again: {error}"
                )
        return Outcome(manifest.step, None, warnings)

    def _copy(self, there: Remote) -> None:
        """Carry every checkpoint that is missing there, each rank its share of the files, the manifest last."""

        def first(action: Callable[[], Any]) -> Any:
            return _on_all(lambda: action() if dist.get_rank(self._group) == 0 else None, self._group)[0]

        for directory in first(lambda: remote.missing(there, self._root, self._retention)):
            step = store.step_of(directory)
            first(lambda step=step: there.clear(step))
            _on_all(lambda directory=directory: there.upload(directory, self._share(directory)), self._group)
            first(lambda directory=directory: there.commit(directory))
        first(lambda: remote.prune(there, self._root, self._retention))

    def _share(self, directory: Path) -> list[store.FileDigest]:
        files = store.read_manifest(directory).files
        return store.share_of(files, rank=dist.get_rank(self._group), world_size=dist.get_world_size(self._group))


def _on_all(action: Callable[[], Any], group: dist.ProcessGroup) -> list[Any]:
    """What ``action`` returns on each rank; when it fails on one, raise on all, with that rank's cause."""
    own: tuple[Any, str]
    try:
        own = action(), ""
    except (CheckpointError, OSError) as error:
        own = None, str(error)
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, own, group=group)
    for rank, (_, failure) in enumerate(told):
        if failure:
            raise CheckpointError(f"rank {rank}: {failure}")
    return [result for result, _ in told]
