"""`moetrain bench step`: a whole training step of a small GPT, with our layer and others', in turns in one process.

Every model starts with the same weights and trains on the same random tokens: forward, backward and fused AdamW at a
fixed learning rate; in bf16 the optimizer steps fp32 master weights and rounds them into the model, for all alike.
Ours and DeepSpeed's layer sit in our GPT; `transformers`' Mixtral is its own. All add a balance loss of the same
weight; only ours has a z-loss. Models that do exact work must give our scores before they are timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moetrain.moe.layer
from moetrain.bench import peers
from moetrain.bench.layer import TORCH_DTYPES, Tick
from moetrain.bench.settings import STEP_CONTESTANTS, YARDSTICK, StepSettings, shapes, taking_part
from moetrain.bench.timing import MIB, Contestant, Measured, Row, measure, rows_of, runs_of
from moetrain.config.routers import loss_weights
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.metrics.load import LoadMeter
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT
from moetrain.model.objective import Losses, MicroBatch, Objective
from moetrain.moe.layer import Load
from moetrain.plan.flops import flops_per_token

LEARNING_RATE = 1e-4
ERROR = 1e-3
"""Norm of the difference over the norm, up to which two models' scores are the same. They are compared in fp32: in bf16
rounding lets equal models choose other experts, and a third of the scores' norm may then differ."""
MATMUL = "matmul"
MATMUL_SIDE = 1536
"""The matmul whose rate counts as the machine's."""


class Optimizer:
    """Fused AdamW; of a model that is not in fp32, on fp32 master weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights: list[Tensor] = list(model.parameters())
        self.masters = [weight if weight.dtype == torch.float32 else weight.detach().float() for weight in self.weights]
        self._adamw = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        # a step of gradients that are zero makes the moments, which then are there before anything is measured
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self._adamw.step()
        self.clear()

    def step(self) -> None:
        if self.masters[0] is not self.weights[0]:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
        self._adamw.step()
        if self.masters[0] is not self.weights[0]:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)

    def clear(self) -> None:
        for tensor in (*self.weights, *self.masters):
            tensor.grad = None

    @property
    def state_bytes(self) -> int:
        """Weights, master weights and moments."""
        masters = sum(master.numel() * 4 for master in self.masters)
        own = 0 if self.masters[0] is self.weights[0] else sum(w.numel() * w.element_size() for w in self.weights)
        return own + 3 * masters


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant that trains a model."""

    model: nn.Module
    logits: Callable[[], Tensor]
    """Scores of the next token, for the comparison before."""
    train: Callable[[Optimizer], None]
    """One step."""


