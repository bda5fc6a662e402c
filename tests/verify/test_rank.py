"""Layouts with real processes: those that train the same pass, and every planted fault is told with its place."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

import moetrain
from moetrain.cli.before import verify
from moetrain.cli.main import main
from moetrain.cli.options import Options, settings
from moetrain.compose import presets
from moetrain.config.schema import RunConfig
from moetrain.verify.layouts import Layout
from moetrain.verify.spec import BOUNDS, COLUMNS, Result

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Verified:
    """What a verification said, and what it found by layout."""

    code: int
    text: str
    results: dict[str, Result]


def verified(*words: str, module: str | None = None, **environment: str) -> Verified:
    """Run the verb as a user does; ``module`` is what its ranks are instead."""
    results: list[Result] = []
    run_layouts = verify.run_layouts

    def keep(run: RunConfig, *, layouts: list[Layout]) -> list[Result]:
        results.extend(run_layouts(run, layouts=layouts, module=module))
        return results

    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(verify, "run_layouts", keep)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(moetrain.__file__).parents[1]), str(HERE)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in environment.items():
            patch.setenv(name, value)
        code = main(["verify", *words])
    return Verified(code, text.getvalue(), {result.layout: result for result in results})


def test_the_layouts_of_the_default_model_train_as_one_process_does():
    names = ["ep2_zero1", "ep1_zero1_acc2", "ranks2_ep1_zero2", "ep2_zero0_acc2", "ep2_zero2_acc2"]
    done = verified(f"layout={','.join(names)}")
    assert list(done.results) == names, "in the order asked for"
    for result in done.results.values():
        assert result.difference is None, result
        assert result.errors.keys() == set(COLUMNS)
        # other layouts round otherwise; no error at all would mean that nothing was compared
        assert 0 < result.errors["params"] < BOUNDS["fp32"]["params"]
    assert done.code == 0
    assert done.text.endswith("\n5 of 5 layouts train as one process does\n")
    assert "verify 5/5 layouts" in done.text


@pytest.mark.parametrize(
    "words",
    [
        # a random choice, and drops that depend on the rank's tokens: one process divides the batch and draws alike
        ["model.moe.router=gshard", "model.moe.capacity_factor=1.0"],
        # a bias that no optimizer holds, and shared experts
        ["model.moe.router=sigmoid_bias", "model.moe.num_shared_experts=1", "model.moe.shared_gate=true"],
        # a part that stays as it is, and one that learns at a rate of its own
        ["optim.freeze=[router]", "optim.experts_lr_ratio=0.5"],
    ],
    ids=["chance and drops", "bias", "frozen and slow"],
)
def test_what_differs_by_definition_or_is_kept_beside_the_weights_is_compared_too(words):
    done = verified("layout=ep2_zero1_acc2,ranks2_ep1_zero2", *words)
    assert done.code == 0, done.text
    if "gshard" in words[0]:
        assert "model.moe.router=gshard differs between layouts by definition" in done.text


FAULTS = {
    "expert_gradient_times_expert_parallel": ("ep2_zero1", 1,
        "gradient of blocks.0.feed_forward.experts.w_in, expert 0",
        "2.00 times too large: multiplied by expert_parallel"),
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
def faulty() -> Verified:
    """One start of processes for all the faults, each in a layout of its own."""
    names = ",".join(layout for layout, *_ in FAULTS.values())
    return verified(f"layout={names}", module="planted", PLANTED_FAULTS=",".join(FAULTS))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_told_with_its_place(faulty, fault):
    layout, step, what, hint = FAULTS[fault]
    difference = faulty.results[layout].difference
    if fault == "none":
        assert difference is None
        return
    assert difference is not None
    assert difference.what.startswith(what), difference
    assert difference.step == step, difference
    assert hint in difference.hint, difference
    assert difference.error > 100 * difference.bound, "no fault is near a bound"


def test_a_difference_is_exit_code_1_and_a_line_each(faulty):
    assert faulty.code == 1
    assert faulty.text.count("DIFFERS") == len(FAULTS) - 1
    assert "ep2_zero0: the first to differ is the gradient norm, after step 1: relative error " in faulty.text
    assert faulty.text.endswith(f"\n1 of {len(FAULTS)} layouts train as one process does\n")


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets("model"))
def test_every_preset_shrunk_trains_as_one_process_does(preset):
    run, _ = settings(Options.read([f"model={preset}"]))
    name = "ranks2_ep1_zero2_acc2" if run.model.moe is None else "ep2_zero2_acc2"
    done = verified(f"model={preset}", f"layout={name}")
    assert len(done.results) == (2 if run.model.dtype == "bf16" else 1)
    assert done.code == 0, done.text
