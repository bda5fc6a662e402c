"""Stored tensors read by name, and two checkpoints held against each other; the plainer way is a load of everything."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_doctor import poke

from moetrain.archive import stored as stored_module
from moetrain.archive.stored import Piece, Stored, StoredTensor, blocks
from moetrain.archive.values import compare
from moetrain.checkpoint.state import Fragment, load
from moetrain.errors import CheckpointError

NAME = "blocks.1.feed_forward.experts.w_in/fp32"


def directory(runs: Path, run: str, step: int = 3) -> Path:
    return runs / run / "checkpoints" / f"step_{step:08d}"


def loaded(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as torch.distributed.checkpoint gives it back."""
    tensors = {name: torch.empty(each.numel, dtype=each.dtype) for name, each in Stored(checkpoint).tensors.items()}
    load(checkpoint, [Fragment(name, view, 0, view.numel()) for name, view in tensors.items()], group=None)
    return tensors


@pytest.mark.parametrize("run", ["ep2", "dp2"])
def test_every_part_of_every_tensor_is_what_a_load_gives(real_runs, run):
    checkpoint = directory(real_runs, run)
    stored = Stored(checkpoint)
    assert sum(len(each.pieces) > 1 for each in stored.tensors.values()) >= 6, "some lie in several files"
    generator = torch.Generator().manual_seed(1)
    for name, whole in loaded(checkpoint).items():
        assert torch.equal(stored.read(name, 0, len(whole)), whole), name
        for _ in range(5):
            begin, end = sorted(torch.randint(len(whole) + 1, (2,), generator=generator).tolist())
            assert torch.equal(stored.read(name, begin, end), whole[begin:end]), name


def test_what_no_interval_holds_cannot_be_read(real_runs):
    stored = Stored(directory(real_runs, "ep2"))
    with pytest.raises(CheckpointError, match=f"no interval holds element 8,192 of {NAME}"):
        stored.read(NAME, 8000, 8193)


def tensor(*pieces: tuple[int, int], numel: int = 100) -> StoredTensor:
    ordered = tuple(Piece(offset, size, "file", 0, 0) for offset, size in pieces)
    return StoredTensor(numel=numel, dtype=torch.float32, pieces=ordered)


@pytest.mark.parametrize(
    ("pieces", "gaps", "overlaps"),
    [
        ([(0, 100)], [], []),
        ([(0, 60), (60, 40)], [], []),
        ([], [(0, 100)], []),
        ([(10, 50), (70, 20)], [(0, 10), (60, 70), (90, 100)], []),
        ([(0, 60), (50, 50)], [], [(50, 60)]),
        ([(0, 100), (20, 10)], [], [(20, 30)]),
        ([(0, 100), (0, 100)], [], [(0, 100)]),
        ([(0, 110)], [], [(100, 110)]),
    ],
)
def test_gaps_and_overlaps_are_those_of_the_intervals(pieces, gaps, overlaps):
    found = tensor(*pieces)
    assert (found.gaps(), found.overlaps()) == (gaps, overlaps)
    held = [sum(begin <= at < begin + size for begin, size in pieces) for at in range(100)]
    assert {at for begin, end in found.gaps() for at in range(begin, end)} == {at for at in range(100) if not held[at]}


@pytest.mark.parametrize(("numel", "groups"), [(100, 1), (100, 4), (96, 8), (0, 1), (7, 7)])
def test_blocks_hold_everything_once_and_cross_no_expert(monkeypatch, numel, groups):
    monkeypatch.setattr(stored_module, "BLOCK", 9)
    found = list(blocks(numel, groups=groups))
    assert [at for begin, end in found for at in range(begin, end)] == list(range(numel))
    assert all(begin * groups // numel == (end - 1) * groups // numel for begin, end in found)


def test_a_checkpoint_equals_its_copy_bit_by_bit(real_runs):
    found = list(compare(Stored(directory(real_runs, "ep2")), Stored(directory(real_runs, "ep2"))))
    assert len(found) == 52
    assert all(each.equal and each.largest == 0 and not each.problem for each in found)


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_differences_are_those_of_the_whole_tensors_across_layouts(real_runs, monkeypatch, block):
    monkeypatch.setattr(stored_module, "BLOCK", block)
    one, two = directory(real_runs, "ep2"), directory(real_runs, "dp2")
    first, second = loaded(one), loaded(two)
    for each in compare(Stored(one), Stored(two)):
        apart = (first[each.name].double() - second[each.name].double()).abs().max().item()
        assert each.equal == torch.equal(first[each.name], second[each.name])
        assert each.largest == pytest.approx(apart, rel=1e-12)
        assert each.relative == pytest.approx(apart / first[each.name].abs().max().item(), rel=1e-12)


def test_a_nan_is_the_difference_and_two_zeros_of_other_sign_differ_by_nothing(real_runs):
    one, two = directory(real_runs, "ep2"), directory(real_runs, "ep2", 2)
    poke(one, "norm.weight/fp32", 0, torch.tensor([0.0]))
    poke(two, "norm.weight/fp32", 0, torch.cat([torch.tensor([-0.0]), Stored(one).read("norm.weight/fp32", 1, 32)]))
    poke(two, NAME, 4000, torch.tensor([float("nan")]))
    found = {each.name: each for each in compare(Stored(one), Stored(two))}
    assert (found["norm.weight/fp32"].equal, found["norm.weight/fp32"].largest) == (False, 0)
    assert math.isnan(found[NAME].largest)
