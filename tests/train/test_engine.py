"""The engine against a plain PyTorch loop: same losses, norms, weights and moments on every layout.

The loop sees the whole batch at once, whatever the number of micro-batches: the routers' losses may not depend on it.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engines import LR, STEPS, Layout, assert_near, make_engine, micro_batch, plain_loop, rows, run_steps, whole_tensors

from moetrain.train.engine import Engine

pytestmark = pytest.mark.slow


def train_rank(rank: int, layouts: list[Layout]):
    """Every layout in turn: starting processes costs more than training these models."""
    results = []
    for layout in layouts:
        engine, _ = make_engine(rank, layout)
        losses, norms = run_steps(engine, rank, accumulation=layout.accumulation, first=0, last=STEPS)
        results.append({"losses": losses, "norms": norms, "tensors": whole_tensors(engine)})
    built = [str(path) for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*.so")]
    return {"results": results, "built": built, "compiler": "torch._inductor.compile_fx" in sys.modules}


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [Layout(), Layout(stage=0, accumulation=4), Layout(stage=3, accumulation=2)]),
        (2, [Layout(expert_parallel=2, stage=0), Layout(expert_parallel=2, accumulation=2), Layout(clip=0.0),
             Layout(expert_parallel=2, stage=2, accumulation=2), Layout(expert_parallel=2, stage=0, accumulation=2),
             Layout(expert_parallel=2, accumulation=2, model="loss_free"), Layout(stage=0, model="loss_free")]),
        (2, [Layout(stage=3), Layout(stage=3, expert_parallel=2, accumulation=2),
             Layout(stage=3, expert_parallel=2, accumulation=2, model="loss_free"), Layout(stage=3, model="untied"),
             Layout(stage=3, expert_parallel=2, kept_whole=100_000, clip=0.0)]),
        (2, [*(Layout(stage=stage, expert_parallel=2, accumulation=2, offload=True) for stage in (1, 2, 3)),
             Layout(stage=2, offload=True),
             *(Layout(stage=stage, expert_parallel=2, accumulation=2, recompute=recompute)
               for stage in (1, 3) for recompute in ("selective", "full"))]),
        (4, [Layout(expert_parallel=2, stage=2), Layout(expert_parallel=4, accumulation=2, node_size=2),
             Layout(expert_parallel=2, stage=0), Layout(stage=3, expert_parallel=2),
             Layout(stage=3, expert_parallel=4, accumulation=2)]),
    ],
)  # fmt: skip
def test_every_layout_trains_as_a_plain_loop_does(ranks, world_size, layouts):
    answer = ranks(world_size, train_rank, layouts, fresh=True)[0]
    for layout, found in zip(layouts, answer["results"], strict=True):
        expected = plain_loop(clip=layout.clip, model=layout.model)
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
        assert found["tensors"].keys() == expected["tensors"].keys()
        assert_near(found["tensors"], expected["tensors"], what=str(layout))
        if layout.model == "loss_free":
            biases = [tensor for name, tensor in found["tensors"].items() if name.endswith("bias_E/state")]
            assert len(biases) == 2
            assert all(tensor.abs().max() > 0.03 for tensor in biases), "the load was skewed, and the biases moved"
    assert answer["built"] == [], "the engine compiled something; a lock left by a killed build would hang later runs"
    assert not answer["compiler"], "the engine imported torch's compiler, which takes as long as all else at a start"


def test_bf16_keeps_masters_in_float32_and_stays_near_the_plain_loop(ranks):
    found = ranks(2, train_rank, [Layout(expert_parallel=2, dtype="bf16")])[0]["results"][0]
    expected = plain_loop()
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=5e-3, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=3e-2, atol=0)
    masters = [tensor for name, tensor in found["tensors"].items() if name.endswith("/fp32")]
    assert all(tensor.dtype == torch.float32 for tensor in masters)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in masters)


def skip_rank(rank: int, layouts: list[Layout]):
    """Steps 0 to 3, the same without step 1 and with a bad step 1: what each leaves behind."""
    answers = []
    for layout in layouts:
        ways = {}
        for way in ("left out", "a loss that is not finite", "not kept"):
            engine, _ = make_engine(rank, layout)
            run_steps(engine, rank, accumulation=layout.accumulation, first=0, last=1)
            before = {fragment.name: fragment.view.clone() for fragment in engine.fragments()}
            norm = 0.0 if way == "left out" else bad_step(engine, rank, layout, way)
            unchanged = all(torch.equal(each.view, before[each.name]) for each in engine.fragments())
            losses, norms = run_steps(engine, rank, accumulation=layout.accumulation, first=2, last=4)
            own = {fragment.name: fragment.view.clone() for fragment in engine.fragments()}
            ways[way] = {"bad norm": norm, "unchanged": unchanged, "losses": losses, "norms": norms, "tensors": own}
        answers.append(ways)
    return answers


def bad_step(engine: Engine, rank: int, layout: Layout, way: str) -> float:
    """On every rank the last micro-batch is not kept, or on rank 1 alone its loss is not finite."""
    own = rows(1).view(layout.accumulation, dist.get_world_size(), -1, 17)[:, rank]
    *others, last = [micro_batch(micro) for micro in own]
    for each in others:
        engine.forward_backward(each)
    if way == "not kept":
        engine.forward_backward(last, keep=lambda losses: bool(losses.language < 0))
    else:
        engine.forward_backward(replace(last, counted=0.0 if rank == 1 else None))  # divided by nothing
    return engine.step(LR)


def test_a_step_that_is_not_made_leaves_no_trace_on_any_layout(ranks):
    """What follows is bit for bit what follows without it: weights, moments, Adam's count of steps, routers' biases."""
    layouts = [Layout(expert_parallel=2, stage=0), Layout(expert_parallel=2, accumulation=2, model="loss_free"),
               Layout(stage=2, accumulation=2, offload=True), Layout(stage=3, expert_parallel=2)]  # fmt: skip
    layouts += [Layout(dtype="bf16", stage=1, expert_parallel=2), Layout(dtype="bf16", stage=2, offload=True),
                Layout(dtype="bf16", stage=3)]  # fmt: skip
    for answers in ranks(2, skip_rank, layouts):
        for layout, ways in zip(layouts, answers, strict=True):
            plain = ways.pop("left out")
            for way, found in ways.items():
                assert not math.isfinite(found["bad norm"]), (layout, way)
                assert found["unchanged"], (layout, way)
                assert (found["losses"], found["norms"]) == (plain["losses"], plain["norms"]), (layout, way)
                for name, tensor in plain["tensors"].items():
                    assert torch.equal(found["tensors"][name], tensor), (layout, way, name)
