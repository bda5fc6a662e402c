"""Rules across settings."""

from __future__ import annotations

from typing import Any

import pytest
from dotted import DENSE, resolved

from moetrain.config.checks import CHOICES, NOT_NEGATIVE, POSITIVE, check
from moetrain.config.freeze import flatten, setting_names, to_dict
from moetrain.config.routers import NOT_CAUSAL, ROUTERS, TOP_K
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError


def fitting(router: str) -> dict[str, Any]:
    """What a router asks for, whatever its own settings."""
    top_k = {"dense": 8}.get(router, TOP_K.get(router, 2))
    return {"model.moe.router": router, "model.moe.top_k": top_k, "model.moe.allow_noncausal": router in NOT_CAUSAL}


def home(name: str) -> dict[str, Any]:
    """Settings with which a setting may be set."""
    if name == "model.moe.drop":
        return {"model.moe.capacity_factor": 1.0}
    if name == "launch.kind":
        return {"launch.kubernetes.image": "moetrain", "launch.kubernetes.volume_claim": "work"}
    routers = [router for router, own in ROUTERS.items() if name.removeprefix("model.moe.") in own]
    return fitting(routers[0]) if routers else {}


def check_settings(settings: dict[str, Any]) -> None:
    run = resolved(settings)
    check(run, flatten(to_dict(run)))


