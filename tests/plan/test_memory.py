"""The plan's bytes against what autograd really keeps, and against the resident memory of real runs."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import ModelConfig, MoEConfig, ParallelConfig, RunConfig
from moetrain.model.attention import document_mask, score_bias
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.plan.flops import count_parameters
from moetrain.plan.layout import Layout, offered
from moetrain.plan.memory.device import PARTS, Memory, memory_of
from moetrain.train.adopted.stage3 import cut
from moetrain.train.engine import Engine
from moetrain.train.setup import build_gpt

ALONE = Layout(gpus=1)
MODEL = ModelConfig(vocab_size=512, context=128, num_layers=6, d_model=64, num_heads=4, d_ff=160,
                    moe=MoEConfig(num_experts=8, top_k=2, d_expert=96))  # fmt: skip
SHARED = MoEConfig(num_experts=4, top_k=1, router="switch", d_expert=192, every=2, num_shared_experts=1)
VARIANTS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "dense": {"moe": None},
    "switch, shared": {"moe": SHARED},
    "grouped queries": {"num_kv_heads": 2},
    "wide heads": {"d_head": 32},
    "qk_norm of each head": {"qk_norm": "head", "num_kv_heads": 2},
    "qk_norm of all heads": {"qk_norm": "all", "num_kv_heads": 2},
    "gpt2": {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu", "moe": None},
}


def split(token: torch.Tensor, *, mask_documents: bool = False) -> MicroBatch:
    token_BS = token[:, :-1].contiguous()
    document_BS = (token_BS == 0).cumsum(1) if mask_documents else None
    return MicroBatch(token_BS=token_BS, target_BS=token[:, 1:].contiguous(), document_BS=document_BS)


def kept_by_autograd(
    model: ModelConfig, *, rows: int, recompute: str = "none", mask_documents: bool = False
) -> dict[int, torch.Tensor]:
    """All storages that a forward pass leaves for the backward pass, weights apart, by where they lie."""
    gpt = build_model(model, recompute=recompute)
    initialize(gpt, init_std=0.02, seed=1)
    gpt = gpt.bfloat16() if model.dtype == "bf16" else gpt
    weights = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    token = torch.randint(0, model.vocab_size, (rows, model.context + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Objective(gpt, loss_weights={"balance": 0.01})(split(token, mask_documents=mask_documents))
    return kept


def size_of(kept: dict[int, torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_what_autograd_keeps(variant: str, dtype: str) -> None:
    model = replace(MODEL, dtype=dtype, **VARIANTS[variant])
    # on one device no row is sent away, so every load is even in sum
    planned = memory_of(model, replace(ALONE, micro_batch=4), sequence_length=128, imbalance=1.0, device="cpu", slack=0)
    softmax = planned.logits / 3  # of the three that are there at once, autograd keeps one
    assert planned.activations + planned.experts + softmax == pytest.approx(
        size_of(kept_by_autograd(model, rows=4)), rel=0.01
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mask_of_documents_is_one_for_all_blocks(variant: str, dtype: str) -> None:
    model = replace(MODEL, dtype=dtype, **VARIANTS[variant])
    mask = score_bias(document_mask(torch.zeros(4, 128)), dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    without, masked = (size_of(kept_by_autograd(model, rows=4, mask_documents=is_on)) for is_on in (False, True))
    assert (
        planned_for_masks(model, Layout(gpus=1, micro_batch=4)) == masked - without == mask.untyped_storage().nbytes()
    )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_the_mask_of_documents_stays_for_what_is_recomputed(recompute: str) -> None:
    gpt = build_model(MODEL, recompute=recompute)
    initialize(gpt, init_std=0.02, seed=1)
    token = torch.randint(0, MODEL.vocab_size, (4, 129))
    before = masks_there()
    losses = Objective(gpt, loss_weights={"balance": 0.01})(split(token, mask_documents=True))
    there = masks_there()
    losses.total.backward()
    layout = Layout(gpus=1, micro_batch=4, recompute=recompute)
    assert planned_for_masks(MODEL, layout) == sum(there[place] for place in there.keys() - before.keys())


def masks_there() -> dict[int, int]:
    """Bytes of every storage of four masks that Python holds, by where it lies."""
    squares = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (4, 1, 128, 128)]
    return {each.data_ptr(): each.untyped_storage().nbytes() for each in squares}


def planned_for_masks(model: ModelConfig, layout: Layout) -> float:
    without, masked = (
        memory_of(model, layout, sequence_length=128, mask_documents=is_on, device="cpu", slack=0).total
        for is_on in (False, True)
    )
    return masked - without


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_is_spread_as_zero_says(stage: int) -> None:
    """ZeRO, arXiv:1910.02054, figure 1: 12 bytes a parameter of masters and moments, by the number of devices."""
    layout = Layout(gpus=16, expert_parallel=4, zero_stage=stage)
    model = replace(MODEL, dtype="bf16")
    count = count_parameters(model)
    planned = memory_of(model, layout, sequence_length=128)
    own = count.non_expert + count.experts / 4
    share = own if stage == 0 else count.non_expert / 16 + count.experts / 4 / 4
    assert planned.masters + planned.moments == pytest.approx(12 * share)
    if stage < 3:
        assert planned.weights == pytest.approx(2 * own)
    else:
        assert planned.weights > 2 * share


def test_what_is_recomputed_is_not_kept() -> None:
    model, sizes = replace(MODEL, num_layers=12), []
    for recompute in ("none", "selective", "full"):
        planned = memory_of(model, Layout(gpus=8, micro_batch=64, recompute=recompute), sequence_length=128)
        sizes.append(planned.activations + planned.experts)
    assert sizes[0] > sizes[1] > sizes[2]
    stream = 64 * 128 * 64 * 4
    assert sizes[2] > 12 * stream, "each block's input stays"


def test_offload_moves_the_optimizer_to_the_host() -> None:
    there = memory_of(MODEL, Layout(gpus=4), sequence_length=128)
    away = memory_of(MODEL, Layout(gpus=4, offload_optimizer=True), sequence_length=128)
    assert (away.masters, away.moments, there.host) == (0, 0, 0)
    assert away.host >= there.masters + there.moments


def test_head_room_for_imbalance_is_the_experts_alone() -> None:
    even, skewed = (
        memory_of(MODEL, replace(ALONE, micro_batch=16), sequence_length=128, imbalance=imbalance, slack=0)
        for imbalance in (1.0, 1.5)
    )
    assert even.activations == skewed.activations
    assert 1.3 < skewed.experts / even.experts < 1.5


def test_the_total_is_the_sum_of_the_parts() -> None:
    planned = memory_of(MODEL, ALONE, sequence_length=128)
    assert planned.total == pytest.approx(sum(getattr(planned, part) for part in PARTS))
    assert Memory(weights=1, host=5).total == 1


def test_only_what_the_settings_allow_is_offered() -> None:
    from moetrain.config.checks import CHOICES

    for dtype in ("fp32", "bf16"):
        offer = offered(dtype)
        assert set(offer.zero_stages) <= set(CHOICES["parallel.zero_stage"])
        assert offer.takes(Layout(gpus=2, zero_stage=1))
    assert not offered("bf16").takes(Layout(gpus=2, zero_stage=0)), "config.checks refuses it"
    assert offered("fp32").takes(Layout(gpus=2, zero_stage=0))


BIG = ModelConfig(vocab_size=4096, context=256, num_layers=4, d_model=384, num_heads=6, d_ff=1024,
                  moe=MoEConfig(num_experts=8, top_k=2, d_expert=1024))  # fmt: skip
BIG_DENSE = replace(BIG, d_model=512, num_heads=8, num_kv_heads=4, d_ff=1536, num_layers=6, moe=None)
MASKED = "long, masked"
LONG = ModelConfig(vocab_size=512, context=8192, num_layers=2, d_model=256, num_heads=4, d_ff=768)
MODELS = {"sparse": BIG, "sparse bf16": replace(BIG, dtype="bf16"), "dense": BIG_DENSE, MASKED: LONG}
MEASURED: list[tuple[str, Layout]] = [
    ("sparse", Layout(gpus=2, expert_parallel=2, zero_stage=1, micro_batch=4)),
    ("sparse", Layout(gpus=2, expert_parallel=1, zero_stage=1, micro_batch=4, accumulation=2)),
    ("sparse", Layout(gpus=2, expert_parallel=1, zero_stage=2, micro_batch=4, accumulation=2)),
    ("sparse", Layout(gpus=2, expert_parallel=2, zero_stage=2, micro_batch=8)),
    ("sparse bf16", Layout(gpus=2, expert_parallel=2, zero_stage=1, micro_batch=8)),
    ("sparse bf16", Layout(gpus=2, expert_parallel=1, zero_stage=2, micro_batch=4, accumulation=2)),
    ("dense", Layout(gpus=2, expert_parallel=1, zero_stage=2, micro_batch=4)),
    ("dense", Layout(gpus=2, expert_parallel=1, zero_stage=1, micro_batch=1)),
    ("sparse", Layout(gpus=2, expert_parallel=2, zero_stage=1, micro_batch=8, recompute="selective")),
    ("sparse", Layout(gpus=2, expert_parallel=1, zero_stage=2, micro_batch=4, offload_optimizer=True)),
    ("sparse", Layout(gpus=2, expert_parallel=2, zero_stage=3, micro_batch=4)),
    ("sparse", Layout(gpus=2, expert_parallel=1, zero_stage=3, micro_batch=4, accumulation=2)),
    ("sparse bf16", Layout(gpus=2, expert_parallel=2, zero_stage=3, micro_batch=8, recompute="full")),
    ("dense", Layout(gpus=2, expert_parallel=1, zero_stage=3, micro_batch=4)),
    (MASKED, Layout(gpus=2, expert_parallel=1, zero_stage=1, micro_batch=1)),
]


def resident(field: str) -> int:
    """VmRSS or VmHWM, the most since the last reset, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def make_engine(model: ModelConfig, layout: Layout, *, rank: int) -> Engine:
    topology = Topology(world_size=layout.gpus, rank=rank, expert_parallel=layout.expert_parallel)
    groups = process_groups.make(topology, device=torch.device("cpu"))
    experts = topology.local_experts(model.moe.num_experts) if model.moe else None
    gpt = build_model(model, local_experts=experts, expert_group=groups.expert, recompute=layout.recompute)
    initialize(gpt, init_std=0.02, seed=1)
    config = deepspeed_config(micro_batch=layout.micro_batch, accumulation=layout.accumulation, clip=1.0,
                              world_size=layout.gpus, zero_stage=layout.zero_stage, dtype=model.dtype,
                              offload_optimizer=layout.offload_optimizer)  # fmt: skip
    optimizer = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return Engine(Objective(gpt, loss_weights={"balance": 0.01}), groups=groups, config=config, optimizer=optimizer,
                  clip=1.0)  # fmt: skip


