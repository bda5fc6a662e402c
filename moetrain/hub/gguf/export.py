"""A checkpoint as a GGUF file, which llama.cpp and its kin read: weights and tokenizer in one.

Names of tensors and keys are those of llama.cpp's own library, ``gguf``; what its graphs can say is written down here,
as it stands in llama.cpp's src/models/. One tensor is in memory at a time, which is a third of a block's experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.archive.stored import Stored
from moetrain.archive.written import made_whole
from moetrain.config.routers import resolve_router
from moetrain.config.schema import ModelConfig
from moetrain.data.corpus import TOKENIZER
from moetrain.data.tokenizer import load_tokenizer
from moetrain.errors import ConfigError
from moetrain.hub.card import model_card
from moetrain.hub.export import DTYPES, Exported, read_part, template_of
from moetrain.hub.families import Family, family_of, weighing
from moetrain.hub.generate import newest_or
from moetrain.hub.gguf.vocabulary import Vocabulary, vocabulary_of
from moetrain.hub.tensors import Part, parts_of
from moetrain.instruct.template import chat_template

FILE = "model.gguf"
ARCHITECTURES = {"mixtral": "llama", "llama": "llama", "olmoe": "olmoe", "qwen2_moe": "qwen2moe",
                 "qwen3_moe": "qwen3moe", "qwen3": "qwen3"}  # fmt: skip
"""Model type of `transformers` -> architecture of llama.cpp."""
WEIGHINGS = {"mixtral": "renormalized", "olmoe": "softmax", "qwen2_moe": "softmax", "qwen3_moe": "renormalized"}
"""The one way in which each weighs its experts there."""
HEADED = ("olmoe", "qwen2_moe")
"""Those that want the output layer, even where it is the embedding."""
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token."""


@dataclass(frozen=True, kw_only=True)
class _Named:
    """One tensor of the file."""

    name: str
    parts: list[Part]
    """One, or that of each expert."""
    dtype: torch.dtype
    heads: int | None
    """Of a map whose rotary pairs lie side by side there, and half a head apart here."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape if len(self.parts) == 1 else (len(self.parts), *self.parts[0].shape)


def export_gguf(
    run_dir: Path, out: Path, *, step: int | None, dtype: str | None, warn: Callable[[str], None]
) -> Exported:
    """Write a run's model for llama.cpp; it is not held against ours.

    Args:
        out: a directory that is not there yet.
        step: of the checkpoint; None: the newest whole one.
        dtype: of the matrices, one of ``hub.export.DTYPES``; None: that of the run. The rest is fp32.

    Raises:
        ConfigError: llama.cpp cannot say the settings (all in the way are told), ``gguf`` is not installed, or the
            place is taken.
        CheckpointError: the checkpoint is not whole.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError([f"format=gguf needs gguf ({error}): pip install 'moetrain[gguf]'"]) from None
    with made_whole(out) as partial:
        run, directory, manifest = newest_or(run_dir, step=step, warn=warn)
        family = family_of(run.model)
        problems = list(unfit(run.model, family))
        if problems:
            raise ConfigError(problems)
        vocabulary = vocabulary_of(load_tokenizer(run_dir / TOKENIZER))
        wanted, template = DTYPES[dtype or run.model.dtype], template_of(run)
        writer = gguf.GGUFWriter(partial / FILE, ARCHITECTURES[family.model_type])
        writer.add_name(str(run.name))
        _add_settings(writer, run.model, family)
        _add_vocabulary(writer, vocabulary, template=template)
        names = gguf.get_tensor_name_map(_architecture(gguf, family), run.model.num_layers)
        tensors = list(_tensors(run.model, family, names, dtype=wanted, tokens=len(vocabulary.tokens)))
        _write(writer, gguf, tensors, Stored(directory))
        card = model_card(run, manifest, run_dir=run_dir, family=family.architecture, dtype=str(wanted)[6:],
                          checked="not against the model it was made from", use="gguf")  # fmt: skip
        (partial / "README.md").write_text(card, encoding="utf-8")
    return Exported(out, family.architecture, files=1, nbytes=(out / FILE).stat().st_size, parity=None)


def _architecture(gguf: Any, family: Family) -> Any:
    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return by_name[ARCHITECTURES[family.model_type]]


