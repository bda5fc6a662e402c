"""The engine against a plain PyTorch loop: same losses, norms, weights and moments on every layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint import state as checkpoint_state
from moetrain.checkpoint.store import Manifest
from moetrain.config.checks import CHOICES
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.errors import TrainingError
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import Objective
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine, deepspeed_config

MODEL = ModelConfig(vocab_size=128, context=16, d_model=32, num_layers=2, num_heads=4, d_ff=64, bias=True,
                    norm="layernorm", moe=MoEConfig(num_experts=4, d_expert=32, every=2))  # fmt: skip
LOSS_FREE = replace(MODEL, moe=MoEConfig(num_experts=4, top_k=2, d_expert=32, every=1, router="sigmoid_bias",
                                         bias_update_rate=0.02, num_shared_experts=1, shared_gate=True))  # fmt: skip
"""With a bias that no optimizer holds, moved by the load of the whole batch."""
MODELS = {"top_k": MODEL, "loss_free": LOSS_FREE}
ROWS, STEPS, LR, CLIP = 8, 5, 1e-2, 0.5
# eps above the rounding noise: the gradient of the keys' bias is 0 but for rounding (softmax does not see a shift), and
# Adam with a smaller eps would blow that noise up to whole steps
OPTIMIZER = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, 128, (ROWS, 17), generator=torch.Generator().manual_seed(step))


def plain_loop(*, accumulation: int, clip: float = CLIP, steps: int = STEPS, model: str = "top_k") -> dict[str, object]:
    """One process, torch alone: AdamW, clip_grad_norm_, the mean over micro-batches; biases moved by hand."""
    gpt = build_model(MODELS[model])
    initialize(gpt, init_std=0.1, seed=1)
    objective = Objective(gpt, loss_weights={"balance": 0.02, "z": 0.002})
    decayed = [p for p in gpt.parameters() if p.dim() > 1]
    others = [p for p in gpt.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], **OPTIMIZER, foreach=False
    )
    losses, norms = [], []
    biases = {f"blocks.{i}.feed_forward.router": [0.0] * 4 for i in range(2)} if model == "loss_free" else {}
    for step in range(steps):
        mean, counts = 0.0, [[0] * 4 for _ in biases]
        for chunk in rows(step).chunk(accumulation):
            loss = objective(chunk[:, :-1], chunk[:, 1:])
            for count, load in zip(counts, loss.load, strict=False):
                count[:] = [a + b for a, b in zip(count, load.count_E.tolist(), strict=True)]
            (loss.total / accumulation).backward()
            mean += loss.language.item() / accumulation
        norms.append(torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip or float("inf")).item())
        adamw.step()
        adamw.zero_grad()
        losses.append(mean)
        for (name, bias), count in zip(biases.items(), counts, strict=True):
            bias[:] = [
                b + 0.02 * ((sum(count) / 4 > c) - (sum(count) / 4 < c)) for b, c in zip(bias, count, strict=True)
            ]
            gpt.get_submodule(name).bias_E = torch.tensor(bias)
    tensors = {f"{name}.bias_E/state": torch.tensor(bias) for name, bias in biases.items()}
    for name, parameter in gpt.named_parameters():
        state = adamw.state[parameter]
        tensors[f"{name}/fp32"] = parameter.detach().flatten()
        tensors[f"{name}/exp_avg"] = state["exp_avg"].flatten()
        tensors[f"{name}/exp_avg_sq"] = state["exp_avg_sq"].flatten()
    return {"losses": losses, "norms": norms, "tensors": tensors}


@dataclass(frozen=True)
class Layout:
    expert_parallel: int = 1
    stage: int = 1
    accumulation: int = 1
    clip: float = CLIP
    dtype: str = "fp32"
    model: str = "top_k"


def make_engine(rank: int, layout: Layout):
    world_size = dist.get_world_size()
    topology = Topology(world_size=world_size, rank=rank, expert_parallel=layout.expert_parallel)
    groups = process_groups.make(topology, device=torch.device("cpu"))
    gpt = build_model(MODELS[layout.model], local_experts=topology.local_experts(4), expert_group=groups.expert,
                      world=groups.world)  # fmt: skip
    initialize(gpt, init_std=0.1, seed=1)
    config = deepspeed_config(micro_batch=ROWS // world_size // layout.accumulation, accumulation=layout.accumulation,
                              world_size=world_size, zero_stage=layout.stage, dtype=layout.dtype,
                              clip=layout.clip)  # fmt: skip
    objective = Objective(gpt, loss_weights={"balance": 0.02, "z": 0.002})
    return Engine(objective, groups=groups, config=config, optimizer=OPTIMIZER, clip=layout.clip), groups


def run_steps(
    engine: Engine, rank: int, *, accumulation: int, first: int, last: int
) -> tuple[list[float], list[float]]:
    world_size = dist.get_world_size()
    losses, norms = [], []
    for step in range(first, last):
        own = rows(step).view(accumulation, world_size, -1, 17)[:, rank]
        mean = torch.zeros(())
        for micro in own:
            mean += (
                engine.forward_backward(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()).language / accumulation
            )
        norms.append(engine.step(LR))
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    return losses, norms


def whole_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Every global tensor, put together from the ranks' fragments."""
    own = [(f.name, f.offset, f.global_numel, f.view.clone()) for f in engine.fragments()]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    whole: dict[str, torch.Tensor] = {}
    for name, offset, numel, part in (each for one in gathered for each in one):
        tensor = whole.setdefault(name, torch.full((numel,), float("nan")))
        tensor[offset : offset + part.numel()] = part
    return whole


