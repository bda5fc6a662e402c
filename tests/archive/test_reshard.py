"""A checkpoint written again holds the same, and is written whole or not at all."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from moetrain.archive import stored as stored_module
from moetrain.archive.doctor import examine
from moetrain.archive.expected import expected_tensors
from moetrain.archive.reshard import reshard
from moetrain.archive.stored import Stored
from moetrain.archive.values import compare
from moetrain.checkpoint import store
from moetrain.checkpoint.state import Fragment, load
from moetrain.errors import CheckpointError


@pytest.fixture
def source(real_runs: Path) -> Path:
    return real_runs / "ep2" / "checkpoints" / "step_00000003"


def load_whole(directory: Path, names: list[str], *, source: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.empty_like(Stored(source).read(name, 0, Stored(source).tensors[name].numel)) for name in names}
    load(directory, [Fragment(name, view, 0, view.numel()) for name, view in found.items()], group=None)
    return found


@pytest.mark.parametrize("files", [1, 3, 1000])
@pytest.mark.parametrize("block", [1 << 22, 1000])
def test_the_same_tensors_lie_in_other_files(source, tmp_path, monkeypatch, files, block):
    monkeypatch.setattr(stored_module, "BLOCK", block)
    made = reshard(source, tmp_path / "new", files=files, moments=True)
    assert made == tmp_path / "new" / source.name
    assert all(each.equal for each in compare(Stored(source), Stored(made)))
    assert all(check.passed is not False for check in examine(made, expect=expected_tensors))
    data = [each for each in store.verify(made).files if each.name.endswith(".distcp")]
    # no file is empty, so there are no more than there are intervals
    assert len(data) == files if files < 1000 else 3 < len(data) < 1000
    sizes = [each.size for each in data]
    assert files != 3 or max(sizes) < 1.5 * min(sizes)
    before = load_whole(source, list(Stored(source).tensors), source=source)
    after = load_whole(made, list(before), source=source)
    assert all(torch.equal(after[name], before[name]) for name in before), "and torch's own reader finds the same"


def test_the_manifest_says_what_it_said_but_who_wrote_it(source, tmp_path):
    before, after = store.read_manifest(source), store.read_manifest(reshard(source, tmp_path, files=2, moments=True))
    assert (after.world_size, after.expert_parallel, after.has_moments) == (1, 1, True)
    assert (after.step, after.tokens, after.seed, after.run) == (before.step, before.tokens, before.seed, before.run)


def test_without_moments_weights_load_and_training_is_told_where_to_go_on(source, tmp_path):
    made = reshard(source, tmp_path, files=1, moments=False)
    weights = [name for name in Stored(source).tensors if not name.endswith(("exp_avg", "exp_avg_sq"))]
    found, before = load_whole(made, weights, source=source), load_whole(source, weights, source=source)
    assert all(torch.equal(found[name], before[name]) for name in weights)
    sizes = [sum(each.size for each in store.read_manifest(one).files) for one in (made, source)]
    assert sizes[0] < 0.34 * sizes[1]
    with pytest.raises(CheckpointError, match=r"holds the weights alone .*train from the one it was made of"):
        load_whole(made, list(Stored(source).tensors), source=source)
    again = store.read_manifest(reshard(made, tmp_path / "again", files=1, moments=True))
    assert not again.has_moments, "what is gone does not come back"


def test_a_damaged_source_is_refused_and_nothing_is_written(source, tmp_path):
    os.truncate(source / "__0_0.distcp", 1000)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has 1,000 bytes"):
        reshard(source, tmp_path / "new", files=1, moments=True)
    assert not (tmp_path / "new").exists()


def test_one_that_is_there_is_not_replaced(source, tmp_path):
    reshard(source, tmp_path, files=1, moments=True)
    with pytest.raises(CheckpointError, match="step_00000003 exists already"):
        reshard(source, tmp_path, files=2, moments=True)
    with pytest.raises(CheckpointError, match="exists already"):
        reshard(source, source.parent, files=2, moments=True)
    store.verify(source)


def test_a_disk_that_takes_no_more_leaves_nothing(source, tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .* MiB are free there: make room"):
            reshard(source, tmp_path / "new", files=1, moments=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list((tmp_path / "new").iterdir()) == []
    store.verify(source)
