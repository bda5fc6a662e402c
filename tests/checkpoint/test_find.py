"""From which checkpoint a run goes on: all ranks read, and all come to the same one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import real_checkpoints
import torch
import torch.distributed as dist

from moetrain.checkpoint import resume, store
from moetrain.checkpoint.state import Fragment, save
from moetrain.config.freeze import to_dict
from moetrain.errors import CheckpointError

STEPS = (1, 2, 3)


def _write(rank: int, root: Path) -> None:
    run = to_dict(real_checkpoints.settings())
    for step in STEPS:
        manifest = store.Manifest(
            step=step, tokens=0, seed=0, world_size=2, expert_parallel=1, run=run, files=[],
            data={"text": "of the corpus"},
        )  # fmt: skip
        own = Fragment("a.w/fp32", torch.full((100,), float(rank)), 100 * rank, 200)
        save(root, [own], manifest=manifest, group=dist.group.WORLD)


def _find(rank: int, root: Path) -> tuple[str, list[str], list[str]]:
    read: list[str] = []
    warnings: list[str] = []
    digest = store._xxh128

    def noting(path: Path) -> str:
        read.append(f"{path.parent.name}/{path.name}")
        return digest(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_xxh128", noting)
        found = resume.find(
            root,
            run=real_checkpoints.settings(),
            data={"text": "of the corpus"},
            group=dist.group.WORLD,
            warn=warnings.append,
        )
    return found[0].name if found else "", warnings, sorted(read)


@pytest.mark.parametrize("damaged", [None, "__0_0.distcp", "__1_0.distcp", ".metadata", "manifest.json"])
def test_damage_that_any_rank_sees_is_told_once_and_all_take_the_one_before(ranks: Any, tmp_path: Path, damaged: Any):
    root = tmp_path / "checkpoints"
    ranks(2, _write, root)
    if damaged is not None:
        path = store.step_directory(root, 3) / damaged
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    (first, told, _), (second, told_elsewhere, _) = ranks(2, _find, root)
    assert first == second == ("step_00000003" if damaged is None else "step_00000002")
    assert told_elsewhere == []
    if damaged is None:
        assert told == []
    else:
        (warning,) = told
        assert warning.startswith("checkpoint step_00000003 is damaged and passed over: ")
        assert damaged in warning


def test_the_ranks_share_the_reading(ranks: Any, tmp_path: Path):
    root = tmp_path / "checkpoints"
    ranks(2, _write, root)
    (_, _, first), (_, _, second) = ranks(2, _find, root)
    files = sorted(f"step_00000003/{name}" for name in os.listdir(store.step_directory(root, 3)))
    assert sorted(first + second) == [each for each in files if not each.endswith(store.MANIFEST)]
    assert second == ["step_00000003/__1_0.distcp", "step_00000003/__1_1.distcp"], "what it wrote, and loads next"


def _find_below(rank: int, places: list[Path]) -> str:
    os.chdir(places[rank])
    with pytest.raises(CheckpointError) as told:
        _find(rank, Path("checkpoints"))
    return str(told.value)


def test_a_rank_that_does_not_see_the_checkpoint_is_no_damage(ranks: Any, tmp_path: Path):
    """As on a node where the shared disk is not mounted: to pass all checkpoints over would begin the run anew."""
    ranks(2, _write, tmp_path / "shared" / "checkpoints")
    (tmp_path / "local").mkdir()
    first, second = ranks(2, _find_below, [tmp_path / "shared", tmp_path / "local"])
    assert first == second
    assert first.startswith("rank 1 does not find checkpoints/step_00000003, which the first rank reads: run_dir must")


def test_where_all_are_damaged_there_is_none(ranks: Any, tmp_path: Path):
    root = tmp_path / "checkpoints"
    ranks(2, _write, root)
    for step in STEPS:
        os.truncate(store.step_directory(root, step) / "__1_0.distcp", 10)
    (first, told, _), (second, _, _) = ranks(2, _find, root)
    assert first == second == ""
    assert [each.split()[1] for each in told] == ["step_00000003", "step_00000002", "step_00000001"]


def _find_none(rank: int, root: Path) -> str:
    with pytest.raises(CheckpointError) as told:
        _find(rank, root)
    return str(told.value)


def test_the_checkpoint_of_another_version_is_no_damage(ranks: Any, tmp_path: Path):
    """To pass it over would go on from an older one, or begin the run anew."""
    root = tmp_path / "checkpoints"
    ranks(2, _write, root)
    path = store.step_directory(root, 3) / store.MANIFEST
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    first, second = ranks(2, _find_none, root)
    assert first == second
    assert first.startswith(f"{path} has format 1, but this version of moetrain reads format 2: use the version that")
