"""Counting parameters and FLOPs: against published models, and against plain loops over every matrix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import yaml

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.plan.flops import count_parameters, flops_per_token, format_count, is_moe_block

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"), key=lambda path: path.stem)

MIXED = ModelConfig(
    vocab_size=50,
    context=16,
    num_layers=5,
    d_model=12,
    num_heads=3,
    num_kv_heads=1,
    d_head=5,
    d_ff=20,
    activation="geglu",
    norm="layernorm",
    positions="learned",
    bias=True,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=7, top_k=3, d_expert=9, every=2, activation="relu"),
)
"""No two sizes alike, so that no mistaken one passes for the right one."""
INHERITING = replace(MIXED, num_kv_heads=None, d_head=None, bias=False, moe=MoEConfig(num_experts=7, top_k=3))
RMSNORM = replace(MIXED, norm="rmsnorm", positions="rope", tie_embeddings=True)
DENSE = replace(MIXED, activation="gelu", moe=None)
SHARED = replace(
    MIXED,
    moe=MoEConfig(num_experts=7, top_k=3, router="noisy_top_k", d_expert=9, num_shared_experts=2, shared_gate=True),
)
HASHED = replace(MIXED, moe=MoEConfig(num_experts=7, top_k=1, router="hash", num_shared_experts=1))
SMALL_MODELS = pytest.mark.parametrize(
    "model",
    [MIXED, INHERITING, RMSNORM, DENSE, SHARED, HASHED],
    ids=["mixed", "inheriting", "rmsnorm", "dense", "shared", "hashed"],
)


def load(path: Path) -> ModelConfig:
    """A preset as Hydra would compose it, without Hydra."""
    settings = yaml.safe_load(path.read_text())
    group = next(entry["moe"] for entry in settings.pop("defaults") if entry != "_self_")
    moe = settings.pop("moe", {})
    return ModelConfig(**settings, moe={"preset": MoEConfig(**moe), "none": None}[group])


def preset(name: str) -> ModelConfig:
    return load(next(path for path in PRESETS if path.stem == name))


def maps(model: ModelConfig, block: int) -> Iterator[tuple[str, int, int, bool]]:
    """Every linear map of one block, written down one by one: part, inputs, outputs, may it have a bias."""
    d_head = model.d_head or model.d_model // model.num_heads
    yield "attention", model.d_model, model.num_heads * d_head, True
    for _ in ("key", "value"):
        yield "attention", model.d_model, (model.num_kv_heads or model.num_heads) * d_head, True
    yield "attention", model.num_heads * d_head, model.d_model, True
    moe = model.moe
    if moe is None or (block + 1) % moe.every:
        nets = [("dense_ffn", model.activation, model.d_ff, True)]
    else:
        for _ in range({"hash": 0, "noisy_top_k": 2}.get(moe.router, 1)):
            yield "router", model.d_model, moe.num_experts, False
        activation, width = moe.activation or model.activation, moe.d_expert or model.d_ff
        if moe.shared_gate:
            yield "shared_experts", model.d_model, 1, False
        nets = [("experts", activation, width, False)] * moe.num_experts
        nets += [("shared_experts", activation, width, False)] * moe.num_shared_experts
    for part, activation, hidden, bias in nets:
        yield part, model.d_model, hidden, bias
        if activation.endswith("glu"):
            yield part, model.d_model, hidden, bias
        yield part, hidden, model.d_model, bias


def tensors(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model, written down one by one: part and shape."""

    def norm() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "norm", (model.d_model,)
        if model.norm == "layernorm" and model.bias:
            yield "norm", (model.d_model,)

    yield "embedding", (model.vocab_size, model.d_model)
    if model.positions == "learned":
        yield "positions", (model.context, model.d_model)
    for block in range(model.num_layers):
        yield from norm()
        yield from norm()
        for part, inputs, outputs, may_have_bias in maps(model, block):
            yield part, (outputs, inputs)
            if model.bias and may_have_bias:
                yield part, (outputs,)
    yield from norm()
    if not model.tie_embeddings:
        yield "output", (model.vocab_size, model.d_model)


@SMALL_MODELS
def test_each_part_is_the_sum_over_its_tensors(model: ModelConfig) -> None:
    sizes: Counter[str] = Counter()
    for part, shape in tensors(model):
        sizes[part] += prod(shape)
    count = count_parameters(model)
    for part in ("embedding", "positions", "attention", "dense_ffn", "router", "experts", "shared_experts", "norm",
                 "output"):  # fmt: skip
        assert getattr(count, part) == sizes[part], part
    assert count.total == sizes.total()


def test_active_leaves_out_the_experts_that_do_not_answer() -> None:
    count = count_parameters(MIXED)
    one_expert = 2 * 12 * 9
    assert count.total - count.active == 2 * (7 - 3) * one_expert  # 2 MoE blocks, 4 of 7 experts idle
    every_expert_answers = replace(MIXED, moe=MoEConfig(num_experts=7, top_k=7))
    assert count_parameters(every_expert_answers).active == count_parameters(every_expert_answers).total


@pytest.mark.parametrize(
    ("every", "sparse"),
    [(1, [True] * 5), (2, [False, True, False, True, False]), (3, [False, False, True, False, False])],
)
def test_the_last_block_of_each_n_is_sparse(every: int, sparse: list[bool]) -> None:
    model = replace(MIXED, moe=MoEConfig(every=every))
    assert [is_moe_block(model, block=block) for block in range(5)] == sparse


def test_a_dense_model_has_no_sparse_block() -> None:
    assert not any(is_moe_block(DENSE, block=block) for block in range(5))