def problems(settings: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_settings(settings)
    return caught.value.problems


def test_the_defaults_are_usable():
    check_settings({})
    check_settings(DENSE)


# settings that break a rule; what the message says; settings the message names as ways out
RULES: list[tuple[dict[str, Any], str, list[dict[str, Any]]]] = [
    (
        {"model.moe": None, "model.d_model": 250, "model.num_heads": 4},
        "model.d_model is 250, but must be a multiple of model.num_heads, 4: "
        "use 248 or 252, another number of heads, or set model.d_head",
        [
            {"model.d_model": 248},
            {"model.d_model": 252, "model.d_head": 64},
            {"model.num_heads": 5},
            {"model.d_head": 64},
        ],
    ),
    (
        {"model.d_head": 63},
        "model.d_head is 63, but must be even for model.positions=rope: set model.d_head=64",
        [{"model.d_head": 64}],
    ),
    (
        {"model.d_model": 252, "model.num_heads": 4},
        "model.d_head is 63, but must be even for model.positions=rope: set model.d_head=64",
        [{"model.d_head": 64}],
    ),
    (
        {"model.num_kv_heads": 3},
        "model.num_kv_heads is 3, but must divide model.num_heads, 4: use one of [1, 2, 4]",
        [{"model.num_kv_heads": n} for n in (1, 2, 4)],
    ),
    (
        {"model.moe.top_k": 9},
        "model.moe.top_k is 9, but must be at most model.moe.num_experts, 8: use fewer, or 9 experts",
        [{"model.moe.top_k": 8}, {"model.moe.num_experts": 9}],
    ),
    (
        {"model.moe.top_k": 1},
        "model.moe.renormalize is true, but must be false for model.moe.top_k=1",
        [{"model.moe.renormalize": False}, {"model.moe.top_k": 2}, {"model.moe.num_experts": 1}],
    ),
    (
        {"model.dtype": "bf16", "model.d_model": 252, "model.d_head": 64},
        "model.d_model is 252, but must be a multiple of 8 for an MoE model in bf16: use 256",
        [{"model.d_model": 256}, {"model.dtype": "fp32"}, {"model.moe": None}],
    ),
    (
        {"model.dtype": "bf16", "model.moe.d_expert": 513},
        "model.moe.d_expert is 513, but must be a multiple of 8 for an MoE model in bf16: use 520",
        [{"model.moe.d_expert": 520}],
    ),
    (
        {"model.moe.d_expert": 514},
        "model.moe.d_expert is 514, but must be a multiple of 4 for an MoE model in fp32: use 516",
        [{"model.moe.d_expert": 516}],
    ),
    (
        {"schedule.steps": 20},
        "schedule.warmup_steps is 30, but must be less than schedule.steps, 20, or the run ends in its warm-up: use 2",
        [{"schedule.warmup_steps": 2}, {"schedule.steps": 200}],
    ),
    (
        {"model.dtype": "bf16", "model.d_ff": 1020},
        "model.moe.d_expert is 1020, but must be a multiple of 8 for an MoE model in bf16: use 1024",
        [{"model.moe.d_expert": 1024}, {"model.d_ff": 1024}],
    ),
    (
        {"model.moe.every": 5},
        "model.moe.every is 5, but must be at most model.num_layers, 4: no block would be sparse; for a dense "
        "model use model/moe=none",
        [{"model.moe.every": 4}],
    ),
    (
        {"parallel.expert_parallel": 4, "launch.processes": 6, "model.moe.num_experts": 9, "batch.global_batch": 48},
        "parallel.expert_parallel is 4, but must divide the world size, 6: use one of [1, 3]",
        [{"parallel.expert_parallel": n} for n in (1, 3)],
    ),
    (
        {"parallel.expert_parallel": 2, "model.moe": None},
        "parallel.expert_parallel is 2, but the model is dense: use 1",
        [{"parallel.expert_parallel": 1}],
    ),
    (
        {"parallel.expert_parallel": 4, "launch.processes": 4, "model.moe.num_experts": 6, "batch.global_batch": 32},
        "model.moe.num_experts is 6, but must be a multiple of parallel.expert_parallel, 4: use 4 or 8, or an "
        "expert_parallel of [1, 2]",
        [{"model.moe.num_experts": 4}, {"model.moe.num_experts": 8}, {"parallel.expert_parallel": 2}],
    ),
    (
        {
            "parallel.expert_parallel": 4,
            "launch.processes": 4,
            "model.moe.num_experts": 6,
            "model.moe.top_k": 5,
            "batch.global_batch": 32,
        },
        "model.moe.num_experts is 6, but must be a multiple of parallel.expert_parallel, 4: use 8, or",
        [{"model.moe.num_experts": 8}, {"parallel.expert_parallel": 1}],
    ),
    (
        {"batch.global_batch": 20, "batch.micro_batch": 4},
        "batch.global_batch is 20, but must be a multiple of batch.micro_batch x world size, 4 x 2 = 8: use 16 or "
        "24, or another micro_batch",
        [{"batch.global_batch": 16}, {"batch.global_batch": 24}, {"batch.micro_batch": 5}],
    ),
    (
        {"batch.global_batch": 3, "batch.micro_batch": 4},
        "batch.global_batch is 3, but must be a multiple of batch.micro_batch x world size, 4 x 2 = 8: use 8, or",
        [{"batch.global_batch": 8}],
    ),
    (
        {"batch.sequence_length": 257},
        "batch.sequence_length is 257, but must be at most model.context, 256: use less, or a longer context",
        [{"batch.sequence_length": 256}, {"model.context": 257}],
    ),
    (
        {"schedule.steps": 1000, "schedule.tokens": 5000},
        "schedule.steps is 1,000 and schedule.tokens is 5,000, but only one may be set: set the other to null",
        [{"schedule.steps": None}, {"schedule.tokens": None}],
    ),
    (
        {"schedule.warmup_steps": 10, "schedule.warmup_tokens": 5000},
        "schedule.warmup_steps is 10 and schedule.warmup_tokens is 5,000, but only one may be set",
        [{"schedule.warmup_steps": None}, {"schedule.warmup_tokens": None}],
    ),
    (
        {"schedule.kind": "wsd", "schedule.decay_steps": 10, "schedule.decay_tokens": 5000},
        "schedule.decay_steps is 10 and schedule.decay_tokens is 5,000, but only one may be set",
        [{"schedule.decay_steps": None}, {"schedule.decay_tokens": None}],
    ),
    (
        {"schedule.steps": None},
        "schedule.steps and schedule.tokens are both null, but one must say how long the run is: set one",
        [{"schedule.steps": 50}, {"schedule.tokens": 5000}],
    ),
    (
        {"schedule.decay_steps": 10},
        "schedule.decay_steps is 10, but schedule.kind is cosine, and only wsd has a decay of its own: set it to null, "
        "or schedule.kind=wsd",
        [{"schedule.decay_steps": None}, {"schedule.kind": "wsd"}],
    ),
    (
        {"schedule.decay_tokens": 5000},
        "schedule.decay_tokens is 5,000, but schedule.kind is cosine",
        [{"schedule.decay_tokens": None}, {"schedule.kind": "wsd"}],
    ),
    (
        {"parallel.zero_stage": 0, "model.dtype": "bf16"},
        "parallel.zero_stage is 0, but must be 1, 2 or 3 with model.dtype=bf16",
        [{"parallel.zero_stage": 1}, {"parallel.zero_stage": 2}, {"parallel.zero_stage": 3}],
    ),
    (
        {"parallel.two_level_all_to_all": True, "launch.processes": 4, "parallel.expert_parallel": 2},
        "parallel.two_level_all_to_all is true, but parallel.expert_parallel is 2, and experts are shared",
        [{"parallel.two_level_all_to_all": False}],
    ),
    (
        {"parallel.two_level_all_to_all": True, "model.moe": None},
        "parallel.two_level_all_to_all is true, but the model is dense",
        [{"parallel.two_level_all_to_all": False}],
    ),
    (
        {"parallel.zero_stage": 0, "parallel.offload_optimizer": True},
        "parallel.offload_optimizer is true, but parallel.zero_stage is 0",
        [{"parallel.zero_stage": 1}, {"parallel.zero_stage": 3}, {"parallel.offload_optimizer": False}],
    ),
    (
        {"watch.hang_seconds": 700.0},
        "watch.hang_seconds is 700, but must be less than launch.timeout_seconds, 600",
        [{"watch.hang_seconds": 300.0}, {"launch.timeout_seconds": 900}, {"watch.hang_seconds": 0.0}],
    ),
    (
        {"watch.straggler_ratio": 1.0},
        "watch.straggler_ratio is 1, but must be above 1",
        [{"watch.straggler_ratio": 1.5}],
    ),
    (
        {"watch.spike_window": 3},
        "watch.spike_window is 3, but must be at least 4",
        [{"watch.spike_window": 64}, {"watch.spike": "off"}],
    ),
    (
        {"checkpoint.remote": "bucket/runs/a"},
        "checkpoint.remote is 'bucket/runs/a', but must be a URL",
        [{"checkpoint.remote": "s3://bucket/runs/a"}, {"checkpoint.remote": None}],
    ),
    (
        {"checkpoint.remote": "s3://"},
        "checkpoint.remote is 's3://', but must be a URL",
        [{"checkpoint.remote": "file:///mnt/runs/a"}],
    ),
    (
        {"checkpoint.remote": "sftp://me:hunter2@host/runs/a"},
        "checkpoint.remote has a password or a query in it",
        [{"checkpoint.remote": "sftp://me@host/runs/a"}],
    ),
    (
        {"checkpoint.remote": "https://host/runs/a?token=hunter2"},
        "checkpoint.remote has a password or a query in it",
        [{"checkpoint.remote": "gs://bucket/a@b:c"}],
    ),
    (
        {"checkpoint.keep_best": 1, "evaluate.every_steps": None},
        "checkpoint.keep_best is 1, but evaluate.every_steps is null",
        [{"evaluate.every_steps": 100}, {"checkpoint.keep_best": 0}],
    ),
    (
        {"checkpoint.keep_best": 2, "evaluate.every_steps": 8, "checkpoint.every_steps": 20},
        "checkpoint.keep_best is 2, but evaluate.every_steps, 8, and checkpoint.every_steps, 20, are no multiples",
        [
            {"evaluate.every_steps": 20},
            {"evaluate.every_steps": 10},
            {"evaluate.every_steps": 40},
            {"checkpoint.keep_best": 0},
        ],
    ),
    (
        {"checkpoint.keep_every_steps": 250, "checkpoint.every_steps": 100},
        "checkpoint.keep_every_steps is 250, but must be a multiple of checkpoint.every_steps, 100, or few such steps "
        "are saved: use 200 or 300",
        [{"checkpoint.keep_every_steps": 200}, {"checkpoint.keep_every_steps": 300}, {"checkpoint.every_steps": None}],
    ),
    ({"optim.beta1": 1.0}, "optim.beta1 is 1.0, but must lie in [0, 1)", [{"optim.beta1": 0.0}]),
    ({"optim.beta2": -0.1}, "optim.beta2 is -0.1, but must lie in [0, 1)", [{"optim.beta2": 0.999}]),
    ({"data.held_out": 0.0}, "data.held_out is 0.0, but must lie in (0, 0.5]", [{"data.held_out": 0.5}]),
    ({"data.held_out": 0.6}, "data.held_out is 0.6, but must lie in (0, 0.5]", [{"data.held_out": 0.001}]),
    (
        {"prepare.similarity": 1.0},
        "prepare.similarity is 1.0, but must lie in (0, 1); for 1, set prepare.duplicates=exact",
        [{"prepare.similarity": 0.5}],
    ),
    (
        {"prepare.min_characters": 10, "prepare.max_characters": 9},
        "prepare.min_characters is 10, but must be at most prepare.max_characters, 9",
        [{"prepare.max_characters": 10}],
    ),
    (
        {"prepare.duplicates": "all"},
        "prepare.duplicates is 'all', but must be one of keep, exact, near",
        [{"prepare.duplicates": "exact"}],
    ),
    (
        {"schedule.min_lr_ratio": 1.1},
        "schedule.min_lr_ratio is 1.1, but must lie in [0, 1]",
        [{"schedule.min_lr_ratio": 0}],
    ),
    (
        {"schedule.min_lr_ratio": -1},
        "schedule.min_lr_ratio is -1.0, but must lie in [0, 1]",
        [{"schedule.min_lr_ratio": 1}],
    ),
    ({"data.text": []}, "data.text is empty, but must name at least one", [{"data.text": ["a.txt"]}]),
    ({"name": ""}, "name is empty, but tells the run's directory: give it a value, or null", [{"name": None}]),
    ({"run_dir": ""}, "run_dir is empty, but tells the run's directory: give it a value, or null", [{"run_dir": None}]),
]


@pytest.mark.parametrize(("broken", "message", "ways_out"), RULES, ids=[rule[1][:50] for rule in RULES])
def test_a_broken_rule_is_told_and_each_way_out_leads_out(broken, message, ways_out):
    (problem,) = problems(broken)
    assert problem.startswith(message)
    for way_out in ways_out:
        check_settings(broken | way_out)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_those_there_are(name):
    wrong: Any = 7 if isinstance(CHOICES[name][0], int) else "colour"
    (problem,) = problems({name: wrong})
    assert problem == f"{name} is {wrong!r}, but must be one of {', '.join(map(str, CHOICES[name]))}"
    for value in CHOICES[name]:
        own = {"launch.hosts": ["a"]} if value == "hostfile" else {}
        check_settings((fitting(value) if name == "model.moe.router" else home(name)) | {name: value} | own)


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_a_size_is_above_0(name, value):
    assert [problem for problem in problems({name: value}) if problem.startswith(f"{name} is {value}")
            if problem.endswith("but must be above 0")]  # fmt: skip


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_what_may_be_0_is_not_negative(name):
    assert problems({name: -1})[0].endswith("but must be at least 0")
    free = {"schedule.warmup_steps": None} if name == "schedule.warmup_tokens" else {}
    check_settings(home(name) | free | {name: 0})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "rule"), [("optim.lr", "above 0"), ("optim.clip", "at least 0")])
