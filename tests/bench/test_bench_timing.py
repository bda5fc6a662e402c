"""Turns and peaks, on work whose order and bytes are known."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from moetrain.bench import timing
from moetrain.bench.timing import Contestant, measure, observe, runs_of

CPU = torch.device("cpu")
KIB = 256
"""Elements of a KiB of float32."""


def peak(run: Callable[[], object]) -> int:
    return observe(run, device=CPU).peak_bytes


def test_the_peak_is_of_what_lives_at_once():
    def run() -> None:
        first = torch.ones(100 * KIB)
        del first
        second, third = torch.ones(300 * KIB), torch.ones(400 * KIB)
        del second, third
        torch.ones(600 * KIB)

    assert peak(run) == 700 * 1024


def test_what_was_there_before_does_not_count():
    held = [torch.ones(500 * KIB)]

    def run() -> None:
        held.clear()
        torch.ones(10 * KIB)

    assert peak(run) == 10 * 1024


def test_activations_and_gradients_count():
    """Of y = (x * x) * x: two products of the forward pass, then a gradient of each factor."""
    x = torch.ones(1000 * KIB, requires_grad=True)
    upstream = torch.ones(1000 * KIB)
    grown = peak(lambda: ((x * x) * x).backward(upstream))
    assert 3 * 1000 * 1024 <= grown <= 6 * 1000 * 1024
    assert peak(lambda: x.detach() * x.detach()) == 1000 * 1024


def test_what_a_kernel_needs_for_itself_counts():
    # a sort makes the indices, and more that it does not give back
    x = torch.rand(1000 * KIB)
    assert peak(lambda: x.sort()) > (4 + 8) * 1000 * KIB


def test_contestants_take_turns_and_start_clean():
    calls: list[str] = []

    def contestant(name: str) -> Contestant:
        return Contestant(name=name, run=lambda: calls.append(name), clear=lambda: calls.append("clear"))

    ticks: list[str] = []
    found = measure([contestant("dense"), contestant("b")], repeats=3, device=CPU, tick=ticks.append)
    # two turns to warm up, three timed ones, and nothing left behind
    assert calls == ["clear", "dense", "clear", "b"] * 5 + ["clear", "clear"]
    assert len(ticks) == runs_of(2, repeats=3)
    assert {name: len(each.seconds) for name, each in found.items()} == {"dense": 3, "b": 3}


def test_a_contestant_that_takes_far_longer_runs_once(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.05)
    runs: list[str] = []
    quick = Contestant(name="dense", run=lambda: runs.append("dense"), clear=lambda: None)
    slow = Contestant(name="slow", run=lambda: (runs.append("slow"), time.sleep(0.3)), clear=lambda: None)
    found = measure([quick, slow], repeats=2, device=CPU)
    assert runs.count("slow") == 1
    assert found["slow"].is_slow
    assert found["slow"].seconds == [pytest.approx(0.3, abs=0.3)]
    assert not found["dense"].is_slow
    rows = timing.rows_of(["dense", "slow"], found=found, notes={"slow": "mine"},
                          what={"dtype": "fp32", "routing": "balanced", "experts": 8, "top_k": 2})  # fmt: skip
    assert [row.note for row in rows] == ["", "mine; one run, with its memory watched"]
    assert rows[1].spread_ms is None