class Field:
    """The models of one table's contestants; two that differ by a switch share one."""

    def __init__(self, settings: StepSettings, *, dtype: str, experts: int, top_k: int, device: torch.device) -> None:
        moe = MoEConfig(
            router="top_k",
            num_experts=experts,
            top_k=top_k,
            d_expert=settings.d_ff // top_k,
            balance_scope="micro_batch",
        )
        self.config = ModelConfig(
            vocab_size=settings.vocab,
            context=settings.sequence,
            num_layers=settings.layers,
            num_heads=settings.heads,
            d_model=settings.d_model,
            d_ff=settings.d_ff,
            dtype=dtype,
            # large enough for the blocks to be heard beside the residual, when scores are compared
            init_std=settings.d_model**-0.5,
            moe=moe,
        )
        self._to: dict[str, Any] = {"device": device, "dtype": TORCH_DTYPES[dtype]}
        self.gpt = self._built(self.config)
        self.meter = LoadMeter(settings.layers, experts, device)
        self._weights = loss_weights(moe)
        self._peers: dict[str, nn.Module] = {}
        shape = (settings.batch, settings.sequence + 1)
        tokens = torch.randint(settings.vocab, shape, generator=torch.Generator().manual_seed(1)).to(device)
        self.token_BS, self.target_BS = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def make(self, name: str) -> Entry:
        """A contestant by name."""
        match name:
            case "dense":
                return self._ours(self._built(replace(self.config, moe=None)), run=self._unobserved)
            case "moetrain":
                return self._ours(self.gpt, run=self._observed)
            case "moetrain_unobserved":
                return self._ours(self.gpt, run=self._unobserved)
            case "transformers_grouped" | "transformers_eager":
                return self._mixtral(peers.experts_implementation(name))
            case "deepspeed_capacity" | "deepspeed_no_drop":
                return self._deepspeed(drops=name == "deepspeed_capacity")
        raise AssertionError(f"no contestant is named {name}")

    def observability_seconds(self, *, turns: int = 20) -> float:
        """What the numbers of the load take in a step by themselves: made in every layer, added up and read once."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        make_load = moetrain.moe.layer._load

        def record(*given: Any, **named: Any) -> Load:
            calls.append((given, named))
            return make_load(*given, **named)

        with torch.no_grad(), load_made_by(record):
            self.gpt(self.token_BS)
        taken = []
        for _ in range(turns):
            since = time.perf_counter()
            self._read([make_load(*given, **named) for given, named in calls])
            taken.append(time.perf_counter() - since)
        return statistics.median(taken)

    def _built(self, config: ModelConfig) -> GPT:
        gpt = build_model(config)
        initialize(gpt, init_std=config.init_std, seed=0)
        return gpt.to(**self._to)

    def _ours(self, gpt: GPT, *, run: Callable[[Objective, Optimizer], None]) -> Entry:
        objective = Objective(gpt, loss_weights=self._weights)
        return Entry(
            model=gpt, logits=lambda: gpt(self.token_BS).logit_BSV, train=lambda optimizer: run(objective, optimizer)
        )

    def _losses(self, objective: Objective) -> Losses:
        losses: Losses = objective(MicroBatch(token_BS=self.token_BS, target_BS=self.target_BS))
        return losses

    def _observed(self, objective: Objective, optimizer: Optimizer) -> None:
        losses = self._losses(objective)
        torch.autograd.backward(losses.total)
        optimizer.step()
        self._read(losses.load)

    def _unobserved(self, objective: Objective, optimizer: Optimizer) -> None:
        none = torch.zeros((), device=self.token_BS.device)
        empty = Load(**{each.name: none for each in fields(Load)})
        with load_made_by(lambda *given, **named: empty):
            torch.autograd.backward(self._losses(objective).total)
        optimizer.step()

    def _read(self, loads: list[Load]) -> None:
        """As a run does it (``train.hooks.log.LogHook``), read after every step."""
        for layer, load in enumerate(loads):
            self.meter.add(
                layer,
                load.count_E,
                dropped=load.dropped,
                entropy_sum=load.entropy,
                tokens=self.token_BS.numel(),
                balance=load.balance,
                z=load.z,
            )
        self.meter.read()

    def _mixtral(self, implementation: str) -> Entry:
        theirs = self._shared("transformers", lambda: peers.mixtral(self.gpt, self.config))
        moe = self.config.moe
        assert moe is not None
        # theirs counts a token K times, and averages over the blocks what we add up
        weight = self._weights["balance"] * self.config.num_layers / moe.top_k

        def logits() -> Tensor:
            peers.set_experts(theirs, implementation)
            scores: Tensor = theirs(input_ids=self.token_BS).logits
            return scores

        def train(optimizer: Optimizer) -> None:
            peers.set_experts(theirs, implementation)
            output = theirs(input_ids=self.token_BS, output_router_logits=True)
            (self._language(output.logits) + weight * output.aux_loss).backward()
            optimizer.step()

        return Entry(model=theirs, logits=logits, train=train)

    def _deepspeed(self, *, drops: bool) -> Entry:
        theirs = self._shared("deepspeed", lambda: peers.deepspeed_gpt(self.gpt, self.config))

        def logits() -> Tensor:
            peers.set_drops(theirs, drops)
            scores: Tensor = theirs(self.token_BS).logit_BSV
            return scores

        def train(optimizer: Optimizer) -> None:
            loss: Any = self._language(logits())
            for block in theirs.blocks:
                loss = loss + self._weights["balance"] * block.feed_forward.balance
            loss.backward()
            optimizer.step()

        return Entry(model=theirs, logits=logits, train=train)

    def _language(self, logit_BSV: Tensor) -> Tensor:
        return F.cross_entropy(logit_BSV.float().flatten(0, 1), self.target_BS.flatten())

    def _shared(self, package: str, make: Callable[[], nn.Module]) -> Any:
        if package not in self._peers:
            self._peers[package] = make()
        return self._peers[package]


def bench_step(settings: StepSettings, *, device: torch.device, tick: Tick) -> tuple[list[Row], list[str]]:
    """Rows and remarks of all tables."""
    rows: list[Row] = []
    remarks: list[str] = []
    for dtype, (experts, top_k) in itertools.product(settings.dtype, shapes(settings)):
        what = {"dtype": dtype, "routing": "learned", "experts": experts, "top_k": top_k}
        found, remark = _one_shape(settings, what=what, device=device, tick=tick)
        rows += found
        remarks.append(remark)
    return rows, remarks


def runs(settings: StepSettings) -> int:
    """How often ``bench_step`` ticks, at most."""
    tables = len(settings.dtype) * len(shapes(settings))
    return tables * runs_of(len(contestants(settings)) + 1, repeats=settings.repeats)


def contestants(settings: StepSettings) -> list[str]:
    """Who takes part and is installed, the yardstick first."""
    return taking_part(settings, STEP_CONTESTANTS)


@contextmanager
def load_made_by(make: Callable[..., Load]) -> Iterator[None]:
    """Let every MoE layer ask ``make`` for the numbers of its load: how else would one see what they cost?"""
    before = moetrain.moe.layer._load
    moetrain.moe.layer._load = make
    try:
        yield
    finally:
        moetrain.moe.layer._load = before


def _one_shape(
    settings: StepSettings, *, what: dict[str, Any], device: torch.device, tick: Tick
) -> tuple[list[Row], str]:
    names, dtype = contestants(settings), what["dtype"]
    shape = {"experts": what["experts"], "top_k": what["top_k"], "device": device}
    field = Field(settings, dtype="fp32", **shape)
    admitted = admit(field, names, exact=peers.exact(what["top_k"]))
    notes = dict(admitted.faults)
    if dtype != "fp32":
        field = Field(settings, dtype=dtype, **shape)
        admitted = admit(field, list(admitted.entries), exact=())
        notes |= admitted.faults
    entries = admitted.entries
    optimizers = {model: Optimizer(model) for model in dict.fromkeys(entry.model for entry in entries.values())}
    matmul = _matmul(TORCH_DTYPES[dtype], device=device)
    found = measure(
        [*(_contestant(name, entry, optimizers[entry.model]) for name, entry in entries.items()), matmul],
        repeats=settings.repeats,
        device=device,
        tick=lambda name: tick(f"{dtype} {what['experts']}/{what['top_k']} {name}"),
    )
    rate = 2 * MATMUL_SIDE**3 / statistics.median(found[MATMUL].seconds)
    remark = f"{dtype}, {what['experts']} experts: MFU is of the {rate / 1e9:,.0f} GFLOP/s of a {MATMUL_SIDE}^3 matmul"
    if "moetrain" in found:
        notes["moetrain"] = _observability(field, found)
        held = optimizers[field.gpt].state_bytes / MIB
        remark += f"; moetrain's weights, masters and moments are {held:,.0f} MiB"
    rows = rows_of(names, found=found, notes=notes, what=what)
    return [_with_mfu(row, field, rate=rate) for row in rows], remark


@torch.no_grad()
def admit(field: Field, names: list[str], *, exact: tuple[str, ...]) -> peers.Admitted[Entry]:
    """Build the contestants, and leave out those that fail, and the ``exact`` ones whose scores are not ours."""
    return peers.admit(
        {name: STEP_CONTESTANTS[name] is not None for name in names},
        make=field.make,
        answer=lambda entry: entry.logits(),
        expected=field.gpt(field.token_BS).logit_BSV,
        exact=exact,
        error=ERROR,
    )


def _contestant(name: str, entry: Entry, optimizer: Optimizer) -> Contestant:
    return Contestant(name=name, run=lambda: entry.train(optimizer), clear=optimizer.clear)


def _matmul(dtype: torch.dtype, *, device: torch.device) -> Contestant:
    side = torch.ones(MATMUL_SIDE, MATMUL_SIDE, device=device, dtype=dtype)
    return Contestant(name=MATMUL, run=lambda: side @ side, clear=lambda: None)


def _with_mfu(row: Row, field: Field, *, rate: float) -> Row:
    if row.ms is None:
        return row
    config = replace(field.config, moe=None) if row.contestant == YARDSTICK else field.config
    flops = flops_per_token(config, sequence_length=field.token_BS.shape[1]) * field.token_BS.numel()
    return replace(row, mfu=flops / (row.ms / 1e3) / rate)


def _observability(field: Field, found: dict[str, Measured]) -> str:
    cost, whole = field.observability_seconds(), statistics.median(found["moetrain"].seconds)
    return f"load numbers by themselves {cost * 1e3:.2f} ms, {cost / whole:.2%} of the step"
