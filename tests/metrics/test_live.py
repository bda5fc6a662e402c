"""The live view: a dashboard on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from moetrain.metrics.live import LiveView, imbalance_tax, load_bars, sparkline

LINE = {"step": 4, "loss": 3.25, "step_losses": [5.0, 4.0, 3.5, 3.25], "tokens_per_second": 1000.0,
        "load": [[0.25, 0.25, 0.25, 0.25], [0.7, 0.2, 0.1, 0.0]]}  # fmt: skip


def shown(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    view = LiveView(total=4, expert_parallel=2, expert_share=0.5, tokens_per_step=500, console=console)
    with view as live:
        live.show(LINE)
        live.advance_to(4, note="loss 3.250")
        live.say("saved at step 4")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_a_terminal_shows_loss_load_and_what_the_imbalance_costs():
    text = shown(terminal=True)
    assert "█▄▂▁  3.250" in text
    # 2.8, 0.8, 0.4 and 0 times the fair share, in eighths of two times
    assert "layer 1  █▄▂·" in text
    # (0 + 0.9 * 2 - 1) / 2 = 0.4 more than even, half of the FLOPs in experts: 500 ms x (1 - 1 / 1.2)
    assert "83.3 ms of 500 ms a step" in text
    assert "saved at step 4" in text


def test_a_run_that_went_back_draws_the_steps_that_count():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with LiveView(total=9, console=console) as live:
        live.show({"step": 4, "loss": 4.0, "step_losses": [5.0, 4.0, math.nan, 3.0]})
        live.show({"step": 6, "loss": 90.0, "step_losses": [80.0, 100.0]})
        live.go_back(2)
        live.show({"step": 4, "loss": 2.0, "step_losses": [3.0, 1.0]})
    assert "loss  █▆▅▁  2.000" in console.file.getvalue()  # type: ignore[attr-defined]


def test_elsewhere_there_are_plain_lines():
    text = shown(terminal=False)
    assert text.splitlines() == ["train 4/4 steps loss 3.250", "saved at step 4"]


def test_ranks_that_are_not_shown_say_nothing():
    console = Console(file=io.StringIO(), force_terminal=True)
    with LiveView(total=4, shown=False, console=console) as live:
        live.show(LINE)
        live.advance_to(4)
        live.say("x")
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [([], 5, ""), ([2.0], 5, "▁"), ([1.0, 1.0], 5, "▁▁"), ([8.0, 1.0], 5, "█▁"), ([1.0, 3.0, 6.0, 8.0], 2, "▁█")],
)
def test_a_sparkline_goes_from_the_lowest_to_the_highest_mean(values, width, drawn):
    assert sparkline(values, width=width) == drawn


def test_bars_of_the_load_end_at_twice_the_fair_share():
    text = load_bars([0.0, 0.125, 0.25, 0.5])
    assert text.plain == "·▃▅█"
    assert load_bars([float("nan")] * 2).plain == "··"


@pytest.mark.parametrize(
    ("loads", "ranks", "seconds"),
    [
        ([[0.25] * 4], 2, 0.0),
        ([[0.5, 0.0, 0.5, 0.0]], 2, 0.0),  # uneven experts on even ranks cost nothing
        ([[1.0, 0.0, 0.0, 0.0]], 2, 1 - 1 / 1.5),
        ([[1.0, 0.0, 0.0, 0.0]], 1, 0.0),
        ([[float("nan")] * 4], 2, 0.0),
    ],
)
def test_the_tax_is_what_the_fullest_rank_has_more(loads, ranks, seconds):
    tax = imbalance_tax(loads, seconds=1.0, expert_parallel=ranks, share=0.5)
    assert tax == pytest.approx(seconds)
