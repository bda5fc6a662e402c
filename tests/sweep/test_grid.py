"""The points of a sweep: what is kept equal is, and what is impossible is told before anything runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from moetrain.compose import compose, compose_file
from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError
from moetrain.plan.cluster import read_cluster
from moetrain.plan.flops import count_parameters, flops_per_token
from moetrain.sweep.grid import Point, make_grid, run_flops, solve
from moetrain.sweep.settings import Axis, axes_of, freeze_sweep

EXPERTS = {"model.moe.num_experts": [1, 8, 32]}
SIZES = {"size": {"a": ["model.d_model=64", "model.d_ff=256"], "b": ["model.d_model=128"]}}


@functools.cache
def _made(*overrides: str) -> RunConfig:
    return freeze(compose(overrides).settings)


def make(overrides: Sequence[str]) -> RunConfig:
    return _made(*overrides)


def grid(axes: dict[str, Any], **settings: Any) -> list[Point]:
    given: list[Axis] = axes_of(axes)
    cluster = read_cluster(compose_file("cluster", "cpu"), name="cpu")
    return make_grid(
        freeze_sweep(settings, given), given, make=make, default_processes=1, cluster=cluster, efficiency=0.5
    )


def trained(point: Point) -> RunConfig:
    """The run as train would make it of the point's overrides."""
    return resolve(make(point.overrides), default_processes=1)


def flops(point: Point) -> float:
    run = trained(point)
    per_token = flops_per_token(run.model, sequence_length=run.model.context)
    return per_token * (run.schedule.steps or 0) * run.batch.global_batch * run.model.context


class TestKeptEqual:
    def test_active_flops_are_alike_within_each_size(self):
        points = grid(SIZES | EXPERTS, keep="active_flops", within=["size"])
        for size in ("a", "b"):
            costs = [flops(point) for point in points if point.labels["size"] == size]
            assert len(costs) == 3
            assert max(costs) / min(costs) < 1.04
        sizes = [flops(point) for point in points if point.labels["model.moe.num_experts"] == "8"]
        assert sizes[1] > 1.5 * sizes[0]

    def test_what_is_told_of_a_point_is_what_its_overrides_give(self):
        for point in grid(EXPERTS, keep="active_flops"):
            assert point.flops == flops(point)
            assert point.parameters == count_parameters(trained(point).model).total

    def test_one_expert_is_as_wide_as_the_two_that_answer_elsewhere(self):
        alone = grid(EXPERTS, keep="active_flops")[0]
        assert "model.moe.top_k=1" in alone.adjusted
        moe = trained(alone).model.moe
        assert moe is not None
        assert moe.d_expert == pytest.approx(2 * 256, rel=0.02)

    def test_total_parameters_are_kept_by_the_width_of_the_experts(self):
        points = grid({"model.moe.num_experts": [4, 8, 16]}, keep="total_parameters")
        counts = [count_parameters(trained(point).model).total for point in points]
        assert max(counts) / min(counts) < 1.02
        assert trained(points[0]).model.moe.d_expert > 1.9 * trained(points[1]).model.moe.d_expert

    def test_compute_is_kept_over_sizes_by_the_length_of_the_run(self):
        points = grid(SIZES, keep="active_flops", free="schedule.steps", tolerance=0.001)
        assert flops(points[0]) == pytest.approx(flops(points[1]), rel=0.001)
        assert trained(points[0]).schedule.steps > trained(points[1]).schedule.steps

    @pytest.mark.parametrize("keep", ["memory", "time"])
    def test_memory_and_time_are_kept_by_the_plan(self, keep):
        for point in grid({"model.moe.num_experts": [4, 16]}, keep=keep, free="model.moe.d_expert", tolerance=0.05):
            assert abs(point.off) < 0.05

    def test_nothing_is_adjusted_where_nothing_is_kept(self):
        for point in grid({"model.moe.num_experts": [4, 8]}):
            assert (point.adjusted, point.off) == ((), 0.0)

    def test_the_nearest_value_is_found(self):
        run = resolve(make(["model.moe.num_experts=32"]), default_processes=1)
        target = 1.3 * run_flops(run)

        def off(width: int) -> float:
            assert run.model.moe is not None
            moe = replace(run.model.moe, d_expert=width)
            return abs(run_flops(replace(run, model=replace(run.model, moe=moe))) / target - 1)

        found = solve(run, "model.moe.d_expert", target=target, quantity=run_flops)
        assert found == min(range(found - 40, found + 44, 4), key=off)


class TestImpossible:
    def test_every_impossible_point_is_told_at_once(self):
        with pytest.raises(ConfigError) as caught:
            grid({"model.moe.top_k": [2, 9, 10], "model.d_model": [128, 130]})
        told = "\n".join(caught.value.problems)
        assert "model.moe.top_k is 9, but must be at most model.moe.num_experts, 8" in told
        assert "model.moe.top_k is 10" in told
        assert "model.d_model is 130, but must be a multiple of model.num_heads, 4" in told

    def test_what_every_point_says_is_said_once(self):
        with pytest.raises(ConfigError) as caught:
            grid({"model.num_layers": [1, 2, 3], "model.d_modle": [1]})
        (problem,) = caught.value.problems
        assert problem.startswith(
            "model.num_layers=1, model.d_modle=1 and 2 more points: 'model.d_modle' is not a setting"
        )

    def test_a_point_that_cannot_come_near_is_told_with_a_way_out(self):
        with pytest.raises(ConfigError, match=r"active_flops would be .* off with model.num_layers=\d, .* tolerance="):
            grid({"model.d_model": [120, 128]}, keep="active_flops", free="model.num_layers", tolerance=0.01)

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"keep": "flops"}, "keep is 'flops', but must be one of none, active_flops"),
            ({"keep": "memory", "free": "model.moe.width"}, "free is 'model.moe.width', which is not a setting"),
            ({"keep": "memory", "free": "model.moe.num_experts"}, "which is an axis"),
            ({"within": ["depth"]}, "within names depth, but the axes are model.moe.num_experts"),
            ({"jobs": 0}, "jobs is 0, but must be at least 1"),
            ({"halving": 1}, "halving is 1"),
            ({"rungs": [0.5, 0.2]}, "rungs is"),
            ({"seeds": [1, 1]}, "seeds is"),
            ({"name": "a/b"}, "name is 'a/b'"),
            ({"tolerance": 0.0}, "tolerance is 0.0"),
            ({"jbos": 2}, "'jbos' is not a setting; did you mean 'jobs'?"),
        ],
    )
    def test_settings_of_the_sweep_are_checked(self, settings, told):
        with pytest.raises(ConfigError) as caught:
            grid(EXPERTS, **settings)
        assert told in str(caught.value)

    @pytest.mark.parametrize("axes", [{}, {"seed": 3}, {"seed": []}, {"size": {"a": "model=tiny"}}])
    def test_axes_are_checked(self, axes):
        with pytest.raises(ConfigError, match=r"axis|axes\."):
            grid(axes)

    def test_a_free_setting_that_changes_nothing_is_told(self):
        with pytest.raises(ConfigError, match="does not change what is kept"):
            grid({"model.moe.num_experts": [4, 8]}, keep="active_flops", free="log.every_steps")