def run_steps(model: ModelConfig, layout: Layout, *, rank: int, length: int, mask_documents: bool = False) -> None:
    engine = make_engine(model, layout, rank=rank)
    # at ZeRO-3 the first step gathers as the modules come, and only then is it known what is worth keeping
    for _ in range(2 if layout.zero_stage == 3 else 1):
        for micro in range(layout.accumulation):
            generator = torch.Generator().manual_seed(10 * micro + rank)
            token = torch.randint(0, model.vocab_size, (layout.micro_batch, length + 1), generator=generator)
            engine.forward_backward(split(token, mask_documents=mask_documents))
        engine.step(1e-3)


def measure(rank: int, cases: list[tuple[str, Layout]]) -> list[int]:
    """The most memory that a step took in each case, beyond what the process had before."""
    # give freed memory back at once, so that what is resident is what is alive and no two cases mix
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    peaks = []
    for name, layout in cases:
        model = MODELS[name]
        sparse = replace(model.moe, d_expert=32) if model.moe else None
        small = replace(model, vocab_size=64, d_model=32, num_heads=2, num_kv_heads=None, num_layers=2, d_ff=32,
                        moe=sparse)  # fmt: skip
        # imports and the libraries' own buffers, which are no part of a model
        run_steps(small, layout, rank=rank, length=16)
        gc.collect()
        dist.barrier()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")  # VmHWM starts anew
        before = resident("VmRSS")
        run_steps(model, layout, rank=rank, length=model.context, mask_documents=name == MASKED)
        peaks.append(resident("VmHWM") - before)
        gc.collect()
    return peaks


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_run_takes_the_memory_that_was_planned(ranks, monkeypatch) -> None:
    # oneDNN's bf16 products keep a compiled kernel for every number of rows they ever see, on a CPU alone
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1")
    peaks = ranks(2, measure, MEASURED, time_limit=900.0, fresh=True)[0]
    off = {}
    for (name, layout), peak in zip(MEASURED, peaks, strict=True):
        model = MODELS[name]
        parts = memory_of(model, layout, sequence_length=model.context, mask_documents=name == MASKED, imbalance=1.0,
                          device="cpu", slack=0)  # fmt: skip
        planned = parts.total + parts.host  # here they are one memory
        extra = "" if layout.recompute == "none" else f", {layout.recompute}"
        extra += ", offload" if layout.offload_optimizer else ""
        case = (
            f"{name} | {layout.expert_parallel} | {layout.zero_stage}{extra} | "
            f"{layout.micro_batch} x {layout.accumulation}"
        )
        off[case] = planned / peak - 1
        print(f"| {case} | {peak / 1e6:.0f} | {planned / 1e6:.0f} | {off[case]:+.1%} |")
    assert len(off) >= 6
    assert {case: value for case, value in off.items() if abs(value) > 0.10} == {}


