"""Small models on engines of any layout, and a plain PyTorch loop to hold them against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize, initialize_part
from moetrain.model.objective import MicroBatch, Objective
from moetrain.moe.layer import MoELayer
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.train.adopted.stage3 import cut
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
    config = deepspeed_config(micro_batch=ROWS // world_size // layout.accumulation, accumulation=layout.accumulation,
                              world_size=world_size, zero_stage=layout.stage, dtype=layout.dtype,
                              clip=layout.clip, offload_optimizer=layout.offload)  # fmt: skip
    config["zero_optimization"]["stage3_param_persistence_threshold"] = layout.kept_whole
    model = MODELS[layout.model]

    def made(name: str, part: torch.nn.Module) -> None:
        initialize_part(name, part, num_layers=model.num_layers, init_std=0.1, seed=1)
        if layout.stage == 3:
            cut(part, expert_parallel=layout.expert_parallel, config=config, device=groups.device)

    gpt = build_model(model, local_experts=topology.local_experts(4), expert_group=groups.expert,
                      all_to_all=groups.two_level, recompute=layout.recompute, made=made)  # fmt: skip
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


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, what: str) -> None:
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error < 2e-5, f"{name}: relative error {error:.1e} with {what}"
