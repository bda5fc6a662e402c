"""Layouts with real processes: those that train the same pass, and every planted fault is told with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moetrain
from moetrain.cli.options import Options, settings
from moetrain.cli.verify import run_layouts
from moetrain.compose import presets
from moetrain.verify.layouts import chosen
from moetrain.verify.shrink import shrink
from moetrain.verify.spec import BOUNDS, COLUMNS, Result

HERE = Path(__file__).parent


def results_of(names: list[str], *overrides: str, module: str | None = None) -> dict[str, Result]:
    """What a verification of these layouts finds."""
    run, _ = settings(Options.read([*overrides, "launch.processes=2"]))
    layouts = chosen(names, run=run)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join([str(Path(moetrain.__file__).parents[1]), str(HERE)]))
        environment.setenv("OMP_NUM_THREADS", "1")
        results = run_layouts(shrink(run, layouts=layouts, steps=3).run, layouts=layouts, module=module)
    assert results is not None
    return {result.layout: result for result in results}


def test_the_layouts_of_the_default_model_train_as_one_process_does():
    names = ["ep2_zero1", "ep1_zero1_acc2", "ranks2_ep1_zero2", "ep2_zero0_acc2", "ep2_zero2_acc2"]
    results = results_of(names)
    assert list(results) == names, "in the order asked for"
    for result in results.values():
        assert result.difference is None, result
        assert result.errors.keys() == set(COLUMNS)
        # other layouts round otherwise; no error at all would mean that nothing was compared
        assert 0 < result.errors["params"] < BOUNDS["fp32"]["params"]


FAULTS = {
    "expert_gradient_times_expert_parallel": ("ep2_zero1", 1,
        "gradient of blocks.0.feed_forward.experts.w_in, expert 0", "2.00 times too large: multiplied by expert_parallel"),
    "norm_without_remote_experts": ("ep2_zero0", 1, "gradient norm",
        "a rank's own experts are counted, and those of other ranks missed"),
    "none": ("ep2_zero0_acc2", None, "", ""),
    "aux_loss_averaged_twice": ("ep2_zero1_acc2", 1, "gradient of", ""),
    "logged_aux_loss_averaged_twice": ("ranks2_ep1_zero1", 1, "router's loss, blocks.0.feed_forward balance",
        "2.00 times too small: divided by the ranks"),
    "router_gradient_of_one_rank": ("ranks2_ep1_zero2", 1, "gradient of blocks.0.feed_forward.router.weight", ""),
    "initialisation_by_local_index": ("ep2_zero2", 0, "initial value of blocks.0.feed_forward.experts.w_in, expert 4",
        "it is that of expert 0"),
    "initialisation_by_world_size": ("ranks2_ep1_zero0", 0, "initial value of embedding.weight",
        "drawn by the layout"),
}  # fmt: skip
"""Fault -> the layout it is planted in, and where and how it must be told."""


@pytest.fixture(scope="module")
def faulty() -> dict[str, Result]:
    """One start of processes for all the faults, each in a layout of its own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PLANTED_FAULTS", ",".join(FAULTS))
        return results_of([layout for layout, *_ in FAULTS.values()], module="planted")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_with_its_place(faulty, fault):
    layout, step, what, hint = FAULTS[fault]
    difference = faulty[layout].difference
    if fault == "none":
        assert difference is None
        return
    assert difference is not None
    assert difference.what.startswith(what), difference
    assert difference.step == step, difference
    assert hint in difference.hint, difference


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets("model"))
def test_every_preset_shrunk_trains_as_one_process_does(preset):
    run, _ = settings(Options.read([f"model={preset}"]))
    name = "ranks2_ep1_zero2_acc2" if run.model.moe is None else "ep2_zero2_acc2"
    results = results_of([name], f"model={preset}")
    assert len(results) == (2 if run.model.dtype == "bf16" else 1)
    for result in results.values():
        assert result.difference is None, result
