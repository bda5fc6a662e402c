from __future__ import annotations

import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetrain.errors import DataError
from moetrain.report import figures
from moetrain.report.figures import expert_load_map, has_load, loss_curve


def invented_run(*, num_layers: int, num_experts: int, lines: int = 15) -> list[dict[str, Any]]:
    """A run whose experts grow alike: expert e of layer l starts with a weight of its own."""
    metrics: list[dict[str, Any]] = []
    for i in range(1, lines + 1):
        weights = [[1 + ((3 * e + layer) % 7) / i for e in range(num_experts)] for layer in range(num_layers)]
        load = [[w / sum(row) for w in row] for row in weights]
        metrics.append(
            {
                "step": 10 * i,
                "tokens": 40_960 * i,
                "loss": 2 + 6 / i,
                "lr": 1e-3 / i,
                "load": load,
                "max_over_mean": [max(row) * num_experts for row in load],
            }
        )
        if i % 5 == 0:
            metrics.append({"step": 10 * i, "tokens": 40_960 * i, "held_out_loss": 2.1 + 6 / i})
    return metrics


def dense(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in ("load", "max_over_mean")} for line in metrics]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, as the header has them; matplotlib's reader checks the rest of the file."""
    from matplotlib.image import imread

    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert imread(path).shape[:2] == (height, width)
    return width, height


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that would have been saved."""
    kept: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    return kept


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_the_loss_curve_is_a_whole_png(tmp_path: Path) -> None:
    loss_curve(invented_run(num_layers=2, num_experts=4), tmp_path / "loss.png", title="tiny")
    assert png_size(tmp_path / "loss.png") == (8 * 150, 5 * 150)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]  # nothing left beside it


def test_the_loss_curve_shows_both_losses_and_the_learning_rate_over_tokens(tmp_path: Path, drawn: list[Any]) -> None:
    metrics = dense(invented_run(num_layers=1, num_experts=2, lines=6))
    loss_curve(metrics, tmp_path / "loss.png", title="tiny")
    top, bottom = drawn[0].axes
    train, held_out = top.lines
    assert points(train) == [(40_960 * i, 2 + 6 / i) for i in range(1, 7)]
    assert points(held_out) == [(40_960 * 5, 2.1 + 6 / 5)]
    assert points(bottom.lines[0]) == [(40_960 * i, 1e-3 / i) for i in range(1, 7)]


def test_a_null_loss_is_a_gap(tmp_path: Path, drawn: list[Any]) -> None:
    metrics = dense(invented_run(num_layers=1, num_experts=2, lines=3))
    metrics[1]["loss"] = None
    loss_curve(metrics, tmp_path / "loss.png", title="tiny")
    losses = [y for _, y in points(drawn[0].axes[0].lines[0])]
    assert losses[0] == 8
    assert math.isnan(losses[1])
    assert losses[2] == 4


def test_a_run_with_only_one_kind_of_loss_can_be_drawn(tmp_path: Path) -> None:
    metrics = invented_run(num_layers=1, num_experts=2, lines=5)
    loss_curve(metrics[:1], tmp_path / "train.png", title="one step")
    loss_curve(metrics[-1:], tmp_path / "held_out.png", title="evaluated only")
    assert png_size(tmp_path / "train.png") == png_size(tmp_path / "held_out.png") == (1200, 750)


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (4, 8), (12, 64)])
def test_the_load_map_is_a_whole_png_at_any_width(tmp_path: Path, num_layers: int, num_experts: int) -> None:
    metrics = invented_run(num_layers=num_layers, num_experts=num_experts)
    expert_load_map(metrics, tmp_path / "load.png", title="wide")
    width, height = png_size(tmp_path / "load.png")
    assert 1000 <= width <= 2000
    assert 450 <= height <= 1000
    assert [path.name for path in tmp_path.iterdir()] == ["load.png"]


def test_the_load_map_shows_the_last_ten_lines_mean_share_times_experts(tmp_path: Path, drawn: list[Any]) -> None:
    metrics = invented_run(num_layers=3, num_experts=4)
    expert_load_map(metrics, tmp_path / "load.png", title="tiny")
    last = [line["load"] for line in metrics if "load" in line][-10:]
    expected = [[sum(load[layer][e] for load in last) / 10 * 4 for e in range(4)] for layer in range(3)]
    left = drawn[0].axes[0]
    assert left.images[0].get_array().tolist() == [pytest.approx(row) for row in expected]
    written = [float(text.get_text()) for text in left.texts]
    assert written == pytest.approx(sum(expected[1:], expected[0]), abs=0.005)
    assert "steps 60 to 150" in left.get_title()


def test_fair_is_the_middle_of_the_colours(tmp_path: Path, drawn: list[Any]) -> None:
    expert_load_map(invented_run(num_layers=1, num_experts=4), tmp_path / "load.png", title="tiny")
    assert drawn[0].axes[0].images[0].norm(1.0) == 0.5


def test_many_experts_have_colours_without_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    expert_load_map(invented_run(num_layers=2, num_experts=17), tmp_path / "load.png", title="wide")
    assert len(drawn[0].axes[0].texts) == 0


def test_the_load_map_shows_each_layers_imbalance_over_the_steps(tmp_path: Path, drawn: list[Any]) -> None:
    metrics = invented_run(num_layers=2, num_experts=4, lines=4)
    expert_load_map(metrics, tmp_path / "load.png", title="tiny")
    lines = drawn[0].axes[1].lines
    for layer in range(2):
        assert points(lines[layer]) == [(line["step"], line["max_over_mean"][layer]) for line in metrics]


def test_a_layer_that_got_no_tokens_stays_blank(tmp_path: Path, drawn: list[Any]) -> None:
    metrics = invented_run(num_layers=2, num_experts=4, lines=2)
    for line in metrics:
        line["load"][1] = [None] * 4
        line["max_over_mean"][1] = None
    expert_load_map(metrics, tmp_path / "load.png", title="tiny")
    assert len(drawn[0].axes[0].texts) == 4


def test_only_a_run_with_moe_blocks_has_a_load() -> None:
    metrics = invented_run(num_layers=1, num_experts=2)
    assert has_load(metrics)
    assert has_load(metrics[-1:] + metrics[:1])
    assert not has_load(dense(metrics))
    assert not has_load([{"step": 1, "load": []}])
    assert not has_load([])


def test_nothing_to_draw_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no line of the metrics has a loss"):
        loss_curve([], tmp_path / "loss.png", title="empty")
    with pytest.raises(DataError, match="no line of the metrics has an expert load"):
        expert_load_map(dense(invented_run(num_layers=1, num_experts=2)), tmp_path / "load.png", title="dense")
    assert list(tmp_path.iterdir()) == []


def test_the_bars_of_a_plan_are_its_parts(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from moetrain.plan.layout import Layout
    from moetrain.plan.memory.device import Memory
    from moetrain.plan.time import StepTime
    from moetrain.report.figures import plan_bars

    drawn = []
    barh = Axes.barh

    def record(axes, rows, widths, **how):
        drawn.append((how["label"], list(widths), list(how["left"])))
        return barh(axes, rows, widths, **how)

    monkeypatch.setattr(Axes, "barh", record)
    plans = [
        SimpleNamespace(layout=Layout(gpus=8), memory=Memory(weights=3e9, moments=2e9), time=StepTime(compute=2.0)),
        SimpleNamespace(layout=Layout(gpus=16), memory=Memory(weights=1e9, moments=4e9), time=StepTime(compute=1.0)),
    ]
    plan_bars(plans, tmp_path / "plan.png", title="a plan", limit_gb=8.0)
    assert drawn == [
        ("weights", [3.0, 1.0], [0.0, 0.0]),
        ("moments", [2.0, 4.0], [3.0, 1.0]),
        ("compute", [2.0, 1.0], [0.0, 0.0]),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
