"""Settings that are worked out from others."""

from __future__ import annotations

import pytest
from dotted import DENSE, resolved

from moetrain.config.checks import in_steps, resolve, steps_in_run
from moetrain.config.freeze import flatten, to_dict
from moetrain.config.schema import ScheduleConfig


@pytest.mark.parametrize(
    ("processes", "experts", "expected"), [(2, 8, 2), (8, 8, 8), (8, 6, 2), (6, 8, 2), (16, 8, 8), (3, 8, 1), (1, 8, 1)]
)
def test_expert_parallel_is_the_largest_number_that_divides_processes_and_experts(processes, experts, expected):
    largest = max(n for n in range(1, 17) if processes % n == 0 and experts % n == 0)
    run = resolved({"launch.processes": processes, "model.moe.num_experts": experts})
    assert run.parallel.expert_parallel == largest == expected


def test_a_dense_model_has_no_expert_parallel():
    assert resolved(DENSE | {"launch.processes": 8}).parallel.expert_parallel == 1


def test_what_was_left_out_is_worked_out():
    run = resolved({"name": "a", "model.context": 77, "batch.global_batch": 40}, default_processes=5)
    assert (run.run_dir, run.batch.sequence_length, run.launch.processes) == ("runs/a", 77, 5)
    assert run.batch.micro_batch == 8, "40 sequences over 5 processes, none accumulated"


def test_what_was_given_stays():
    given = {"run_dir": "here", "batch.sequence_length": 3, "batch.micro_batch": 2, "launch.processes": 4,
             "parallel.expert_parallel": 1}  # fmt: skip
    run = resolved({"name": "a", **given}, default_processes=5)
    assert {name: flatten(to_dict(run))[name] for name in given} == given


def test_to_resolve_twice_changes_nothing():
    run = resolved({"name": "a"})
    assert resolve(run, default_processes=7) == run


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (100, 1), (101, 2), (1000, 10), (10**30 + 1, 10**28 + 1)])
def test_tokens_are_rounded_up_to_whole_steps(tokens, steps):
    assert in_steps(None, tokens, tokens_per_step=100) == steps
    assert steps_in_run(ScheduleConfig(steps=None, tokens=tokens), tokens_per_step=100) == steps


def test_steps_are_taken_as_they_are():
    assert in_steps(7, None, tokens_per_step=100) == 7
    assert in_steps(None, None, tokens_per_step=100) is None
    assert steps_in_run(ScheduleConfig(steps=7), tokens_per_step=100) == 7
