"""The tensors of a Hugging Face checkpoint, and where each lies in ours. No torch.

Every one of theirs is one interval of one of ours, flattened: an expert's gate is the first half of its rows of
``experts.w_in``, the queries are the first rows of ``attention.qkv``. So either is written from the other one tensor at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.config.schema import ModelConfig
from moetrain.hub.families import Family, shared_kind

IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias")
"""Names of buffers that old checkpoints hold and nobody reads."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of theirs."""

    name: str
    shape: tuple[int, ...]
    """Theirs."""
    ours: str
    """Full name in our checkpoint, e.g. ``blocks.0.attention.qkv.weight/fp32``; empty: we have no such tensor, and it
    is all 0."""
    begin: int = 0
    """Where it begins in ours, flattened, elements."""
    transposed: bool = False
    """Whether ours has its two dimensions the other way round (GPT-2's Conv1D)."""

    @property
    def is_state(self) -> bool:
        """Whether it is kept beside the weights, in fp32, and not learned by gradients."""
        return self.ours.endswith("/state")

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def parts_of(model: ModelConfig, family: Family) -> Iterator[Part]:
    """Every tensor of a model, from the embedding up."""
    yield from _gpt2(model) if family.model_type == "gpt2" else _llama(model, family)


def _gpt2(model: ModelConfig) -> Iterator[Part]:
    width, hidden = model.d_model, model.d_ff
    yield _whole("transformer.wte.weight", "embedding.weight", model.vocab_size, width)
    yield _whole("transformer.wpe.weight", "positions.weight", model.context, width)
    for i in range(model.num_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        for name, own, inputs, outputs in (
            ("attn.c_attn", "attention.qkv", width, 3 * width),
            ("attn.c_proj", "attention.out", width, width),
            ("mlp.c_fc", "feed_forward.w_in", width, hidden),
            ("mlp.c_proj", "feed_forward.w_out", hidden, width),
        ):
            yield Part(name=f"{theirs}.{name}.weight", shape=(inputs, outputs), ours=f"{ours}.{own}.weight/fp32",
                       transposed=True)  # fmt: skip
            yield _bias(f"{theirs}.{name}", f"{ours}.{own}", outputs, has=model.bias)
        for name, own in (("ln_1", "attention_norm"), ("ln_2", "feed_forward_norm")):
            yield _whole(f"{theirs}.{name}.weight", f"{ours}.{own}.weight", width)
            yield _bias(f"{theirs}.{name}", f"{ours}.{own}", width, has=model.bias)
    yield _whole("transformer.ln_f.weight", "norm.weight", width)
    yield _bias("transformer.ln_f", "norm", width, has=model.bias)
    if not model.tie_embeddings:
        yield _whole("lm_head.weight", "head.weight", model.vocab_size, width)


def _llama(model: ModelConfig, family: Family) -> Iterator[Part]:
    width = model.d_model
    yield _whole("model.embed_tokens.weight", "embedding.weight", model.vocab_size, width)
    for i in range(model.num_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        yield _whole(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", width)
        yield from _attention(model, f"{theirs}.self_attn", f"{ours}.attention")
        yield _whole(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight", width)
        if model.moe is not None and (i + 1) % model.moe.every == 0:
            yield from _sparse(model, family, theirs, f"{ours}.feed_forward")
        else:
            names = ("gate_proj", "up_proj", "down_proj")
            yield from _gated(f"{theirs}.mlp", f"{ours}.feed_forward.w_{{}}.weight", width, model.d_ff, names=names)
            if model.bias:
                biases = (("gate_proj", "w_in", 0, model.d_ff), ("up_proj", "w_in", model.d_ff, model.d_ff),
                          ("down_proj", "w_out", 0, width))  # fmt: skip
                for name, own, begin, size in biases:
                    yield Part(name=f"{theirs}.mlp.{name}.bias", shape=(size,), begin=begin,
                               ours=f"{ours}.feed_forward.{own}.bias/fp32")  # fmt: skip
    yield _whole("model.norm.weight", "norm.weight", width)
    if not model.tie_embeddings:
        yield _whole("lm_head.weight", "head.weight", model.vocab_size, width)


def _attention(model: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
    width, d_head = model.d_model, model.d_head or model.d_model // model.num_heads
    query, key = model.num_heads * d_head, (model.num_kv_heads or model.num_heads) * d_head
    begin = 0
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        yield Part(name=f"{theirs}.{name}.weight", shape=(rows, width), ours=f"{ours}.qkv.weight/fp32",
                   begin=begin * width)  # fmt: skip
        if model.bias:
            yield Part(name=f"{theirs}.{name}.bias", shape=(rows,), ours=f"{ours}.qkv.bias/fp32", begin=begin)
        begin += rows
    yield _whole(f"{theirs}.o_proj.weight", f"{ours}.out.weight", width, query)
    if model.bias:
        yield _bias(f"{theirs}.o_proj", f"{ours}.out", width, has=True)
    if model.qk_norm is not None:
        for name, rows in (("q_norm", query), ("k_norm", key)):
            yield _whole(
                f"{theirs}.{name}.weight", f"{ours}.{name}.weight", d_head if model.qk_norm == "head" else rows
            )


def _sparse(model: ModelConfig, family: Family, theirs: str, ours: str) -> Iterator[Part]:
    moe, width = model.moe, model.d_model
    assert moe is not None
    hidden, kind = moe.d_expert or model.d_ff, family.model_type
    block = f"{theirs}.block_sparse_moe" if kind == "mixtral" else f"{theirs}.mlp"
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    yield _whole(f"{block}.gate.weight", f"{ours}.router.weight", moe.num_experts, width)
    if kind == "glm4_moe":
        yield Part(name=f"{block}.gate.e_score_correction_bias", shape=(moe.num_experts,),
                   ours=f"{ours}.router.bias_E/state")  # fmt: skip
    for expert in range(moe.num_experts):
        yield from _gated(f"{block}.experts.{expert}", f"{ours}.experts.w_{{}}", width, hidden, names=names,
                          expert=expert)  # fmt: skip
    if shared_kind(moe) != "none":
        name = "shared_expert" if kind == "qwen2_moe" else "shared_experts"
        yield from _gated(f"{block}.{name}", f"{ours}.shared.w_{{}}.weight", width, moe.num_shared_experts * hidden,
                          names=names)  # fmt: skip
    if moe.shared_gate:
        yield _whole(f"{block}.shared_expert_gate.weight", f"{ours}.shared.gate.weight", 1, width)


def _gated(
    theirs: str, ours: str, width: int, hidden: int, *, names: tuple[str, str, str], expert: int = 0
) -> Iterator[Part]:
    """Gate, up and down of a feed-forward; ``ours`` with {} for in and out."""
    gate, up, down = names
    begin = 2 * expert * hidden * width
    yield Part(name=f"{theirs}.{gate}.weight", shape=(hidden, width), ours=f"{ours.format('in')}/fp32", begin=begin)
    yield Part(name=f"{theirs}.{up}.weight", shape=(hidden, width), ours=f"{ours.format('in')}/fp32",
               begin=begin + hidden * width)  # fmt: skip
    yield Part(name=f"{theirs}.{down}.weight", shape=(width, hidden), ours=f"{ours.format('out')}/fp32",
               begin=expert * hidden * width)  # fmt: skip


def _whole(theirs: str, ours: str, *shape: int) -> Part:
    return Part(name=theirs, shape=shape, ours=f"{ours}/fp32")


def _bias(theirs: str, ours: str, size: int, *, has: bool) -> Part:
    return Part(name=f"{theirs}.bias", shape=(size,), ours=f"{ours}.bias/fp32" if has else "")
