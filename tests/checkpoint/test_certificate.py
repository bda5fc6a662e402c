"""What must be found again on resume, and what each difference is called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from moetrain.checkpoint import resume, store
from moetrain.checkpoint.certificate import Certificate, differences, probe_differences
from moetrain.errors import CheckpointError

HERE = {"world_size": 2, "dtype": "fp32", "device": "cpu"}
SAVED = Certificate(
    next_batch="aa", generator="bb", probe_loss=4.0, probe_counts=[[1000, 1000], [500, 1500]], taken_on=HERE
)


def test_what_is_as_it_was_has_no_difference():
    assert differences(SAVED, SAVED, exact=True) == []


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"next_batch": "cc"}, "the next batch has the digest cc, but had aa: the data, their order, the seed"),
        ({"generator": "dd"}, "the random generator of the next step has the digest dd, but had bb: the seed"),
        ({"probe_loss": 4.1}, "the probe loss is 4.1, but was 4.0"),
        ({"probe_loss": float("nan")}, "the probe loss is nan, but was 4.0"),
        (
            {"probe_counts": [[1000, 1000], [560, 1440]]},
            "in MoE layer 1 3.0% of the probe's token copies go to other experts, [560, 1440] instead of [500, 1500]",
        ),
        ({"probe_counts": [[1000, 1000]]}, "in MoE layer 0 100.0% of the probe's token copies"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_each_of_the_four_is_named_with_both_values(change, cause, exact):
    (told,) = differences(SAVED, replace(SAVED, **change), exact=exact)
    assert told.startswith(cause)


@pytest.mark.parametrize(
    ("loss", "counts", "dtype", "differ"),
    [
        (4.0003, [[1000, 1000], [500, 1500]], "fp32", False),
        (4.0005, [[1000, 1000], [500, 1500]], "fp32", True),
        (4.015, [[1000, 1000], [500, 1500]], "bf16", False),
        (4.025, [[1000, 1000], [500, 1500]], "bf16", True),
        (4.0, [[1000, 1000], [515, 1485]], "fp32", False),
        (4.0, [[1000, 1000], [525, 1475]], "fp32", True),
        (4.0, [[1000, 1000], [525, 1475]], "bf16", False),
    ],
)
def test_another_layout_may_round_and_the_same_may_not(loss, counts, dtype, differ):
    now = replace(SAVED, probe_loss=loss, probe_counts=counts, taken_on=HERE | {"dtype": dtype})
    assert bool(probe_differences(SAVED, now, exact=False)) == differ
    assert probe_differences(SAVED, now, exact=True)


def manifest(certificate: Certificate | None) -> store.Manifest:
    return store.Manifest(step=3, tokens=0, seed=0, world_size=2, expert_parallel=1, run={}, data={}, files=[],
                          certificate=certificate)  # fmt: skip


def _hold(rank: int, root: str) -> dict[str, Any]:
    told: dict[str, Any] = {}

    def hold(name: str, now: Certificate, *, saved: Certificate | None = SAVED, trust: bool = False) -> None:
        warnings: list[str] = []
        found = (store.step_directory(root, 3), manifest(saved))
        try:
            resume.hold_certificate(found, now, group=dist.group.WORLD, trust=trust, warn=warnings.append)
            told[name] = warnings
        except CheckpointError as error:
            told[name] = str(error)

    others_read_no_batch = replace(SAVED, next_batch="aa" if rank == 0 else "")
    last_bit = replace(others_read_no_batch, probe_loss=4.0000001)
    hold("same", others_read_no_batch)
    hold("a last bit", last_bit)
    hold("a last bit on another layout", replace(last_bit, taken_on=HERE | {"world_size": 4}))
    hold("a last bit on a GPU", replace(last_bit, taken_on=HERE | {"device": "cuda"}),
         saved=replace(SAVED, taken_on=HERE | {"device": "cuda"}))  # fmt: skip
    hold("rank 1 has another expert", replace(others_read_no_batch, probe_loss=4.0 + rank))
    hold("trusted", replace(others_read_no_batch, generator="dd"), trust=True)
    hold("none", SAVED, saved=None)
    return told


def test_every_rank_comes_to_the_same_answer(ranks, tmp_path):
    first, second = ranks(2, _hold, tmp_path)
    assert first["same"] == []
    assert first["a last bit on another layout"] == []
    assert first["a last bit on a GPU"] == []
    for name in ("a last bit", "rank 1 has another expert"):
        assert first[name] == second[name]
        assert "does not resume as it was saved" in first[name]
        assert "resume.trust=true" in first[name]
    assert "rank 1: the probe loss is 5.0, but was 4.0" in first["rank 1 has another expert"]
    assert "rank 1" not in first["a last bit"]
    assert "going on all the same (resume.trust)" in first["trusted"][0]
    assert "has no resume certificate" in first["none"][0]
    assert second["trusted"] == second["none"] == []
