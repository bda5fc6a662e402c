"""Run directories of small models with given settings and drawn weights, for tests of what is done with a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from moetrain.archive.written import write_checkpoint
from moetrain.checkpoint.store import Manifest
from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, to_dict, write_run
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import fingerprint
from moetrain.model.build import build_model, initialize
from moetrain.prepare.directory import prepare

STEP, TOKENS, LOSS = 7, 7 * 512, 3.25


def write_own_run(
    run_dir: Path, model: ModelConfig, tokenizer: Tokenizer, *, moments: bool = False, spread: float = 0.3, **data: Any
) -> None:
    """A run of step 7 whose weights, norms and biases too, are all drawn.

    Args:
        moments: whether the optimizer's are drawn, too, or left out.
        spread: what is added to each weight is normal with this deviation.
        data: settings of the data.
    """
    run = freeze({"name": run_dir.name, "data": data})
    run = resolve(replace(run, run_dir=str(run_dir), model=model), default_processes=1)
    gpt = build_model(run.model, expert_V=torch.arange(model.vocab_size) % 2)
    initialize(gpt, init_std=0.4, seed=3)
    generator = torch.Generator().manual_seed(1)
    held: dict[str, torch.Tensor] = {}
    for name, parameter in gpt.named_parameters():
        held[f"{name}/fp32"] = parameter.detach() + spread * torch.randn(parameter.shape, generator=generator)
        if moments:
            held[f"{name}/exp_avg"] = torch.randn(parameter.shape, generator=generator)
            held[f"{name}/exp_avg_sq"] = torch.rand(parameter.shape, generator=generator)
    for name, state in gpt.moe_state().items():
        if name.endswith("bias_E"):
            state += torch.randn(state.shape, generator=generator) / 4
        held[f"{name}/state"] = state
    manifest = Manifest(step=STEP, tokens=TOKENS, seed=1, world_size=1, expert_parallel=1, run=to_dict(run),
                        data={"tokenizer": fingerprint(tokenizer)}, files=[], has_moments=moments,
                        held_out_loss=LOSS)  # fmt: skip

    def fill(intervals: Any) -> None:
        for name, each in held.items():
            intervals.write(name, 0, each.reshape(-1))

    write_checkpoint(run_dir / "checkpoints", manifest, fill=fill,
                     sizes={name: each.numel() for name, each in held.items()},
                     dtypes={name: each.dtype for name, each in held.items()})  # fmt: skip
    write_run(run, run_dir)
    tokenizer.save(str(run_dir / "tokenizer.json"))


def write_tiny(run_dir: Path, place: Path) -> None:
    """A sparse run with prepared text of its own in ``place``."""
    (place / "texts").mkdir(parents=True)
    for number in range(12):
        (place / "texts" / f"{number}.txt").write_text(f"the state of the union is strong {number} " * (number + 3))
    part = prepare(place / "prepared", text=[str(place / "texts" / "*.txt")], text_column="text", held_out=0.4,
                   vocab_size=290, tokenizer=None, progress=lambda *_: None)  # fmt: skip
    model = ModelConfig(vocab_size=300, context=16, num_layers=2, d_model=16, num_heads=2, d_ff=24,
                        moe=MoEConfig(num_experts=3, d_expert=8))  # fmt: skip
    tokenizer = Tokenizer.from_file(str(part.tokenizer_path))
    write_own_run(run_dir, model, tokenizer, moments=True, prepared=str(part.directory))
