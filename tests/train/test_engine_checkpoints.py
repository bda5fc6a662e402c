"""What an engine saves and loads: on the same layout bit for bit, on any other one too, or to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import STEPS, Layout, assert_near, make_engine, micro_batch, rows, run_steps, whole_tensors

from moetrain.checkpoint import state as checkpoint_state
from moetrain.checkpoint.store import Manifest
from moetrain.config.checks import CHOICES
from moetrain.model.objective import negative_log_likelihood
from moetrain.train.engine import Engine

pytestmark = pytest.mark.slow


def save_rank(rank: int, root: str, layout: Layout):
    engine, groups = make_engine(rank, layout)
    run_steps(engine, rank, accumulation=1, first=0, last=2)
    manifest = Manifest(step=2, tokens=0, seed=1, world_size=dist.get_world_size(),
                        expert_parallel=layout.expert_parallel, run={}, data={}, files=[])  # fmt: skip
    checkpoint_state.save(Path(root), engine.fragments(), manifest=manifest, group=groups.control)
    losses, norms = run_steps(engine, rank, accumulation=1, first=2, last=STEPS)
    return {"losses": losses, "norms": norms, "tensors": whole_tensors(engine)}


def resume_rank(rank: int, root: str, layouts: list[Layout]):
    results = []
    for layout in layouts:
        engine, groups = make_engine(rank, layout)
        # trained on other data first: nothing of what was there before the load may be left
        run_steps(engine, rank, accumulation=1, first=7, last=8)
        checkpoint_state.load(Path(root) / "step_00000002", engine.fragments(), group=groups.control)
        engine.loaded(updates=2)
        losses, norms = run_steps(engine, rank, accumulation=1, first=2, last=STEPS)
        results.append({"losses": losses, "norms": norms, "tensors": whole_tensors(engine)})
    return results


def test_a_resumed_engine_goes_on_as_the_unbroken_one_on_the_same_and_on_other_layouts(ranks, tmp_path):
    root, saved = str(tmp_path / "checkpoints"), Layout(expert_parallel=2)
    unbroken = ranks(2, save_rank, root, saved)[0]
    same, *others = ranks(2, resume_rank, root, [saved, Layout(stage=0), Layout(expert_parallel=2, stage=2)])[0]
    assert same["losses"] == unbroken["losses"]
    assert same["norms"] == unbroken["norms"]
    assert all(torch.equal(same["tensors"][name], tensor) for name, tensor in unbroken["tensors"].items())
    others += ranks(4, resume_rank, root, [Layout(expert_parallel=4), Layout(expert_parallel=2, stage=2)])[0]
    for other in others:
        torch.testing.assert_close(other["losses"], unbroken["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(other["norms"], unbroken["norms"], rtol=1e-5, atol=0)
        assert_near(other["tensors"], unbroken["tensors"], what="another layout")


def save_and_resume_rank(rank: int, root: str, layouts: list[Layout]):
    return [
        {"unbroken": save_rank(rank, f"{root}/{i}", layout), "resumed": resume_rank(rank, f"{root}/{i}", [layout])[0]}
        for i, layout in enumerate(layouts)
    ]


def test_a_resumed_engine_goes_on_with_the_biases_that_no_optimizer_holds(ranks, tmp_path):
    layouts = [Layout(expert_parallel=2, dtype=dtype, model="loss_free") for dtype in ("fp32", "bf16")]
    for found in ranks(2, save_and_resume_rank, str(tmp_path), layouts)[0]:
        unbroken, resumed = found["unbroken"], found["resumed"]
        assert resumed["losses"] == unbroken["losses"]
        assert all(torch.equal(resumed["tensors"][name], tensor) for name, tensor in unbroken["tensors"].items())
        biases = [tensor for name, tensor in resumed["tensors"].items() if name.endswith("bias_E/state")]
        assert len(biases) == 2
        for bias in biases:
            steps = bias / 0.02
            assert steps.abs().max() > 1
            # whole steps: in bf16 they would be rounded
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


SHARDED = [Layout(expert_parallel=ep, stage=stage) for ep in (1, 2, 4) for stage in CHOICES["parallel.zero_stage"]]


def reshard_rank(rank: int, root: str):
    """Save on every layout, load each of the saved on each layout: (from, to) -> names of the tensors that differ."""
    engines, saved = [], []
    for number, layout in enumerate(SHARDED):
        engine, groups = make_engine(rank, layout)
        # each trained on data of its own: no two have equal values
        run_steps(engine, rank, accumulation=1, first=10 * number, last=10 * number + 1)
        manifest = Manifest(step=number, tokens=0, seed=1, world_size=4, expert_parallel=layout.expert_parallel, run={},
                            data={}, files=[])  # fmt: skip
        checkpoint_state.save(Path(root), engine.fragments(), manifest=manifest, group=groups.control)
        engines.append((engine, groups))
        saved.append(whole_tensors(engine))
    differ = {}
    for target, (engine, groups) in enumerate(engines):
        for source, expected in enumerate(saved):
            checkpoint_state.load(Path(root) / f"step_{source:08d}", engine.fragments(), group=groups.control)
            engine.loaded(updates=1)
            found = whole_tensors(engine)
            assert found.keys() == expected.keys()
            differ[f"{SHARDED[source]} to {SHARDED[target]}"] = [
                name for name, tensor in expected.items() if not torch.equal(found[name], tensor)
            ]
    alike = [name for name, tensor in saved[0].items() if torch.equal(tensor, saved[1][name])]
    return {"differ": differ, "alike": alike}


def test_every_layout_loads_bit_for_bit_what_any_other_saved(ranks, tmp_path):
    for answer in ranks(4, reshard_rank, str(tmp_path / "checkpoints")):
        assert len(answer["differ"]) == len(SHARDED) ** 2
        assert {pair: names for pair, names in answer["differ"].items() if names} == {}
        assert answer["alike"] == [], "each has values of its own, so a load that does nothing shows"


def held_out_loss(engine: Engine, rank: int) -> float:
    """As the evaluation does it: the model called by itself."""
    own = rows(99).view(dist.get_world_size(), -1, 17)[rank]
    engine.gpt.eval()
    summed, _ = negative_log_likelihood(engine.gpt, micro_batch(own))
    engine.gpt.train()
    dist.all_reduce(summed)
    return summed.item()


def there_and_back_rank(rank: int, root: str, there: Layout, elsewhere: Layout):
    """Save, load on another layout, save there, load on the first again; both ends go on from step 2."""
    first, groups = make_engine(rank, there)
    run_steps(first, rank, accumulation=1, first=0, last=2)
    found = {"saved": whole_tensors(first), "loss": held_out_loss(first, rank)}
    engine = first
    for name, layout in (("elsewhere", elsewhere), ("back", there)):
        directory = f"{root}/{name}"
        manifest = Manifest(step=2, tokens=0, seed=1, world_size=dist.get_world_size(), run={}, data={}, files=[],
                            expert_parallel=layout.expert_parallel)  # fmt: skip
        checkpoint_state.save(Path(directory), engine.fragments(), manifest=manifest, group=groups.control)
        engine, groups = make_engine(rank, layout)
        run_steps(engine, rank, accumulation=1, first=7, last=8)
        checkpoint_state.load(Path(directory) / "step_00000002", engine.fragments(), group=groups.control)
        engine.loaded(updates=2)
        found |= {name: whole_tensors(engine), f"{name} loss": held_out_loss(engine, rank)}
    # an evaluation in between must leave no trace in the training
    run_steps(first, rank, accumulation=1, first=2, last=3)
    held_out_loss(first, rank)
    run_steps(first, rank, accumulation=1, first=3, last=STEPS)
    run_steps(engine, rank, accumulation=1, first=2, last=STEPS)
    return found | {"unbroken": whole_tensors(first), "resumed": whole_tensors(engine)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


THERE_AND_ELSEWHERE = [
    (Layout(stage=3, expert_parallel=2), Layout()),
    (Layout(stage=3, expert_parallel=2, dtype="bf16", model="loss_free"),
     Layout(stage=2, dtype="bf16", model="loss_free")),
    (Layout(stage=1, expert_parallel=2, offload=True, dtype="bf16"), Layout(stage=3, offload=True, dtype="bf16")),
]  # fmt: skip


def every_there_and_back_rank(rank: int, root: str):
    return [
        there_and_back_rank(rank, f"{root}/{i}", there, elsewhere)
        for i, (there, elsewhere) in enumerate(THERE_AND_ELSEWHERE)
    ]


def test_a_checkpoint_goes_to_another_layout_and_back_bit_for_bit(ranks, tmp_path):
    answers = ranks(2, every_there_and_back_rank, str(tmp_path))[0]
    for (there, _), found in zip(THERE_AND_ELSEWHERE, answers, strict=True):
        assert_equal(found["elsewhere"], found["saved"])
        assert_equal(found["back"], found["saved"])
        assert_equal(found["resumed"], found["unbroken"])
        assert found["back loss"] == found["loss"]
        assert found["elsewhere loss"] == pytest.approx(found["loss"], rel=1e-6 if there.dtype == "fp32" else 2e-3)
