"""The layer's benchmark: who gets which tokens, whose answers are the same, and that no row is missing."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moetrain.bench import peers
from moetrain.bench.layer import (
    ERROR,
    Case,
    Entry,
    Inputs,
    bench_layer,
    contestants,
    make_entry,
    make_experts_of,
    make_gpt,
    make_inputs,
    runs,
)
from moetrain.bench.settings import LAYER_CONTESTANTS, LayerSettings

CPU = torch.device("cpu")
TINY = LayerSettings(tokens=48, d_model=16, d_ff=48, experts=(4, 8), top_k=(2, 3), repeats=1)
CASES = [
    Case(dtype=dtype, routing=routing, experts=experts, top_k=top_k)
    for dtype, routing in itertools.product(("fp32", "bf16"), ("balanced", "skewed"))
    for experts, top_k in ((2, 1), (4, 2), (8, 2), (8, 3), (8, 7))
]


def field(case: Case) -> tuple[Inputs, dict[str, Entry]]:
    settings = replace(TINY, d_ff=8 * case.top_k)
    inputs = make_inputs(case, tokens=48, d_model=16, device=CPU)
    model, gpt = make_gpt(settings, case, inputs=inputs)
    return inputs, {name: make_entry(name, model=model, gpt=gpt, inputs=inputs) for name in LAYER_CONTESTANTS}


def counts(case: Case, *, tokens: int) -> list[int]:
    expert_TK = make_experts_of(case, tokens=tokens)
    assert expert_TK.shape == (tokens, case.top_k)
    assert all(len(set(row)) == case.top_k for row in expert_TK.tolist())
    return torch.bincount(expert_TK.flatten(), minlength=case.experts).tolist()


@pytest.mark.parametrize("case", CASES[:10], ids=str)
@pytest.mark.parametrize("tokens", [1, 47, 48])
def test_one_expert_of_a_skewed_routing_gets_half_of_the_copies_or_all_that_a_router_can_give_it(case, tokens):
    found = counts(case, tokens=tokens)
    rest = found
    if case.routing == "skewed":
        assert found[0] == min(tokens, tokens * case.top_k // 2)
        rest = found[1:]
    assert max(rest) - min(rest) <= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_router_chooses_the_experts_that_are_meant(case):
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("deepspeed")
    inputs = make_inputs(case, tokens=48, d_model=16, device=CPU)
    model, gpt = make_gpt(replace(TINY, d_ff=8 * case.top_k), case, inputs=inputs)
    layer, x_TD = gpt.blocks[0].feed_forward, inputs.x_1TD[0]
    meant = inputs.expert_TK.sort(-1).values
    assert torch.equal(layer.router(x_TD).expert_TK.sort(-1).values, meant)
    assert torch.equal(peers.mixtral_block(layer, model).gate(x_TD)[2].sort(-1).values, meant)
    theirs = peers.deepspeed_layer(layer, model)
    count_E = torch.bincount(meant.flatten(), minlength=case.experts)
    assert theirs(inputs.x_1TD)[2].tolist() == count_E.tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_peers_answer_as_ours(case):
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("deepspeed")
    _, entries = field(case)
    expected = entries["moetrain"].forward()[0].detach()
    assert expected.std() > 0
    error = {"fp32": 1e-6, "bf16": 0.02}[case.dtype] * float(expected.abs().max())
    for name in peers.exact(case.top_k):
        torch.testing.assert_close(entries[name].forward()[0], expected, rtol=ERROR[case.dtype], atol=error)
        assert peers.difference(entries[name].forward()[0], expected) < ERROR[case.dtype]


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "fp32"], ids=str)
def test_the_floor_is_the_work_of_our_experts(case):
    """Weighed and added up by a loop over the rows, its answer is the layer's."""
    inputs, entries = field(case)
    y_ND = entries["floor"].forward()[0]
    score_TE = inputs.x_1TD[0, :, : case.experts]
    expected = torch.zeros_like(inputs.x_1TD[0])
    rows = sorted((expert, token) for token, chosen in enumerate(inputs.expert_TK.tolist()) for expert in chosen)
    for row, (expert, token) in enumerate(rows):
        weight_K = score_TE[token][inputs.expert_TK[token]].softmax(-1)
        chosen = inputs.expert_TK[token].tolist().index(expert)
        expected[token] += weight_K[chosen] * y_ND[row]
    torch.testing.assert_close(entries["moetrain"].forward()[0][0], expected, rtol=1e-5, atol=1e-8)


