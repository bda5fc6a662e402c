"""The engine against a plain PyTorch loop: same losses, norms, weights and moments on every layout.

The loop sees the whole batch at once, whatever the number of micro-batches: the routers' losses may not depend on it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint import state as checkpoint_state
from moetrain.checkpoint.store import Manifest
from moetrain.config.checks import CHOICES
from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective, negative_log_likelihood
from moetrain.moe.layer import MoELayer
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine

MODEL = ModelConfig(vocab_size=128, context=16, d_model=32, num_layers=2, num_heads=4, d_ff=64, bias=True,
                    norm="layernorm", moe=MoEConfig(num_experts=4, d_expert=32, every=2))  # fmt: skip
LOSS_FREE = replace(MODEL, moe=MoEConfig(num_experts=4, top_k=2, d_expert=32, every=1, router="sigmoid_bias",
                                         bias_update_rate=0.02, num_shared_experts=1, shared_gate=True))  # fmt: skip
"""With a bias that no optimizer holds, moved by the load of the whole batch."""
UNTIED = replace(MODEL, tie_embeddings=False, positions="learned")
MODELS = {"top_k": MODEL, "loss_free": LOSS_FREE, "untied": UNTIED}
ROWS, STEPS, LR, CLIP = 8, 5, 1e-2, 0.5
# eps above the rounding noise: the gradient of the keys' bias is 0 but for rounding (softmax does not see a shift), and
# Adam with a smaller eps would blow that noise up to whole steps
OPTIMIZER = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, 128, (ROWS, 17), generator=torch.Generator().manual_seed(step))


def micro_batch(rows_BS: torch.Tensor) -> MicroBatch:
    return MicroBatch(token_BS=rows_BS[:, :-1].contiguous(), target_BS=rows_BS[:, 1:].contiguous())


def plain_loop(*, clip: float = CLIP, steps: int = STEPS, model: str = "top_k") -> dict[str, object]:
    """One process, the whole batch at once, torch alone: AdamW, clip_grad_norm_; what routers keep is moved by hand."""
    gpt = build_model(MODELS[model])
    initialize(gpt, init_std=0.1, seed=1)
    objective = Objective(gpt, loss_weights={"balance": 0.02, "z": 0.002})
    named = dict(gpt.named_parameters())
    decayed = [p for name, p in named.items() if p.dim() > 1 and name != "positions.weight"]
    others = [p for name, p in named.items() if p.dim() == 1 or name == "positions.weight"]
    adamw = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], **OPTIMIZER, foreach=False
    )
    losses, norms, kept = [], [], {}
    layers = {name: module for name, module in gpt.named_modules() if isinstance(module, MoELayer)}
    biases = {name: [0.0] * 4 for name in layers}
    for step in range(steps):
        loss = objective(micro_batch(rows(step)))
        loss.total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip or float("inf")).item())
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.language.item())
        for (name, layer), load in zip(layers.items(), loss.load, strict=True):
            count = load.count_E.tolist()
            kept[f"{name}.share_E"] = layer.share_E = torch.tensor([c / sum(count) for c in count])
            if model == "loss_free":
                biases[name] = [
                    b + 0.02 * ((sum(count) / 4 > c) - (sum(count) / 4 < c))
                    for b, c in zip(biases[name], count, strict=True)
                ]
                kept[f"{name}.router.bias_E"] = layer.router.bias_E = torch.tensor(biases[name])
    tensors = {f"{name}/state": tensor for name, tensor in kept.items()}
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
    offload: bool = False
    recompute: str = "none"
    node_size: int | None = None
    """Smaller than expert_parallel: tokens are exchanged in two levels."""
    kept_whole: int = 0
    """At ZeRO 3: these models are so small that nothing would be cut with the engine's own threshold."""


