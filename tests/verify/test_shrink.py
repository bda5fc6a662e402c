"""A shrunk run is small, passes the rules of training, and keeps what a layout could get wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moetrain.cli.options import Options, settings
from moetrain.compose import presets
from moetrain.config.checks import check, resolve
from moetrain.config.freeze import flatten, to_dict
from moetrain.config.routers import ROUTERS
from moetrain.config.schema import MoEConfig, RunConfig
from moetrain.plan.flops import count_parameters
from moetrain.verify.layouts import parse, usual
from moetrain.verify.shrink import Split, dependences, lay_out, shrink, split_of

SIZES = {"model.vocab_size", "model.context", "model.num_layers", "model.d_model", "model.num_heads",
         "model.num_kv_heads", "model.d_head", "model.d_ff", "model.init_std", "model.dtype", "model.moe.num_experts",
         "model.moe.top_k", "model.moe.top_groups", "model.moe.d_expert", "model.moe.every",
         "model.moe.num_shared_experts", "model.moe.dropout", "model.moe.balance_scope"}  # fmt: skip
EXTRA = {"expert_choice": ["allow_noncausal=true"], "sinkhorn": ["allow_noncausal=true"], "switch": ["top_k=1"],
         "hash": ["top_k=1"], "dense": ["top_k=8"]}  # fmt: skip


def run_of(*words: str) -> RunConfig:
    return settings(Options.read([*words, "launch.processes=2"]))[0]


def moe_of(run: RunConfig) -> MoEConfig:
    assert run.model.moe is not None
    return run.model.moe


def assert_usable(run: RunConfig) -> RunConfig:
    """Shrunk, it is small and passes the rules of training on every usual layout."""
    layouts = usual(run)
    small = shrink(run, layouts=layouts, steps=3).run
    assert count_parameters(small.model).total < 300_000
    for layout in layouts:
        laid_out = resolve(lay_out(small, layout), default_processes=1)
        check(laid_out, flatten(to_dict(laid_out)))
        assert (laid_out.launch.processes, laid_out.parallel.expert_parallel) == (layout.ranks, layout.expert_parallel)
    return small


@pytest.mark.parametrize("preset", presets("model"))
def test_a_preset_keeps_all_but_its_sizes(preset):
    run = run_of(f"model={preset}")
    small = assert_usable(run)
    before, after = flatten(to_dict(run)), flatten(to_dict(small))
    assert {n for n in before if n.startswith("model.") and before[n] != after[n]} <= SIZES
    for kind in ("beta1", "beta2", "weight_decay"):
        assert getattr(small.optim, kind) == getattr(run.optim, kind)
    assert small.seed == run.seed
    assert (small.model.moe is None) == (run.model.moe is None)
    if run.model.moe and small.model.moe:
        assert small.model.moe.top_k == run.model.moe.top_k
        assert small.model.moe.every == run.model.moe.every
        assert small.model.num_layers >= 2


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_stays_what_it_is(router):
    run = run_of(f"model.moe.router={router}", *(f"model.moe.{word}" for word in EXTRA.get(router, [])))
    assert moe_of(assert_usable(run)).router == router


def test_grouped_query_attention_and_wide_heads_stay_so():
    mixtral = assert_usable(run_of("model=mixtral_8x7b")).model
    assert 1 < (mixtral.num_kv_heads or 0) < mixtral.num_heads
    glam = assert_usable(run_of("model=glam_64b_64e")).model
    assert glam.num_heads * (glam.d_head or 0) > glam.d_model
    single = assert_usable(run_of("model.num_kv_heads=1")).model
    assert single.num_kv_heads == 1 < single.num_heads


def test_many_experts_in_groups_stay_selectable():
    run = run_of("model.moe.router=sigmoid_bias", "model.moe.num_experts=256", "model.moe.top_k=8",
                 "model.moe.num_groups=8", "model.moe.top_groups=4", "model.moe.num_shared_experts=1",
                 "model.moe.shared_gate=true")  # fmt: skip
    moe = moe_of(assert_usable(run))
    assert (moe.num_groups, moe.top_groups, moe.top_k, moe.num_shared_experts) == (8, 4, 8, 1)
    assert moe.top_k < moe.num_experts <= 16


def test_a_small_model_is_left_as_it_is():
    words = [
        "model.d_model=24",
        "model.num_heads=3",
        "model.num_kv_heads=1",
        "model.num_layers=1",
        "model.vocab_size=50",
    ]
    run = run_of(*words, "model.moe.num_experts=4", "model.moe.top_k=3")
    small = assert_usable(run).model
    for name in ("d_model", "num_heads", "num_kv_heads", "num_layers", "vocab_size", "init_std"):
        assert getattr(small, name) == getattr(run.model, name)
    assert (moe_of(assert_usable(run)).num_experts, moe_of(assert_usable(run)).top_k) == (4, 3)


def test_what_is_changed_is_named():
    run = run_of("model.moe.dropout=0.3", "batch.sequence_length=100")
    shrunk = shrink(run, layouts=[parse("ep2_zero1")], steps=2)
    assert shrunk.changed["model.moe.dropout"] == (0.3, 0.0)
    assert shrunk.changed["model.d_model"] == (128, 32)
    assert "model.moe.top_k" not in shrunk.changed
    assert shrunk.run.batch.sequence_length < shrunk.run.model.context, "shorter than the context, as it was"


@pytest.mark.parametrize(
    ("moe", "split"),
    [
        (MoEConfig(balance_scope="sequence"), Split()),
        (MoEConfig(router="hash", top_k=1), Split()),
        (MoEConfig(balance_scope="micro_batch"), Split(accumulation=2, ranks=4)),
        (MoEConfig(balance_scope="sequence", capacity_factor=1.0), Split(accumulation=2, ranks=4)),
        (MoEConfig(balance_scope="sequence", router="gshard"), Split(accumulation=2, ranks=4)),
        (MoEConfig(balance_scope="sequence", jitter=0.01), Split(accumulation=2, ranks=4)),
    ],
)
def test_one_process_divides_the_batch_as_far_as_the_settings_need(moe, split):
    run = run_of()
    run = replace(run, model=replace(run.model, moe=moe))
    assert split_of(run, parse("ranks4_ep2_zero1_acc2")) == split
    assert bool(list(dependences(run))) == (split != Split())
    assert all(each.setting.startswith("model.moe.") and each.reason for each in dependences(run))
