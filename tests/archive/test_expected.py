"""What must be there, worked out without a weight, is what a model with weights has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moetrain.archive.expected import expected_tensors
from moetrain.compose import compose, presets
from moetrain.config.freeze import freeze, to_dict
from moetrain.config.routers import ROUTERS
from moetrain.config.schema import ModelConfig, MoEConfig, RunConfig
from moetrain.errors import ConfigError
from moetrain.model.build import build_model
from moetrain.plan.flops import count_parameters

SMALL = ModelConfig(vocab_size=64, context=8, num_layers=2, d_model=16, num_heads=2, d_ff=32)


def settings(model: ModelConfig) -> dict[str, object]:
    run = RunConfig(model=model)
    return to_dict(replace(run, batch=replace(run.batch, micro_batch=8, sequence_length=8)))


MODELS = {
    router: replace(SMALL, moe=MoEConfig(num_experts=4, router=router, top_k=1 if router in ("switch", "hash") else 2,
                                         allow_noncausal=True)) for router in ROUTERS
} | {
    "dense": replace(SMALL, moe=None),
    "learned positions, biases, untied": replace(SMALL, positions="learned", bias=True, norm="layernorm",
                                                 tie_embeddings=False),
    "every second block, shared experts": replace(SMALL, moe=MoEConfig(num_experts=4, every=2, num_shared_experts=1,
                                                                       shared_gate=True)),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_are_those_of_the_model(model):
    gpt = build_model(MODELS[model], expert_V=torch.zeros(64, dtype=torch.int64))
    expected = expected_tensors(settings(MODELS[model]))
    assert expected.parameters == {name: tuple(each.shape) for name, each in gpt.named_parameters()}
    assert expected.states == {name: tuple(each.shape) for name, each in gpt.moe_state().items()}
    moe_blocks = [i for i, block in enumerate(gpt.blocks) if hasattr(block.feed_forward, "router")]
    names = {f"blocks.{i}.feed_forward.experts.{name}" for i in moe_blocks for name in ("w_in", "w_out")}
    moe = MODELS[model].moe
    assert expected.experts == (dict.fromkeys(names, moe.num_experts) if moe else {})


@pytest.mark.parametrize("model", presets("model"))
def test_a_model_of_any_size_is_told_at_once(model):
    run = freeze(compose([f"model={model}"]).settings)
    assert expected_tensors(to_dict(run)).numel == count_parameters(run.model).total


def test_settings_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="d_model"):
        expected_tensors(settings(replace(SMALL, d_model=-1)))
