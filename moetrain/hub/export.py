"""A checkpoint as a directory that `transformers` loads: safetensors, config.json, tokenizer, model card.

Written beside its place, held against our model, and renamed: what bears the name is whole and says the same. In memory
is one file of weights at a time; the comparison takes the whole model in fp32, once ours and then theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moetrain.archive.stored import Stored
from moetrain.archive.written import made_whole
from moetrain.config.data import sources_of
from moetrain.config.schema import RunConfig
from moetrain.data.build import COUNTED
from moetrain.data.corpus import TOKENIZER
from moetrain.data.tokenizer import end_of_text, load_tokenizer, vocabulary_size
from moetrain.errors import CheckpointError, ConfigError
from moetrain.hub import parity
from moetrain.hub.card import model_card
from moetrain.hub.families import Family, config_of, family_of
from moetrain.hub.generate import newest_or
from moetrain.hub.parity import Parity
from moetrain.hub.tensors import Part, parts_of
from moetrain.instruct.template import TEMPLATE, chat_template

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INDEX, ONE_FILE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    family: str
    files: int
    nbytes: int
    """Of the weights."""
    parity: Parity | None
    """None: nobody asked."""


def export(
    run_dir: Path,
    out: Path,
    *,
    step: int | None,
    dtype: str | None,
    shard_bytes: int,
    check: bool,
    warn: Callable[[str], None],
) -> Exported:
    """Write a run's model for `transformers`.

    Args:
        out: a directory that is not there yet.
        step: of the checkpoint; None: the newest whole one.
        dtype: one of ``DTYPES``; None: that of the run.
        shard_bytes: a file of weights is no larger, unless one tensor is.
        check: hold the result against our model before it gets its name.

    Raises:
        ConfigError: no architecture fits (with every setting in the way), or the place is taken.
        CheckpointError: the checkpoint is not whole, or what was written says something else.
    """
    parity.libraries("export")
    with made_whole(out) as partial:
        run, directory, manifest = newest_or(run_dir, step=step, warn=warn)
        family = family_of(run.model)
        tokenizer = _tokenizer(run_dir, run)
        wanted = DTYPES[dtype or run.model.dtype]
        files = _write_weights(partial, Stored(directory), list(parts_of(run.model, family)), dtype=wanted,
                               shard_bytes=shard_bytes)  # fmt: skip
        template = template_of(run)
        _write_settings(partial, run, family, tokenizer, dtype=wanted, template=template)
        shutil.copyfile(run_dir / TOKENIZER, partial / TOKENIZER)
        held = None
        if check:
            held = parity.compared(run_dir, partial, step=manifest.step, dtype=wanted, warn=warn)
            if not held.holds:
                raise CheckpointError(
                    f"transformers makes something else of what was exported, and it was removed: {held}"
                )
        checked = "not against the model it was made from" if held is None else str(held)
        card = model_card(run, manifest, run_dir=run_dir, family=family.architecture, dtype=str(wanted)[6:],
                          checked=checked, use="text" if template is None else "chat")  # fmt: skip
        (partial / "README.md").write_text(card, encoding="utf-8")
    size = sum((out / name).stat().st_size for name in files)
    return Exported(out, family.architecture, files=len(files), nbytes=size, parity=held)


def _tokenizer(run_dir: Path, run: RunConfig) -> Tokenizer:
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    if vocabulary_size(tokenizer) > run.model.vocab_size:
        raise ConfigError([f"{run_dir / TOKENIZER} has ids up to {vocabulary_size(tokenizer) - 1:,}, but the model "
                           f"knows {run.model.vocab_size:,}: it is not the tokenizer of this model"])  # fmt: skip
    return tokenizer


def _write_weights(
    directory: Path, stored: Stored, parts: list[Part], *, dtype: torch.dtype, shard_bytes: int
) -> list[str]:
    """Names of the files."""
    _, safetensors = parity.libraries("export")
    shards = list(_shards(parts, itemsize=dtype.itemsize, most=shard_bytes))
    names = [ONE_FILE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                                                 for i in range(len(shards))]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        # the bias of a choice moves in steps that bf16 cannot hold
        tensors = {part.name: read_part(stored, part).to(torch.float32 if part.is_state else dtype) for part in shard}
        safetensors.torch.save_file(tensors, str(directory / name), metadata={"format": "pt"})
    if len(shards) > 1:
        where = {part.name: name for name, shard in zip(names, shards, strict=True) for part in shard}
        total = sum(part.numel for part in parts) * dtype.itemsize
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return names


def _shards(parts: list[Part], *, itemsize: int, most: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    for part in parts:
        if shard and sum(each.numel for each in [*shard, part]) * itemsize > most:
            yield shard
            shard = []
        shard.append(part)
    yield shard


def read_part(stored: Stored, part: Part) -> Tensor:
    """A tensor of theirs, from a checkpoint of ours, in its shape.

    Raises:
        CheckpointError: it is not there.
    """
    if not part.ours:
        return torch.zeros(part.shape)
    if part.ours not in stored.tensors:
        raise CheckpointError(f"{stored.directory} holds no {part.ours}: its settings are not those of its weights")
    flat = stored.read(part.ours, part.begin, part.begin + part.numel)
    return flat.view(part.shape[::-1]).T.contiguous() if part.transposed else flat.view(part.shape)


def _write_settings(
    directory: Path,
    run: RunConfig,
    family: Family,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype,
    template: dict[str, str] | None,
) -> None:
    end = end_of_text(tokenizer)
    config = config_of(run.model, family, end_of_text=end, dtype=str(dtype).removeprefix("torch."))
    _write_json(directory / "config.json", config)
    generation: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end}
    padding = range(vocabulary_size(tokenizer), run.model.vocab_size)
    if padding:
        # rows of the embedding that no token has: nobody has taught the model not to choose them
        generation["suppress_tokens"] = list(padding)
    _write_json(directory / "generation_config.json", generation)
    name = tokenizer.id_to_token(end)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": name, "eos_token": name,
            "model_max_length": run.model.context, "clean_up_tokenization_spaces": False}  # fmt: skip
    if template is not None:
        told["chat_template"] = chat_template(template)
    _write_json(directory / "tokenizer_config.json", told)


def template_of(run: RunConfig) -> dict[str, str] | None:
    """How conversations became text for it; None: it has read none."""
    for source in sources_of(run.data).values():
        record = Path(source.prepared) / COUNTED if source.prepared is not None else None
        if record is not None and record.is_file():
            template: dict[str, str] = json.loads(record.read_text(encoding="utf-8"))["template"]
            return template
        if source.format == "instruction":
            return run.data.template or TEMPLATE
    return None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
