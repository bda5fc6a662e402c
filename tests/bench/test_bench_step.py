"""The step's benchmark: same scores before, real training, and what the numbers of the load cost."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import moetrain.moe.layer
from moetrain.bench import peers
from moetrain.bench.settings import STEP_CONTESTANTS, StepSettings
from moetrain.bench.step import Field, Optimizer, admit, bench_step, load_made_by, runs
from moetrain.plan.flops import flops_per_token

CPU = torch.device("cpu")
TINY = StepSettings(d_model=16, d_ff=48, layers=2, heads=2, vocab=40, sequence=12, batch=2, experts=(4,), repeats=1)


def field(dtype: str = "fp32", *, experts: int = 4, top_k: int = 2) -> Field:
    return Field(TINY, dtype=dtype, experts=experts, top_k=top_k, device=CPU)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_exact_peers_score_as_our_model(top_k):
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("deepspeed")
    models = field(top_k=top_k)
    with torch.no_grad():
        expected = models.gpt(models.token_BS).logit_BSV
        assert expected.std() > 0.1
        for name in peers.exact(top_k):
            torch.testing.assert_close(models.make(name).logits(), expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_other_weights_is_not_timed():
    pytest.importorskip("transformers", minversion="5.0")
    models = field()
    theirs = models.make("transformers_grouped").model
    with torch.no_grad():
        weight = theirs.model.layers[1].mlp.experts.down_proj
        weight.copy_(weight.flip(0))
    admitted = admit(models, ["dense", "moetrain", "transformers_grouped"], exact=peers.exact(2))
    assert list(admitted.entries) == ["dense", "moetrain"]
    assert admitted.faults["transformers_grouped"].startswith("not timed: its answer is not ours")


def test_a_peer_that_cannot_do_a_shape_in_bf16_is_a_row_that_says_so():
    """Grouped matmuls want rows of a multiple of 16 bytes: 12 hidden units are that in fp32 alone."""
    pytest.importorskip("transformers", minversion="5.0")
    settings = replace(TINY, d_ff=24, contestants=("transformers_grouped", "transformers_eager"))
    rows, _ = bench_step(settings, device=CPU, tick=lambda name: None)
    left_out = [(row.dtype, row.contestant) for row in rows if row.ms is None]
    assert left_out == [("bf16", "transformers_grouped")]
    (note,) = [row.note for row in rows if row.ms is None]
    assert note.startswith("not timed: ")
    assert "16 bytes" in note


@pytest.mark.parametrize("name", STEP_CONTESTANTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contestant_learns_its_batch(name, dtype):
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("deepspeed")
    models = field(dtype)
    entry = models.make(name)

    def loss() -> float:
        with torch.no_grad():
            logits = entry.logits().float().flatten(0, 1)
        return float(nn.functional.cross_entropy(logits, models.target_BS.flatten()))

    before = loss()
    optimizer = Optimizer(entry.model)
    for _ in range(30):
        optimizer.clear()
        entry.train(optimizer)
    assert loss() < before - 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_is_adamw_on_fp32_weights(dtype):
    model = nn.Linear(5, 3).to(dtype)
    plain = copy.deepcopy(model).float()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    optimizer = Optimizer(model)
    # the zero gradients of the start count as a step
    for weight in plain.parameters():
        weight.grad = torch.zeros_like(weight)
    adamw.step()
    for seed in range(4):
        for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            its.grad = mine.grad.float()
        optimizer.step()
        adamw.step()
    for mine, master, its in zip(model.parameters(), optimizer.masters, plain.parameters(), strict=True):
        torch.testing.assert_close(master, its, rtol=1e-6, atol=1e-7)
        assert torch.equal(mine, master.to(dtype))
    assert optimizer.state_bytes == 18 * (12 if dtype == torch.float32 else 14)


def test_without_observability_no_load_is_counted_and_all_else_is_the_same():
    seen, unseen = field(), field()
    made: list[object] = []
    original = moetrain.moe.layer._load
    moetrain.moe.layer._load = lambda *given, **named: made.append(1) or original(*given, **named)
    try:
        unseen.make("moetrain_unobserved").train(Optimizer(unseen.gpt))
        assert made == []
        seen.make("moetrain").train(Optimizer(seen.gpt))
        assert len(made) == 2
    finally:
        moetrain.moe.layer._load = original
    for mine, its in zip(seen.gpt.parameters(), unseen.gpt.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_what_makes_the_load_is_put_back():
    before = moetrain.moe.layer._load
    with pytest.raises(RuntimeError), load_made_by(lambda *given, **named: None):
        raise RuntimeError
    assert moetrain.moe.layer._load is before


def test_the_cost_of_observability_is_of_every_block():
    models = field()
    reports: list[object] = []
    read = models.meter.read
    models.meter.read = lambda: reports.append(read()) or reports[-1]
    assert models.observability_seconds(turns=3) > 0
    assert len(reports) == 3
    for layer, moe in enumerate(models.gpt(models.token_BS).moe):
        expected = moe.load.count_E / moe.load.count_E.sum()
        assert reports[0].share[layer] == pytest.approx(expected.tolist())


def test_the_table_has_every_row():
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("deepspeed")
    ticks: list[str] = []
    settings = replace(TINY, experts=(4, 6))
    rows, remarks = bench_step(settings, device=CPU, tick=ticks.append)
    assert [(row.dtype, row.experts, row.top_k, row.contestant) for row in rows] == [
        (dtype, experts, 2, name) for dtype in ("fp32", "bf16") for experts in (4, 6) for name in STEP_CONTESTANTS
    ]
    assert len(ticks) == runs(settings)
    assert len(remarks) == 4
    config = field().config
    flops = {True: flops_per_token(replace(config, moe=None), sequence_length=12),
             False: flops_per_token(config, sequence_length=12)}  # fmt: skip
    dense = rows[0]
    for row in rows[: len(STEP_CONTESTANTS)]:
        assert row.ms > 0
        assert row.peak_mib > 0
        work, dense_work = (each.ms * each.mfu for each in (row, dense))
        assert work / dense_work == pytest.approx(flops[row is dense] / flops[True])
    assert "load numbers by themselves" in rows[1].note