def train_rank(rank: int, layouts: list[Layout]):
    """Every layout in turn: starting processes costs more than training these models."""
    results = []
    for layout in layouts:
        engine, _ = make_engine(rank, layout)
        losses, norms = run_steps(engine, rank, accumulation=layout.accumulation, first=0, last=STEPS)
        results.append({"losses": losses, "norms": norms, "tensors": whole_tensors(engine)})
    built = [str(path) for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("*.so")]
    return {"results": results, "built": built}


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        (1, [Layout(), Layout(stage=0, accumulation=4)]),
        (2, [Layout(expert_parallel=2, stage=0), Layout(expert_parallel=2, accumulation=2), Layout(clip=0.0),
             Layout(expert_parallel=2, stage=2, accumulation=2), Layout(expert_parallel=2, stage=0, accumulation=2),
             Layout(expert_parallel=2, accumulation=2, model="loss_free"), Layout(stage=0, model="loss_free")]),
        (4, [Layout(expert_parallel=2, stage=2), Layout(expert_parallel=4, accumulation=2),
             Layout(expert_parallel=2, stage=0)]),
    ],
)  # fmt: skip
def test_every_layout_trains_as_a_plain_loop_does(ranks, world_size, layouts):
    answer = ranks(world_size, train_rank, layouts)[0]
    for layout, found in zip(layouts, answer["results"], strict=True):
        expected = plain_loop(accumulation=layout.accumulation, clip=layout.clip, model=layout.model)
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
        assert found["tensors"].keys() == expected["tensors"].keys()
        assert_near(found["tensors"], expected["tensors"], what=str(layout))
        if layout.model == "loss_free":
            biases = [tensor for name, tensor in found["tensors"].items() if name.endswith("bias_E/state")]
            assert len(biases) == 2
            assert all(tensor.abs().max() > 0.03 for tensor in biases), "the load was skewed, and the biases moved"
    assert answer["built"] == [], "the engine compiled something; a lock left by a killed build would hang later runs"


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, what: str) -> None:
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error < 2e-5, f"{name}: relative error {error:.1e} with {what}"


def test_bf16_keeps_masters_in_float32_and_stays_near_the_plain_loop(ranks):
    found = ranks(2, train_rank, [Layout(expert_parallel=2, dtype="bf16")])[0]["results"][0]
    expected = plain_loop(accumulation=1)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=5e-3, atol=0)
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=3e-2, atol=0)
    masters = [tensor for name, tensor in found["tensors"].items() if name.endswith("/fp32")]
    assert all(tensor.dtype == torch.float32 for tensor in masters)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in masters)


def save_rank(rank: int, root: str, layout: Layout):
    engine, groups = make_engine(rank, layout)
    run_steps(engine, rank, accumulation=1, first=0, last=2)
    manifest = Manifest(step=2, tokens=0, seed=1, world_size=dist.get_world_size(),
                        expert_parallel=layout.expert_parallel, run={}, data={}, files=[])  # fmt: skip
    checkpoint_state.save(Path(root), engine.fragments(), manifest=manifest, group=groups.control)
    losses, norms = run_steps(engine, rank, accumulation=1, first=2, last=STEPS)
    return {"losses": losses, "norms": norms, "tensors": whole_tensors(engine)}


def resume_rank(rank: int, root: str, layouts: list[Layout]):
    results = []
    for layout in layouts:
        engine, groups = make_engine(rank, layout)
        # trained on other data first: nothing of what was there before the load may be left
        run_steps(engine, rank, accumulation=1, first=7, last=8)
        checkpoint_state.load(Path(root) / "step_00000002", engine.fragments(), group=groups.control)
        engine.loaded(step=2)
        losses, norms = run_steps(engine, rank, accumulation=1, first=2, last=STEPS)
        results.append({"losses": losses, "norms": norms, "tensors": whole_tensors(engine)})
    return results