def unfit(model: ModelConfig, family: Family) -> Iterator[str]:
    """Settings that llama.cpp cannot say of a family, a sentence each."""
    kind = family.model_type
    if kind not in ARCHITECTURES:
        yield f"format is gguf, but what leaves as {kind} has no place there: use one of {', '.join(ARCHITECTURES)}"
        return
    moe = model.moe
    activation = model.activation if moe is None else moe.activation or model.activation
    if activation != "swiglu":
        yield f"model.activation is {activation}, but {kind} has swiglu in llama.cpp"
    if model.bias:
        yield f"model.bias is true, but {kind} has no biases in llama.cpp"
    if kind == "olmoe" and (model.num_kv_heads or model.num_heads) != model.num_heads:
        yield f"model.num_kv_heads is {model.num_kv_heads}, but olmoe has as many as query heads in llama.cpp"
    if moe is not None and moe.every > 1:
        yield f"model.moe.every is {moe.every}, but every block of {kind} is sparse in llama.cpp"
    if moe is not None and weighing(resolve_router(moe)) != WEIGHINGS[kind]:
        sums = "1" if WEIGHINGS[kind] == "renormalized" else "less than 1 (renormalize false)"
        yield f"model.moe.router is {moe.router}, but the weights of {kind} sum to {sums} in llama.cpp"


def _add_settings(writer: Any, model: ModelConfig, family: Family) -> None:
    moe, d_head = model.moe, model.d_head or model.d_model // model.num_heads
    width = model.d_ff
    if moe is not None:
        expert = moe.d_expert or model.d_ff
        writer.add_expert_count(moe.num_experts)
        writer.add_expert_used_count(moe.top_k)
        if family.model_type in ("mixtral", "olmoe"):
            width = expert
        else:
            writer.add_expert_feed_forward_length(expert)
        if moe.num_shared_experts:
            writer.add_expert_shared_feed_forward_length(moe.num_shared_experts * expert)
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(width)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads or model.num_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(d_head)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, *, template: dict[str, str] | None) -> None:
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.end_of_text)
    writer.add_eos_token_id(vocabulary.end_of_text)
    # in training, every document began with the end-of-text token
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(chat_template(template))


def _tensors(model: ModelConfig, family: Family, names: Any, *, dtype: torch.dtype, tokens: int) -> Iterator[_Named]:
    """In the order of the file."""
    grouped: dict[str, list[Part]] = {}
    for part in parts_of(model, family):
        if part.name in ROWS:
            # rows past the vocabulary are padding
            part = replace(part, shape=(tokens, *part.shape[1:]))
        name = re.sub(r"\.experts\.\d+\.", ".experts.", part.name)
        grouped.setdefault(name, []).append(part)
    if model.tie_embeddings and family.model_type in HEADED:
        grouped[ROWS[1]] = grouped[ROWS[0]]
    heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads or model.num_heads}
    for name, parts in grouped.items():
        is_small = len(parts[0].shape) == 1 or name.endswith("gate.weight")
        yield _Named(
            name=names.get_name(name, try_suffixes=(".weight",)),
            parts=parts,
            dtype=torch.float32 if is_small else dtype,
            heads=heads.get(name.split(".")[-2]) if ARCHITECTURES[family.model_type] == "llama" else None,
        )


def _write(writer: Any, gguf: Any, tensors: list[_Named], stored: Stored) -> None:
    kinds = gguf.GGMLQuantizationType
    types = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    for each in tensors:
        size = sum(part.numel for part in each.parts) * each.dtype.itemsize
        writer.add_tensor_info(each.name, each.shape, None, size, raw_dtype=types[each.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for each in tensors:
        read = [_as_rotated(read_part(stored, part), heads=each.heads).to(each.dtype) for part in each.parts]
        values = read[0] if len(read) == 1 else torch.stack(read)
        # numpy knows no bf16
        raw = values.contiguous().view(torch.int16) if each.dtype == torch.bfloat16 else values.contiguous()
        writer.write_tensor_data(raw.numpy())
    writer.close()


def _as_rotated(values: Tensor, *, heads: int | None) -> Tensor:
    if heads is None:
        return values
    return values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