WIDE = ModelConfig(vocab_size=256, context=32, num_layers=8, d_model=256, num_heads=4, d_ff=1024,
                   moe=MoEConfig(num_experts=8, top_k=2, d_expert=1024))  # fmt: skip


def build(rank: int, in_parts: bool) -> list[float]:
    """The most memory that a rank takes to build its share at ZeRO 3, and what is left of it, in whole models."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    groups = process_groups.make(Topology(world_size=2, rank=rank, expert_parallel=1), device=torch.device("cpu"))
    config = deepspeed_config(micro_batch=1, accumulation=1, clip=1.0, world_size=2, zero_stage=3, dtype="fp32")
    # at stage 1 it stays whole
    run = RunConfig(model=WIDE, parallel=ParallelConfig(zero_stage=3 if in_parts else 1))

    def cut_it(part: torch.nn.Module) -> None:
        cut(part, expert_parallel=1, config=config, device=groups.device)

    cut_it(torch.nn.Linear(2, 2))  # what DeepSpeed imports and sets up is no part of a model
    with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
        clear.write("5")
    before = resident("VmRSS")
    gpt = build_gpt(run, groups=groups, config=config, frequency=lambda: torch.ones(WIDE.vocab_size))
    cut_it(gpt)  # what is cut stays as it is
    whole = 4 * count_parameters(WIDE).total
    return [(resident(field) - before) / whole for field in ("VmHWM", "VmRSS")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_at_zero_3_no_rank_ever_holds_the_whole_model(ranks) -> None:
    (peak, left), (peak_of_all, left_of_all) = (ranks(2, build, in_parts, fresh=True)[0] for in_parts in (True, False))
    assert left == pytest.approx(0.5, abs=0.05)
    assert left_of_all == pytest.approx(0.5, abs=0.05)
    assert peak_of_all > 1
    assert peak < 0.5 + 3 / WIDE.num_layers
