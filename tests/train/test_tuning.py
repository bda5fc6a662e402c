"""Parts of a model with a learning rate of their own, or none: as plain PyTorch does it, on any layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine

MODEL = ModelConfig(vocab_size=64, context=8, num_layers=2, d_model=16, num_heads=2, d_ff=24,
                    moe=MoEConfig(num_experts=4, top_k=2, d_expert=8, every=2, balance_scope="sequence"))  # fmt: skip
LR, CLIP, STEPS = 1e-2, 0.1, 3
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8}


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(step))


def batch(tokens: torch.Tensor) -> MicroBatch:
    return MicroBatch(token_BS=tokens[:, :-1].contiguous(), target_BS=tokens[:, 1:].contiguous())


def kind(name: str) -> str:
    return "router" if "router" in name else "experts" if "experts" in name else "dense"


def plainly(rates: dict[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Weights at the beginning and the end, and the norms: frozen weights have no gradient at all."""
    gpt = build_model(MODEL)
    initialize(gpt, init_std=0.2, seed=1)
    begin = {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}
    groups = []
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(rates[kind(name)] > 0)
        if parameter.requires_grad:
            decay = 0.1 if parameter.dim() > 1 else 0.0
            groups.append({"params": [parameter], "lr": LR * rates[kind(name)], "weight_decay": decay})
    adamw = torch.optim.AdamW(groups, **ADAMW)
    objective, norms = Objective(gpt, loss_weights={"balance": 0.02}), []
    for step in range(STEPS):
        objective(batch(rows(step))).total.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(gpt.parameters(), CLIP)))
        adamw.step()
        adamw.zero_grad()
    return begin, {name: parameter.detach() for name, parameter in gpt.named_parameters()}, norms


def engine_rank(rank: int, expert_parallel: int, stage: int, rates: dict[str, float]) -> dict[str, Any]:
    topology = Topology(world_size=2, rank=rank, expert_parallel=expert_parallel)
    groups = process_groups.make(topology, device=torch.device("cpu"))
    gpt = build_model(MODEL, local_experts=topology.local_experts(4), expert_group=groups.expert)
    initialize(gpt, init_std=0.2, seed=1)
    config = deepspeed_config(micro_batch=2, accumulation=1, world_size=2, zero_stage=stage, dtype="fp32", clip=CLIP)
    engine = Engine(Objective(gpt, loss_weights={"balance": 0.02}), groups=groups, config=config, clip=CLIP,
                    optimizer={"lr": LR, "weight_decay": 0.1, **ADAMW}, rates=rates)  # fmt: skip
    norms = []
    for step in range(STEPS):
        engine.forward_backward(batch(rows(step).chunk(2)[rank]))
        norms.append(engine.step(LR))
    assert dist.get_world_size() == 2
    fragments = [{"name": each.name, "begin": each.offset, "values": each.view.clone()} for each in engine.fragments()]
    return {"norms": norms, "fragments": fragments}


CASES = {
    "router frozen, experts slow": {"router": 0.0, "experts": 0.5, "dense": 1.0},
    "sparse blocks frozen": {"router": 0.0, "experts": 0.0, "dense": 1.0},
    "dense frozen, router fast": {"router": 2.0, "experts": 1.0, "dense": 0.0},
}


@pytest.mark.parametrize(
    ("case", "expert_parallel", "stage"),
    [
        ("router frozen, experts slow", 2, 1),
        ("sparse blocks frozen", 2, 3),
        ("dense frozen, router fast", 1, 0),
    ],
)
def test_parts_learn_at_their_rates(ranks, case, expert_parallel, stage):
    rates = CASES[case]
    begin, end, norms = plainly(rates)
    results = ranks(2, engine_rank, expert_parallel, stage, rates)
    for result in results:
        assert result["norms"] == pytest.approx(norms, rel=1e-4)
    seen = set()
    for each in (fragment for result in results for fragment in result["fragments"]):
        name, is_weight, _ = each["name"].partition("/fp32")
        if not is_weight:
            continue
        seen.add(name)
        own = slice(each["begin"], each["begin"] + each["values"].numel())
        if rates[kind(name)] == 0:
            assert torch.equal(each["values"], begin[name].flatten()[own]), name
        else:
            torch.testing.assert_close(each["values"], end[name].flatten()[own], rtol=1e-4, atol=2e-5)
            assert not torch.equal(each["values"], begin[name].flatten()[own]), name
    assert seen == set(begin)