def test_the_dropped_share_is_what_deepspeed_drops():
    pytest.importorskip("deepspeed")
    for case in (case for case in CASES if case.routing == "skewed" and case.top_k > 1):
        inputs = make_inputs(case, tokens=48, d_model=16, device=CPU)
        model, gpt = make_gpt(replace(TINY, d_ff=8 * case.top_k), case, inputs=inputs)
        theirs = peers.deepspeed_layer(gpt.blocks[0].feed_forward, model)
        peers.set_drops(theirs, True)
        slots = theirs.deepspeed_moe.gate(inputs.x_1TD[0], None, True)[3]
        count_E = torch.bincount(inputs.expert_TK.flatten(), minlength=case.experts)
        share = peers.dropped_share(count_E, tokens=48, top_k=case.top_k)
        assert share == pytest.approx(float((slots < 0).float().mean()))


def test_the_table_has_every_row():
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("deepspeed")
    ticks: list[str] = []
    rows = bench_layer(TINY, device=CPU, tick=ticks.append)
    assert [(row.dtype, row.routing, row.experts, row.top_k, row.contestant) for row in rows] == [
        (dtype, routing, experts, top_k, name)
        for dtype, routing in itertools.product(("fp32", "bf16"), ("balanced", "skewed"))
        for experts, top_k in ((4, 2), (4, 3), (8, 2), (8, 3))
        for name in LAYER_CONTESTANTS
    ]
    assert len(ticks) == runs(TINY)
    for row in rows:
        assert row.ms is not None, row
        assert row.ms > 0
        assert row.contestant != "dense" or row.ratio == 1
        # in and out, three matrices: their gradients at least
        experts = 1 if row.contestant == "dense" else row.experts
        gradients = 3 * 16 * 48 * experts / (row.top_k if experts > 1 else 1) * (4 if row.dtype == "fp32" else 2)
        assert row.peak_mib * 2**20 > gradients, row


def test_a_package_that_is_not_installed_costs_its_rows_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    settings = replace(TINY, experts=(4,), top_k=(2,), dtype=("fp32",), routing=("skewed",))
    rows = bench_layer(settings, device=CPU, tick=lambda name: None)
    assert [row.contestant for row in rows] == contestants(settings)
    assert not any("transformers" in row.contestant for row in rows)


class TestAdmission:
    def admit(self, name: str, *, make, is_peer: bool = True) -> peers.Admitted[Tensor]:
        return peers.admit(
            {name: is_peer},
            make=make,
            answer=lambda entry: entry,
            expected=torch.ones(4),
            exact=peers.exact(2),
            error=1e-3,
        )

    def test_whoever_does_other_work_is_not_timed(self):
        found = self.admit("transformers_eager", make=lambda name: torch.ones(4) * 1.5)
        assert found.entries == {}
        assert found.faults == {"transformers_eager": "not timed: its answer is not ours, but off by 5.0e-01 of it"}

    def test_an_answer_that_is_no_number_is_not_ours(self):
        assert self.admit("deepspeed_no_drop", make=lambda name: torch.full((4,), torch.nan)).entries == {}

    def test_whoever_drops_tokens_may_answer_otherwise(self):
        assert set(self.admit("deepspeed_capacity", make=lambda name: torch.zeros(4)).entries) == {"deepspeed_capacity"}

    def test_a_peer_that_fails_is_a_row_that_says_so(self):
        def fail(name: str) -> Tensor:
            raise AttributeError("no such thing\nin this version")

        assert self.admit("transformers_eager", make=fail).faults == {"transformers_eager": "not timed: no such thing"}
        with pytest.raises(AttributeError):
            self.admit("moetrain", make=fail, is_peer=False)