def make_engine(rank: int, layout: Layout):
    world_size = dist.get_world_size()
    topology = Topology(world_size=world_size, rank=rank, expert_parallel=layout.expert_parallel,
                        processes_per_node=layout.node_size)  # fmt: skip
    groups = process_groups.make(topology, device=torch.device("cpu"), two_level=True)
    gpt = build_model(MODELS[layout.model], local_experts=topology.local_experts(4), expert_group=groups.expert,
                      all_to_all=groups.two_level, recompute=layout.recompute)  # fmt: skip
    initialize(gpt, init_std=0.1, seed=1)
    config = deepspeed_config(micro_batch=ROWS // world_size // layout.accumulation, accumulation=layout.accumulation,
                              world_size=world_size, zero_stage=layout.stage, dtype=layout.dtype,
                              clip=layout.clip, offload_optimizer=layout.offload)  # fmt: skip
    config["zero_optimization"]["stage3_param_persistence_threshold"] = layout.kept_whole
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
            mean += engine.forward_backward(micro_batch(micro)).language / accumulation
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
        (1, [Layout(), Layout(stage=0, accumulation=4), Layout(stage=3, accumulation=2)]),
        (2, [Layout(expert_parallel=2, stage=0), Layout(expert_parallel=2, accumulation=2), Layout(clip=0.0),
             Layout(expert_parallel=2, stage=2, accumulation=2), Layout(expert_parallel=2, stage=0, accumulation=2),
             Layout(expert_parallel=2, accumulation=2, model="loss_free"), Layout(stage=0, model="loss_free")]),
        (2, [Layout(stage=3), Layout(stage=3, expert_parallel=2, accumulation=2),
             Layout(stage=3, expert_parallel=2, accumulation=2, model="loss_free"), Layout(stage=3, model="untied"),
             Layout(stage=3, expert_parallel=2, kept_whole=100_000, clip=0.0)]),
        (2, [*(Layout(stage=stage, expert_parallel=2, accumulation=2, offload=True) for stage in (1, 2, 3)),
             Layout(stage=2, offload=True),
             *(Layout(stage=stage, expert_parallel=2, accumulation=2, recompute=recompute)
               for stage in (1, 3) for recompute in ("selective", "full"))]),
        (4, [Layout(expert_parallel=2, stage=2), Layout(expert_parallel=4, accumulation=2, node_size=2),
             Layout(expert_parallel=2, stage=0), Layout(stage=3, expert_parallel=2),
             Layout(stage=3, expert_parallel=4, accumulation=2)]),
    ],
)  # fmt: skip
def test_every_layout_trains_as_a_plain_loop_does(ranks, world_size, layouts):
    answer = ranks(world_size, train_rank, layouts)[0]
    for layout, found in zip(layouts, answer["results"], strict=True):
        expected = plain_loop(clip=layout.clip, model=layout.model)
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
    expected = plain_loop()
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
        engine.loaded(updates=2)
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
            engine.loaded(updates=1)
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


def held_out_loss(engine: Engine, rank: int) -> float:
    """As the evaluation does it: the model called by itself."""
    own = rows(99).view(dist.get_world_size(), -1, 17)[rank]
    engine.gpt.eval()
    summed, _ = negative_log_likelihood(engine.gpt, micro_batch(own))
    engine.gpt.train()
    dist.all_reduce(summed)
    return summed.item()


