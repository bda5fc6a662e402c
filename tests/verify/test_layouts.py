"""Names of layouts, and which are tried when nobody names any."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moetrain.config.checks import CHOICES
from moetrain.config.launch.settings import LaunchConfig
from moetrain.config.schema import BatchConfig, ModelConfig, MoEConfig, ParallelConfig, RunConfig
from moetrain.errors import ConfigError
from moetrain.verify.layouts import Layout, chosen, global_batch, own_layout, parse, usual, whole_matrix


def run_with(
    *, experts: int | None = 8, expert_parallel: int = 1, processes: int = 1, micro_batch: int = 8, stage: int = 1,
    dtype: str = "fp32",
) -> RunConfig:  # fmt: skip
    return RunConfig(
        model=ModelConfig(dtype=dtype, moe=None if experts is None else MoEConfig(num_experts=experts)),
        batch=BatchConfig(global_batch=micro_batch * processes * 4, micro_batch=micro_batch),
        parallel=ParallelConfig(expert_parallel=expert_parallel, zero_stage=stage),
        launch=LaunchConfig(processes=processes),
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("ep1_zero1", Layout(ranks=1, expert_parallel=1, zero_stage=1)),
        ("ep2_zero2_acc2", Layout(ranks=2, expert_parallel=2, zero_stage=2, accumulation=2)),
        ("ranks4_ep2_zero0", Layout(ranks=4, expert_parallel=2, zero_stage=0)),
        ("ranks2_ep1_zero1_acc4_bf16", Layout(ranks=2, expert_parallel=1, zero_stage=1, accumulation=4, dtype="bf16")),
    ],
)
def test_a_name_stands_for_a_layout_and_back(name, layout):
    assert parse(name) == layout
    assert layout.name == name


def test_all_that_is_wrong_with_the_names_is_told_at_once():
    with pytest.raises(ConfigError) as told:
        chosen(["ep2", "ep4_zero9", "ep3_zero1"], run=run_with())
    assert len(told.value.problems) == 3


@pytest.mark.parametrize(
    ("run", "own"),
    [
        (run_with(processes=1), "ep1_zero1_acc2"),
        (run_with(experts=64, expert_parallel=8, processes=64, stage=2), "ep4_zero2_acc2"),
        (run_with(experts=64, expert_parallel=2, processes=64), "ranks4_ep2_zero1_acc2"),
        (run_with(experts=6, expert_parallel=3, processes=6), "ep3_zero1_acc2"),
        (run_with(experts=36, expert_parallel=6, processes=6), "ep3_zero1_acc2"),
        (run_with(experts=None, processes=16, stage=0), "ranks4_ep1_zero0_acc2"),
    ],
)
def test_the_users_own_layout_comes_first_on_at_most_four_ranks(run, own):
    assert own_layout(run).name == own
    assert usual(run)[0].name == own


def test_the_usual_layouts_have_every_size_stage_and_accumulation():
    layouts = usual(run_with())
    assert {(each.ranks, each.expert_parallel, each.accumulation) for each in layouts} == {
        (ranks, ep, acc) for ranks, ep in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)) for acc in (1, 2)
    }
    for stage in CHOICES["parallel.zero_stage"]:
        assert any(each.zero_stage == stage and each.expert_parallel > 1 for each in layouts)


def test_the_whole_matrix_has_every_combination():
    assert len(whole_matrix(run_with())) == 6 * 2 * len(CHOICES["parallel.zero_stage"])
    assert chosen(["all"], run=run_with()) == whole_matrix(run_with())


def test_a_dense_model_and_an_odd_number_of_experts_share_no_more_than_they_can():
    assert {each.expert_parallel for each in whole_matrix(run_with(experts=None))} == {1}
    assert {each.expert_parallel for each in whole_matrix(run_with(experts=6))} == {1, 2}


def test_a_bf16_run_is_compared_in_fp32_as_well():
    run = run_with(dtype="bf16")
    assert [each.name for each in chosen(["ep2_zero1"], run=run)] == ["ep2_zero1", "ep2_zero1_bf16"]
    assert [each.name for each in chosen(["ep2_zero1_bf16"], run=run)] == ["ep2_zero1_bf16"]
    assert {each.dtype for each in usual(run)[:2]} == {"fp32", "bf16"}
    assert [each.name for each in chosen(["ep2_zero0"], run=run)] == ["ep2_zero0"], "not offered in bf16"


def test_the_batch_is_shared_out_evenly_by_every_layout():
    layouts = [parse("ep3_zero1"), parse("ranks4_ep2_zero1_acc2")]
    assert global_batch(layouts) == 24
    assert global_batch([replace(layouts[1], accumulation=1)]) == 8