def test_a_number_is_finite(name, rule, value):
    assert problems({name: value}) == [f"{name} is {value}, but must be {rule} and finite"]


def test_a_seed_of_any_length_is_as_good_as_any():
    check_settings({"seed": 10**400})


@pytest.mark.parametrize("names", [POSITIVE, NOT_NEGATIVE, tuple(CHOICES)], ids=["positive", "not negative", "choices"])
def test_the_rules_name_settings_that_are(names):
    assert set(names) <= setting_names()
    assert len(set(names)) == len(names)


def test_every_number_has_a_rule():
    """A new setting is not forgotten here."""
    in_a_range = {"optim.beta1", "optim.beta2", "data.held_out", "schedule.min_lr_ratio", "parallel.zero_stage",
                  "model.moe.dropout", "model.moe.jitter", "watch.straggler_ratio",
                  "data.fill_in_middle", "prepare.similarity", "data.fill_in_middle_spm"}  # fmt: skip
    settings = [RunConfig(), *(resolved(fitting(router)) for router in ROUTERS)]
    numbers = {name for run in settings for name, value in flatten(to_dict(run)).items() if type(value) in (int, float)}
    assert numbers <= set(POSITIVE) | set(NOT_NEGATIVE) | in_a_range


def test_all_broken_rules_are_told_at_once():
    told = problems({"optim.lr": -1, "model.norm": "batch", "log.every_steps": 0, "data.text": []})
    assert sorted(problem.split()[0] for problem in told) == ["data.text", "log.every_steps", "model.norm", "optim.lr"]
    told = problems({"model.num_kv_heads": 3, "model.moe.top_k": 9, "batch.global_batch": 17, "schedule.steps": None})
    assert [problem.split()[0] for problem in told] == [
        "model.num_kv_heads", "model.moe.top_k", "batch.global_batch", "schedule.steps"
    ]  # fmt: skip


def test_a_password_is_not_repeated():
    assert "hunter2" not in str(problems({"checkpoint.remote": "s3://me:hunter2@bucket/runs/a"}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optim.freeze": ["gate", "router"]}, "optim.freeze names 'gate', but a model has router, experts, dense"),
        (DENSE | {"optim.freeze": ["experts"]}, "but the model is dense, and nothing would be left"),
        ({"optim.freeze": ["dense", "experts", "router"]}, "optim.freeze names every part of the model"),
    ],
)
def test_what_is_frozen_is_there_and_leaves_something(settings, told):
    (problem,) = problems(settings)
    assert told in problem
    check_settings({"optim.freeze": ["dense"]})
