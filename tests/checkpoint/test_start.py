"""A run that begins from the weights of another one (``init.weights``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.archive.stored import Stored
from moetrain.checkpoint import resume
from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import InitConfig
from moetrain.errors import CheckpointError
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine


def _start(rank: int, world_size: int, expert_parallel: int, stage: int, weights: Path) -> list[dict[str, object]]:
    import real_checkpoints

    run = replace(real_checkpoints.settings(), init=InitConfig(weights=str(weights)))
    topology = Topology(world_size=world_size, rank=rank, expert_parallel=expert_parallel)
    groups = process_groups.make(topology, device=torch.device("cpu"))
    experts = topology.local_experts(real_checkpoints.EXPERTS)
    gpt = build_model(run.model, local_experts=experts, expert_group=groups.expert)
    initialize(gpt, init_std=0.1, seed=99)
    config = deepspeed_config(micro_batch=4, accumulation=1, world_size=world_size, zero_stage=stage, dtype="fp32",
                              clip=1.0)  # fmt: skip
    adamw = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    engine = Engine(Objective(gpt, loss_weights={}), groups=groups, config=config, optimizer=adamw, clip=1.0)
    resume.take_weights(weights, engine.fragments(), run=run, tokenizer="any", group=groups.control)
    engine.loaded(updates=0)
    taken = [{"name": each.name, "begin": each.offset, "values": each.view.clone()} for each in engine.fragments()]
    rows = torch.randint(0, 128, (4, 17), generator=torch.Generator().manual_seed(5))
    batch = MicroBatch(token_BS=rows[:, :-1].contiguous(), target_BS=rows[:, 1:].contiguous())
    loss = engine.forward_backward(batch).language
    return [*taken, {"name": "loss", "begin": 0, "values": loss.view(1)}]


@pytest.mark.parametrize(("world_size", "expert_parallel", "stage"), [(2, 2, 1), (2, 1, 3)])
def test_weights_are_taken_and_the_optimizer_starts_anew(real_runs, ranks, world_size, expert_parallel, stage):
    stored = Stored(real_runs / "ep2" / "checkpoints" / "step_00000003")
    results = ranks(world_size, _start, world_size, expert_parallel, stage, real_runs / "ep2")
    seen = set()
    for each in (fragment for fragments in results for fragment in fragments if fragment["name"] != "loss"):
        name, begin, values = each["name"], each["begin"], each["values"]
        saved = stored.read(name, begin, begin + values.numel())
        if name.endswith(("/fp32", "/state")):
            assert torch.equal(values, saved), name
            seen.add(name)
        else:
            assert not values.any(), name
    assert seen == {name for name in stored.tensors if not name.endswith(("exp_avg", "exp_avg_sq"))}
    # the weights that the model computes with are those, too
    assert [float(fragments[-1]["values"]) for fragments in results] == pytest.approx([_loss_of(stored)] * world_size)


def _loss_of(stored: Stored) -> float:
    import real_checkpoints

    gpt = build_model(real_checkpoints.settings().model)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(stored.read(f"{name}/fp32", 0, parameter.numel()).view_as(parameter))
        for name, state in gpt.moe_state().items():
            state.copy_(stored.read(f"{name}/state", 0, state.numel()).view_as(state))
    rows = torch.randint(0, 128, (4, 17), generator=torch.Generator().manual_seed(5))
    batch = MicroBatch(token_BS=rows[:, :-1].contiguous(), target_BS=rows[:, 1:].contiguous())
    return float(Objective(gpt, loss_weights={})(batch).language)


def _refused(rank: int, weights: Path, changed: dict[str, object]) -> str:
    import real_checkpoints

    run = real_checkpoints.settings()
    run = replace(run, model=replace(run.model, **changed))
    with pytest.raises(CheckpointError) as caught:
        resume.take_weights(weights, [], run=run, tokenizer="any", group=torch.distributed.group.WORLD)
    return str(caught.value)


def test_another_models_weights_are_refused_on_every_rank(real_runs, ranks):
    for told in ranks(2, _refused, real_runs / "ep2", {"d_head": 16, "norm": "layernorm"}):
        # every rank has the first one's message
        assert "model.norm is layernorm, but rmsnorm in init.weights; model.d_head is 16, but 8 in init.weights" in told


def test_a_place_without_a_whole_checkpoint_is_refused(real_runs, ranks):
    for directory in (real_runs / "ep2" / "checkpoints").iterdir():
        next(directory.glob("*.distcp")).write_bytes(b"")
    told = ranks(1, _refused, real_runs / "ep2", {})[0]
    assert "has no whole checkpoint; checkpoint step_00000003 is damaged" in told
