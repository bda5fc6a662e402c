"""Saves beside the training: the copy is the stall, the rest another thread's; what went wrong is told once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint import saver as saver_module
from moetrain.checkpoint import state, store
from moetrain.checkpoint.saver import Saver, Snapshot
from moetrain.checkpoint.state import Fragment
from moetrain.errors import CheckpointError

KEEP_ALL = store.Retention(keep=99)


def fragments(rank: int, value: float) -> list[Fragment]:
    """Half of one tensor each, and another in bf16 that is all of one rank's."""
    found = [Fragment("a.w/fp32", torch.full((5000,), value + rank), rank * 5000, 10_000)]
    return [*found, Fragment("b/state", torch.full((7,), value, dtype=torch.bfloat16), 0, 7)] if rank == 0 else found


def manifest(step: int) -> store.Manifest:
    return store.Manifest(step=step, tokens=0, seed=0, world_size=2, expert_parallel=1, run={}, data={}, files=[])


def assert_saved(directory: Path, value: float) -> None:
    store.verify(directory)
    found = [Fragment("a.w/fp32", torch.zeros(10_000), 0, 10_000),
             Fragment("b/state", torch.zeros(7, dtype=torch.bfloat16), 0, 7)]  # fmt: skip
    state.load(directory, found, group=None)
    assert torch.equal(found[0].view, torch.cat([torch.full((5000,), value), torch.full((5000,), value + 1)]))
    assert torch.equal(found[1].view, torch.full((7,), value, dtype=torch.bfloat16))


class Gate:
    """Holds the writers of this process back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, save = threading.Event(), state.save

        def late(*arguments: Any, **named: Any) -> Path:
            assert self.opened.wait(30)
            return save(*arguments, **named)

        patch.setattr(saver_module.state, "save", late)


def new_saver(root: Path, *, asynchronous: bool = True) -> Saver:
    return Saver(root, group=dist.new_group(backend="gloo"), retention=KEEP_ALL, asynchronous=asynchronous)


def _overlap(rank: int, root: Path) -> None:
    saver = new_saver(root)
    live = fragments(rank, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        saver.begin(live, manifest=manifest(1))
        # training goes on: it overwrites what is being saved, and talks over groups of its own
        for fragment in live:
            fragment.view.fill_(-5.0)
        for _ in range(20):
            dist.all_reduce(torch.ones(3))
        assert saver.poll() is None
        assert not saver.has_failed()
        assert store.whole_checkpoints(root) == []
        with pytest.raises(AssertionError, match="was not waited for"):
            saver.begin(live, manifest=manifest(2))
        dist.barrier()
        gate.opened.set()
        outcome = saver.wait()
    assert outcome is not None
    assert (outcome.step, outcome.failure, outcome.warnings) == (1, None, [])
    assert saver.wait() is None, "told once"
    assert saver.poll() is None
    assert_saved(store.step_directory(root, 1), 1.0)
    live = fragments(rank, 3.0)
    saver.begin(live, manifest=manifest(2))
    deadline = time.monotonic() + 30
    while (outcome := saver.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert outcome.step == 2
    assert_saved(store.step_directory(root, 1), 1.0)
    assert_saved(store.step_directory(root, 2), 3.0)


def test_training_goes_on_while_a_checkpoint_of_the_moment_before_is_written(ranks, tmp_path):
    ranks(2, _overlap, tmp_path / "checkpoints")


def _in_turn(rank: int, root: Path) -> None:
    saver = new_saver(root, asynchronous=False)
    live = fragments(rank, 1.0)
    saver.begin(live, manifest=manifest(1))
    dist.barrier()
    assert_saved(store.step_directory(root, 1), 1.0)
    assert saver.wait() is not None


def test_without_asynchronous_it_is_on_the_disk_when_begin_returns(ranks, tmp_path):
    ranks(2, _in_turn, tmp_path / "checkpoints")


def _failures(rank: int, root: Path) -> list[str]:
    saver = new_saver(root)
    saver.begin(fragments(rank, 1.0), manifest=manifest(1))
    saver.wait()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(store, "commit", _full)
        saver.begin(fragments(rank, 2.0), manifest=manifest(2))
        outcome = saver.wait()
    assert outcome is not None
    assert isinstance(outcome.failure, CheckpointError)
    dist.barrier()
    assert [path.name for path in root.iterdir()] == ["step_00000001"], "nothing half-written is left on a full disk"
    dist.barrier()  # the next save may begin only when both have looked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "prune", _full)
        saver.begin(fragments(rank, 3.0), manifest=manifest(3))
        third = saver.wait()
    assert third is not None
    assert third.failure is None
    assert_saved(store.step_directory(root, 3), 3.0)
    return [str(outcome.failure), *third.warnings]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_write_is_told_on_every_rank_and_the_next_one_is_tried(ranks, tmp_path):
    first, second = ranks(2, _failures, tmp_path / "checkpoints")
    assert first[0] == second[0]
    assert "(rank 0: OSError: [Errno 28] No space left on device; " in first[0]
    assert first[1:] == ["old checkpoints could not be removed: [Errno 28] No space left on device"]
    assert second[1:] == []


def test_a_snapshot_takes_its_memory_once_and_again_only_for_another_shape():
    snapshot = Snapshot()
    live = [Fragment("a", torch.arange(100.0), 0, 100), Fragment("b", torch.arange(3).to(torch.bfloat16), 5, 9)]
    first = snapshot.take(live)
    places = [each.view.data_ptr() for each in first]
    for fragment, copy in zip(live, first, strict=True):
        assert (copy.name, copy.offset, copy.global_numel) == (fragment.name, fragment.offset, fragment.global_numel)
        assert torch.equal(copy.view, fragment.view)
        assert copy.view.dtype == fragment.view.dtype
        assert copy.view.data_ptr() != fragment.view.data_ptr()
        fragment.view.add_(1)
        assert not torch.equal(copy.view, fragment.view)
    again = snapshot.take(live)
    assert [each.view.data_ptr() for each in again] == places
    assert all(torch.equal(copy.view, fragment.view) for fragment, copy in zip(live, again, strict=True))
    longer = snapshot.take([Fragment("a", torch.arange(101.0), 0, 101)])
    assert torch.equal(longer[0].view, torch.arange(101.0))
