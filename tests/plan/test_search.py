"""The search: what fits, in which order, and what is said of what does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from moetrain.compose import compose, compose_file
from moetrain.config.freeze import freeze
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.plan.cluster import Cluster, read_cluster
from moetrain.plan.flops import count_parameters, flops_per_token
from moetrain.plan.layout import Layout, Offer, everything, offered
from moetrain.plan.memory.device import memory_of
from moetrain.plan.search import Answer, Question, global_batch, search

H100 = read_cluster(compose_file("cluster", "h100_ib"), name="h100_ib")
MODEL = ModelConfig(vocab_size=32000, context=2048, num_layers=16, d_model=2048, num_heads=16, d_ff=4096, dtype="bf16",
                    moe=MoEConfig(num_experts=16, top_k=2))  # fmt: skip
QUESTION = Question(model=MODEL, sequence_length=2048, tokens=1e11, nodes=(2,))
TODAY = Offer(zero_stages=(1, 2), recompute=("none",), offload_optimizer=(False,))


def find(question: Question = QUESTION, *, cluster: Cluster = H100, offer: Offer = TODAY) -> Answer:
    return search(question, cluster, efficiency=0.5, offer=offer, modelled=everything())


def preset(name: str) -> ModelConfig:
    return freeze(compose([f"model={name}"]).settings).model


def test_what_is_found_fits_and_is_offered() -> None:
    answer = find()
    assert len(answer.plans) > 5
    for plan in answer.plans:
        assert TODAY.takes(plan.layout)
        assert plan.memory.total <= 80e9
        assert plan.layout.global_batch % 16 == 0
        assert plan.memory == memory_of(MODEL, plan.layout, sequence_length=2048)
    assert answer.missing == ""


def test_masks_of_documents_take_room() -> None:
    masked = find(replace(QUESTION, mask_documents=True))
    for plan in masked.plans:
        assert plan.memory == memory_of(MODEL, plan.layout, sequence_length=2048, mask_documents=True)
    # two bytes of a score, 2048 x 2048 for each sequence
    of_sequence = 2 * 2048**2
    with_masks = {plan.layout: plan.memory.activations for plan in masked.plans}
    without = {plan.layout: plan.memory.activations for plan in find().plans}
    added = {
        round((with_masks[layout] - without[layout]) / layout.micro_batch) for layout in with_masks.keys() & without
    }
    assert added <= {0, of_sequence}, "0 where the step is the fullest moment"
    assert of_sequence in added


def test_every_layout_is_either_found_or_refused() -> None:
    answer = find(cluster=replace(H100, memory_gb=30.0))
    per_gpu = global_batch(QUESTION, gpus=16) // 16
    micro_batches = sum(per_gpu % size == 0 for size in range(1, min(per_gpu, 64) + 1))
    assert len(answer.plans) + sum(each.many for each in answer.refusals) == micro_batches * 2 * 5
    assert {each.reason for each in answer.refusals} == {f"memory, ZeRO-{n}, recompute none" for n in (1, 2)}
    assert all("GB of 30 with EP" in each.nearest for each in answer.refusals)


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        ("time", lambda plan: plan.days),
        ("cost", lambda plan: plan.cost),
        ("gpus", lambda plan: plan.layout.gpus),
    ],
)
def test_the_best_comes_first(objective: str, value: Any) -> None:
    answer = find(replace(QUESTION, nodes=(1, 2, 4), objective=objective))
    values = [value(plan) for plan in answer.plans]
    assert values == sorted(values)
    assert len({plan.nodes for plan in answer.plans}) == 3


def test_the_sums_of_a_plan_are_those_of_its_parts() -> None:
    plan = find().plans[0]
    tokens = plan.layout.global_batch * 2048
    assert plan.steps == math.ceil(1e11 / tokens)
    assert plan.tokens_per_second == pytest.approx(tokens / plan.time.total)
    flops = plan.tokens_per_second * flops_per_token(MODEL, sequence_length=2048)
    assert plan.mfu == pytest.approx(flops / (16 * 989.5e12))
    assert plan.days == pytest.approx(plan.steps * plan.time.total / 86400 / (1 - plan.saving.lost))
    assert plan.gpu_hours == pytest.approx(plan.days * 24 * 16)
    assert plan.cost == pytest.approx(plan.gpu_hours * 3.0)
    assert plan.energy_kwh == pytest.approx(plan.gpu_hours * 1.275)


def test_checkpoints_are_as_far_apart_as_young_says() -> None:
    """Young 1974: sqrt(2 x time to save x time between failures); no other interval loses less."""
    saving = find().plans[0].saving
    between = 50700 / 16 * 3600
    assert saving.size_bytes == 12 * count_parameters(MODEL).total
    assert saving.write_seconds == pytest.approx(saving.size_bytes / 2e9)
    assert saving.interval_seconds == pytest.approx(math.sqrt(2 * saving.write_seconds * between))
    for other in (0.5, 0.9, 1.1, 2.0):
        interval = other * saving.interval_seconds
        assert saving.write_seconds / interval + interval / (2 * between) > saving.lost


def test_without_price_and_power_nothing_is_made_up() -> None:
    plan = find(cluster=replace(H100, price_per_gpu_hour=None, watts_per_gpu=None)).plans[0]
    assert (plan.cost, plan.energy_kwh) == (None, None)


def test_a_batch_that_does_not_divide_is_told() -> None:
    answer = find(replace(QUESTION, global_batch=100))
    assert not answer.plans
    assert "100 sequences on 16 devices" in answer.refusals[0].nearest


@pytest.mark.parametrize(("tokens", "gpus", "batch"), [(1e12, 16, 2048), (1e12, 4096, 4096), (1e6, 2, 2)])
def test_a_batch_nobody_gave_is_about_four_million_tokens(tokens: float, gpus: int, batch: int) -> None:
    assert global_batch(replace(QUESTION, tokens=tokens), gpus=gpus) == batch


def test_what_train_does_not_run_is_told_apart() -> None:
    tight = replace(H100, memory_gb=12.0)
    answer = find(cluster=tight)
    assert not answer.plans
    assert answer.beyond is not None
    assert not TODAY.takes(answer.beyond.layout)
    assert find(cluster=tight, offer=everything()).plans[0] == answer.beyond, "the day train runs it, it is found"


def test_memory_that_nothing_fits_into_is_told_in_numbers() -> None:
    answer = find(cluster=replace(H100, memory_gb=1.0))
    assert not answer.plans
    assert answer.beyond is None
    assert "Even spread over all 16 devices" in answer.missing
    assert "GB of 1 on each" in answer.missing


def test_an_offloaded_optimizer_needs_room_on_the_host() -> None:
    offload = Offer(zero_stages=(2,), recompute=("full",), offload_optimizer=(True,))
    assert find(offer=offload).plans
    small = find(cluster=replace(H100, host_memory_gb=1.0), offer=offload)
    assert not small.plans
    assert any(each.reason.startswith("host memory") for each in small.refusals)


def test_the_8_x_220b_model_fits_128_h100s_with_what_is_not_offered_yet_and_64_with_nothing() -> None:
    """1.76 T parameters x 16 bytes are 28 TB; 64 x 80 GB are 5, and the hosts of 8 nodes have 16."""
    model = preset("gpt4_8x220b")
    found = {}
    for nodes in (8, 16, 32, 64, 128, 256, 512):
        question = Question(model=model, sequence_length=8192, tokens=13e12, nodes=(nodes,))
        answer = find(question, offer=offered("bf16"))
        best = answer.plans[0] if answer.plans else answer.beyond
        found[8 * nodes] = None if best is None else best.layout
    assert found.pop(64) is None
    for gpus, layout in found.items():
        assert isinstance(layout, Layout)
        assert (layout.zero_stage, layout.recompute, layout.expert_parallel) == (3, "full", 8)
        assert layout.offload_optimizer == (gpus < 2048), "the state alone is 16 bytes a parameter"


def test_a_large_search_takes_no_time() -> None:
    import time

    started = time.process_time()
    find(replace(QUESTION, nodes=tuple(2**power for power in range(8))))
    assert time.process_time() - started < 5