@SMALL_MODELS
@pytest.mark.parametrize("sequence_length", [1, 6, 16])
def test_flops_of_a_sequence_are_a_loop_over_its_matrix_products(model: ModelConfig, sequence_length: int) -> None:
    d_head = model.d_head or model.d_model // model.num_heads
    forward = 2 * sequence_length * model.d_model * model.vocab_size
    for block in range(model.num_layers):
        expert_share = 0
        for part, inputs, outputs, _ in maps(model, block):
            product = 2 * sequence_length * inputs * outputs
            if part == "experts":
                expert_share += product
            else:
                forward += product
        if model.moe is not None:
            forward += expert_share * model.moe.top_k // model.moe.num_experts
        for _ in range(model.num_heads):
            scores = 2 * sequence_length * d_head * sequence_length  # S x d times d x S
            answers = 2 * sequence_length * sequence_length * d_head  # S x S times S x d
            forward += (scores + answers) // 2  # half of the S x S square is masked
    backward = 2 * forward
    assert sequence_length * flops_per_token(model, sequence_length=sequence_length) == forward + backward


def test_flops_come_near_six_times_the_active_parameters_and_half_of_palms_attention_term() -> None:
    """PaLM, arXiv:2204.02311, appendix B: 6N + 12 L H Q T, over all keys; ours looks back on half of them."""
    model, length = preset("mixtral_8x7b"), 4096
    embedding = 32000 * 4096  # looked up, not multiplied
    palm_like = 6 * (count_parameters(model).active - embedding) + 6 * 32 * 32 * 128 * length
    assert flops_per_token(model, sequence_length=length) == pytest.approx(palm_like, rel=1e-4)  # norms


EXACT, ONE_PERCENT = 0.0, 0.01
PUBLISHED_TOTALS = [
    ("gpt2_124m", 124_439_808, EXACT, 'the checkpoint "gpt2", counted by transformers'),
    ("gpt3_175b", 175.0e9, ONE_PERCENT, "arXiv:2005.14165, table 2.1"),
    ("mixtral_8x7b", 46_702_792_704, EXACT, "mistralai/Mixtral-8x7B-v0.1, counted by transformers"),
    ("mixtral_8x7b", 46.7e9, ONE_PERCENT, "Mistral AI, Mixtral of experts, 11 December 2023"),
    ("mixtral_8x22b", 141e9, ONE_PERCENT, "Mistral AI, Cheaper, Better, Faster, Stronger, 17 April 2024"),
    ("switch_base_128e", 7_415_217_408, ONE_PERCENT, "google/switch-base-128, with the cross-attention ours lacks"),
    ("gpt4_8x220b", 8 * 220e9, ONE_PERCENT, "the rumour our shapes are made for"),
]
PUBLISHED_ACTIVE = [
    ("glam_64b_64e", 96.6e9, ONE_PERCENT, "arXiv:2112.06905, table 4"),
    ("mixtral_8x7b", 12.9e9, ONE_PERCENT, "Mistral AI, Mixtral of experts, 11 December 2023"),
    ("mixtral_8x22b", 39e9, ONE_PERCENT, "Mistral AI, Cheaper, Better, Faster, Stronger, 17 April 2024"),
]


@pytest.mark.parametrize(("name", "total", "tolerance", "source"), PUBLISHED_TOTALS)
def test_a_preset_has_the_published_parameters(name: str, total: float, tolerance: float, source: str) -> None:
    assert count_parameters(preset(name)).total == pytest.approx(total, rel=tolerance, abs=0), source


@pytest.mark.parametrize(("name", "active", "tolerance", "source"), PUBLISHED_ACTIVE)
def test_a_preset_has_the_published_active_parameters(name: str, active: float, tolerance: float, source: str) -> None:
    assert count_parameters(preset(name)).active == pytest.approx(active, rel=tolerance, abs=0), source


def test_glam_has_the_published_1_2_t() -> None:
    """arXiv:2112.06905, table 4, prints two digits; with 32 MoE and 32 dense blocks (section 4)."""
    model = preset("glam_64b_64e")
    assert f"{count_parameters(model).total / 1e12:.1f}" == "1.2"
    assert sum(is_moe_block(model, block=block) for block in range(model.num_layers)) == 32


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_head_of_a_preset_tells_its_source_and_its_true_size(path: Path) -> None:
    head = " ".join(line.lstrip("# ") for line in path.read_text().split("defaults:")[0].splitlines())
    assert "Source: " in head
    told = re.search(r"(\S+ [KMBT]) parameters, (\S+ [KMBT]) active per token\.", head)
    assert told is not None, head
    count = count_parameters(load(path))
    assert told.groups() == (format_count(count.total), format_count(count.active))


def test_tiny_without_experts_is_the_dense_model_of_the_same_active_size() -> None:
    tiny = preset("tiny")
    sparse, dense = count_parameters(tiny), count_parameters(replace(tiny, moe=None))
    assert sparse.dense_ffn == 0
    assert dense.dense_ffn == sparse.active_experts
    assert dense.total == sparse.active - sparse.router


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 K"),
        (9_994, "9.99 K"),
        (9_996, "10.0 K"),
        (99_949, "99.9 K"),
        (99_951, "100 K"),
        (999_499, "999 K"),
        (999_500, "1.00 M"),
        (46_702_792_704, "46.7 B"),
        (1_755_650_736_128, "1.76 T"),
        (12_345 * 10**12, "12,345 T"),
    ],
)
def test_counts_are_told_in_three_digits(count: int, text: str) -> None:
    assert format_count(count) == text