def there_and_back_rank(rank: int, root: str, there: Layout, elsewhere: Layout):
    """Save, load on another layout, save there, load on the first again; both ends go on from step 2."""
    first, groups = make_engine(rank, there)
    run_steps(first, rank, accumulation=1, first=0, last=2)
    found = {"saved": whole_tensors(first), "loss": held_out_loss(first, rank)}
    engine = first
    for name, layout in (("elsewhere", elsewhere), ("back", there)):
        directory = f"{root}/{name}"
        manifest = Manifest(step=2, tokens=0, seed=1, world_size=dist.get_world_size(), run={}, data={}, files=[],
                            expert_parallel=layout.expert_parallel)  # fmt: skip
        checkpoint_state.save(Path(directory), engine.fragments(), manifest=manifest, group=groups.control)
        engine, groups = make_engine(rank, layout)
        run_steps(engine, rank, accumulation=1, first=7, last=8)
        checkpoint_state.load(Path(directory) / "step_00000002", engine.fragments(), group=groups.control)
        engine.loaded(updates=2)
        found |= {name: whole_tensors(engine), f"{name} loss": held_out_loss(engine, rank)}
    # an evaluation in between must leave no trace in the training
    run_steps(first, rank, accumulation=1, first=2, last=3)
    held_out_loss(first, rank)
    run_steps(first, rank, accumulation=1, first=3, last=STEPS)
    run_steps(engine, rank, accumulation=1, first=2, last=STEPS)
    return found | {"unbroken": whole_tensors(first), "resumed": whole_tensors(engine)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


THERE_AND_ELSEWHERE = [
    (Layout(stage=3, expert_parallel=2), Layout()),
    (Layout(stage=3, expert_parallel=2, dtype="bf16", model="loss_free"),
     Layout(stage=2, dtype="bf16", model="loss_free")),
    (Layout(stage=1, expert_parallel=2, offload=True, dtype="bf16"), Layout(stage=3, offload=True, dtype="bf16")),
]  # fmt: skip


def every_there_and_back_rank(rank: int, root: str):
    return [
        there_and_back_rank(rank, f"{root}/{i}", there, elsewhere)
        for i, (there, elsewhere) in enumerate(THERE_AND_ELSEWHERE)
    ]


def test_a_checkpoint_goes_to_another_layout_and_back_bit_for_bit(ranks, tmp_path):
    answers = ranks(2, every_there_and_back_rank, str(tmp_path))[0]
    for (there, _), found in zip(THERE_AND_ELSEWHERE, answers, strict=True):
        assert_equal(found["elsewhere"], found["saved"])
        assert_equal(found["back"], found["saved"])
        assert_equal(found["resumed"], found["unbroken"])
        assert found["back loss"] == found["loss"]
        assert found["elsewhere loss"] == pytest.approx(found["loss"], rel=1e-6 if there.dtype == "fp32" else 2e-3)


def skip_rank(rank: int, layouts: list[Layout]):
    """Steps 0 to 3, the same without step 1 and with a bad step 1: what each leaves behind."""
    answers = []
    for layout in layouts:
        ways = {}
        for way in ("left out", "a loss that is not finite", "not kept"):
            engine, _ = make_engine(rank, layout)
            run_steps(engine, rank, accumulation=layout.accumulation, first=0, last=1)
            before = {fragment.name: fragment.view.clone() for fragment in engine.fragments()}
            norm = 0.0 if way == "left out" else bad_step(engine, rank, layout, way)
            unchanged = all(torch.equal(each.view, before[each.name]) for each in engine.fragments())
            losses, norms = run_steps(engine, rank, accumulation=layout.accumulation, first=2, last=4)
            own = {fragment.name: fragment.view.clone() for fragment in engine.fragments()}
            ways[way] = {"bad norm": norm, "unchanged": unchanged, "losses": losses, "norms": norms, "tensors": own}
        answers.append(ways)
    return answers


def bad_step(engine: Engine, rank: int, layout: Layout, way: str) -> float:
    """On every rank the last micro-batch is not kept, or on rank 1 alone its loss is not finite."""
    own = rows(1).view(layout.accumulation, dist.get_world_size(), -1, 17)[:, rank]
    *others, last = [micro_batch(micro) for micro in own]
    for each in others:
        engine.forward_backward(each)
    if way == "not kept":
        engine.forward_backward(last, keep=lambda losses: bool(losses.language < 0))
    else:
        engine.forward_backward(replace(last, counted=0.0 if rank == 1 else None))  # divided by nothing
    return engine.step(LR)


def test_a_step_that_is_not_made_leaves_no_trace_on_any_layout(ranks):
    """What follows is bit for bit what follows without it: weights, moments, Adam's count of steps, routers' biases."""
    layouts = [Layout(expert_parallel=2, stage=0), Layout(expert_parallel=2, accumulation=2, model="loss_free"),
               Layout(stage=2, accumulation=2, offload=True), Layout(stage=3, expert_parallel=2)]  # fmt: skip
    layouts += [Layout(dtype="bf16", stage=1, expert_parallel=2), Layout(dtype="bf16", stage=2, offload=True),
                Layout(dtype="bf16", stage=3)]  # fmt: skip
    for answers in ranks(2, skip_rank, layouts):
        for layout, ways in zip(layouts, answers, strict=True):
            plain = ways.pop("left out")
            for way, found in ways.items():
                assert not math.isfinite(found["bad norm"]), (layout, way)
                assert found["unchanged"], (layout, way)
                assert (found["losses"], found["norms"]) == (plain["losses"], plain["norms"]), (layout, way)
                for name, tensor in plain["tensors"].items():
                    assert torch.equal(found["tensors"][name], tensor), (layout, way, name)