def test_a_resumed_engine_goes_on_as_the_unbroken_one_on_the_same_and_on_other_layouts(ranks, tmp_path):
    root, saved = str(tmp_path / "checkpoints"), Layout(expert_parallel=2)
    unbroken = ranks(2, save_rank, root, saved)[0]
    same, *others = ranks(2, resume_rank, root, [saved, Layout(stage=0), Layout(expert_parallel=2, stage=2)])[0]
    assert same["losses"] == unbroken["losses"]
    assert same["norms"] == unbroken["norms"]
    assert all(torch.equal(same["tensors"][name], tensor) for name, tensor in unbroken["tensors"].items())
    others += ranks(4, resume_rank, root, [Layout(expert_parallel=4), Layout(expert_parallel=2, stage=2)])[0]
    for other in others:
        torch.testing.assert_close(other["losses"], unbroken["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(other["norms"], unbroken["norms"], rtol=1e-5, atol=0)
        assert_near(other["tensors"], unbroken["tensors"], what="another layout")


def save_and_resume_rank(rank: int, root: str, layouts: list[Layout]):
    return [
        {"unbroken": save_rank(rank, f"{root}/{i}", layout), "resumed": resume_rank(rank, f"{root}/{i}", [layout])[0]}
        for i, layout in enumerate(layouts)
    ]


def test_a_resumed_engine_goes_on_with_the_biases_that_no_optimizer_holds(ranks, tmp_path):
    layouts = [Layout(expert_parallel=2, dtype=dtype, model="loss_free") for dtype in ("fp32", "bf16")]
    for found in ranks(2, save_and_resume_rank, str(tmp_path), layouts)[0]:
        unbroken, resumed = found["unbroken"], found["resumed"]
        assert resumed["losses"] == unbroken["losses"]
        assert all(torch.equal(resumed["tensors"][name], tensor) for name, tensor in unbroken["tensors"].items())
        biases = [tensor for name, tensor in resumed["tensors"].items() if name.endswith("bias_E/state")]
        assert len(biases) == 2
        for bias in biases:
            steps = bias / 0.02
            assert steps.abs().max() > 1
            # whole steps: in bf16 they would be rounded
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


SHARDED = [Layout(expert_parallel=ep, stage=stage) for ep in (1, 2, 4) for stage in CHOICES["parallel.zero_stage"]]


def reshard_rank(rank: int, root: str):
    """Save on every layout, load each of the saved on each layout: (from, to) -> names of the tensors that differ."""
    engines, saved = [], []
    for number, layout in enumerate(SHARDED):
        engine, groups = make_engine(rank, layout)
        # each trained on data of its own: no two have equal values
        run_steps(engine, rank, accumulation=1, first=10 * number, last=10 * number + 1)
        manifest = Manifest(step=number, tokens=0, seed=1, world_size=4, expert_parallel=layout.expert_parallel, run={},
                            data={}, files=[])  # fmt: skip
        checkpoint_state.save(Path(root), engine.fragments(), manifest=manifest, group=groups.control)
        engines.append((engine, groups))
        saved.append(whole_tensors(engine))
    differ = {}
    for target, (engine, groups) in enumerate(engines):
        for source, expected in enumerate(saved):
            checkpoint_state.load(Path(root) / f"step_{source:08d}", engine.fragments(), group=groups.control)
            engine.loaded(step=1)
            found = whole_tensors(engine)
            assert found.keys() == expected.keys()
            differ[f"{SHARDED[source]} to {SHARDED[target]}"] = [
                name for name, tensor in expected.items() if not torch.equal(found[name], tensor)
            ]
    alike = [name for name, tensor in saved[0].items() if torch.equal(tensor, saved[1][name])]
    return {"differ": differ, "alike": alike}


def test_every_layout_loads_bit_for_bit_what_any_other_saved(ranks, tmp_path):
    for answer in ranks(4, reshard_rank, str(tmp_path / "checkpoints")):
        assert len(answer["differ"]) == len(SHARDED) ** 2
        assert {pair: names for pair, names in answer["differ"].items() if names} == {}
        assert answer["alike"] == [], "each has values of its own, so a load that does nothing shows"


def diverge_rank(rank: int):
    engine, _ = make_engine(rank, Layout(expert_parallel=2))
    with torch.no_grad():
        next(iter(engine.gpt.parameters())).fill_(float("nan"))
    try:
        run_steps(engine, rank, accumulation=1, first=0, last=1)
    except TrainingError as error:
        return str(error)
    return "no error"


def test_a_gradient_that_is_not_finite_is_told_on_every_rank(ranks):
    assert all("gradient norm is" in message and "optim.lr" in message for message in ranks(2, diverge_rank))
