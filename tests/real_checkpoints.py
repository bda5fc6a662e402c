"""Checkpoints of real engines on two ranks, for the tests that look into them (fixture ``real_runs``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from moetrain.checkpoint import state, store
from moetrain.config.checks import resolve
from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.freeze import freeze, to_dict, write_run
from moetrain.config.schema import ModelConfig, MoEConfig, RunConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine

MODEL = ModelConfig(vocab_size=128, context=16, d_model=32, num_layers=2, num_heads=4, d_ff=64,
                    moe=MoEConfig(num_experts=4, top_k=2, d_expert=32, every=1, router="sigmoid_bias"))  # fmt: skip
EXPERTS = 4


def settings() -> RunConfig:
    run = replace(freeze({"name": "small"}), model=MODEL)
    return resolve(replace(run, batch=replace(run.batch, global_batch=8)), default_processes=2)


STEPS = (0, 2, 3)
"""At which each run saves."""
LAYOUTS = {"ep2": {"stage": 1, "expert_parallel": 2}, "dp2": {"stage": 2, "expert_parallel": 1}}
"""Directory of a run -> how its ranks share the work; both train the same model on the same tokens."""


def save_runs(rank: int, place: Path) -> None:
    """Train each layout, and save."""
    for name, layout in LAYOUTS.items():
        _save_run(rank, place / name, **layout)


def _save_run(rank: int, run_dir: Path, *, stage: int, expert_parallel: int) -> None:
    run = settings()
    run = replace(run, parallel=replace(run.parallel, zero_stage=stage, expert_parallel=expert_parallel))
    topology = Topology(world_size=2, rank=rank, expert_parallel=expert_parallel)
    groups = process_groups.make(topology, device=torch.device("cpu"))
    gpt = build_model(run.model, local_experts=topology.local_experts(EXPERTS), expert_group=groups.expert)
    initialize(gpt, init_std=0.1, seed=1)
    config = deepspeed_config(micro_batch=4, accumulation=1, world_size=2, zero_stage=stage, dtype="fp32", clip=1.0)
    adamw = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    engine = Engine(Objective(gpt, loss_weights={}), groups=groups, config=config, optimizer=adamw, clip=1.0)
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            manifest = store.Manifest(step=step, tokens=step * 128, seed=1, world_size=2, run=to_dict(run), data={},
                                      expert_parallel=expert_parallel, files=[])  # fmt: skip
            state.save(run_dir / "checkpoints", engine.fragments(), manifest=manifest, group=groups.control)
        rows = torch.randint(0, 128, (8, 17), generator=torch.Generator().manual_seed(step)).chunk(2)[rank]
        engine.forward_backward(MicroBatch(token_BS=rows[:, :-1].contiguous(), target_BS=rows[:, 1:].contiguous()))
        engine.step(1e-2)
    if rank == 0:
        write_run(run, run_dir)
