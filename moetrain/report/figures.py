"""Pictures: of one run, out of the lines of its metrics.jsonl, and of a plan."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moetrain.errors import DataError
from moetrain.plan.memory.device import PARTS
from moetrain.plan.time import TIMES

Metrics = Sequence[dict[str, Any]]

DPI = 150
SOURCE_COLOURS = ["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:olive", "tab:cyan", "tab:pink", "tab:brown"]
_LAST_LINES = 10
_MOST_EXPERTS_WITH_NUMBERS = 16
_MOST_LAYERS_WITH_NAMES = 8

# Over matplotlib's own defaults, whatever the user's matplotlibrc says.
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def loss_curve(metrics: Metrics, path: Path, *, title: str) -> None:
    """Training and held-out loss over tokens, and the learning rate below, as a PNG of 1200 x 750 pixels.

    Args:
        metrics: lines of metrics.jsonl; a null loss leaves a gap.
        path: where the picture goes.
        title: stands above it.

    Raises:
        DataError: no line has a loss.
    """
    train = [line for line in metrics if "loss" in line]
    held_out = [line for line in metrics if "held_out_loss" in line]
    if not train and not held_out:
        raise DataError(
            f"{path.name} cannot be drawn: no line of the metrics has a loss; the run has logged nothing yet"
        )
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(8, 5), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        _line(top, train, "loss", color="tab:blue", label="training")
        _line(top, held_out, "held_out_loss", color="tab:orange", label="held out", marker="o")
        top.set_ylabel("loss (nats per token)")
        top.legend(loc="upper right")
        _line(bottom, train, "lr", color="0.35")
        bottom.set_ylabel("learning\nrate")
        bottom.set_ylim(bottom=0)
        bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bottom.set_xlabel("tokens")
        bottom.xaxis.set_major_formatter(EngFormatter(sep=" "))
        figure.align_ylabels()
        _save(figure, path)


def has_load(metrics: Metrics) -> bool:
    """Whether there is an expert load to draw; a run without MoE blocks has none."""
    return any(line.get("load") for line in metrics)


def expert_load_map(metrics: Metrics, path: Path, *, title: str) -> None:
    """Load of every expert of every layer at the end, and the imbalance of each layer on the way, as a PNG.

    Left: share of the layer's tokens times the number of experts, so 1 is fair, averaged over the last ten lines
    that have a load. Right: the fullest expert's, for each layer, over the steps.

    Args:
        metrics: lines of metrics.jsonl.
        path: where the picture goes.
        title: stands above it.

    Raises:
        DataError: no line has an expert load; see ``has_load``.
    """
    loads = [line for line in metrics if line.get("load")]
    if not loads:
        raise DataError(f"{path.name} cannot be drawn: no line of the metrics has an expert load; is the model dense?")
    import numpy as np
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # dtype=float turns the nulls of a layer without tokens into NaN, which stays blank.
    share = np.array([line["load"] for line in loads[-_LAST_LINES:]], dtype=float).mean(axis=0)
    num_layers, num_experts = share.shape
    map_width = min(max(3.2, 0.42 * min(num_experts, _MOST_EXPERTS_WITH_NUMBERS) + 1.2), 8.0)
    height = min(max(3.2, 0.3 * num_layers + 1.6), 6.5)
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(map_width + 4.6, height), layout=ConstrainedLayoutEngine(wspace=0.06))
        left, right = figure.subplots(1, 2, width_ratios=[map_width, 4.6])
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        first, last = loads[-_LAST_LINES:][0]["step"], loads[-1]["step"]
        left.set_title(f"load, mean of steps {first:,} to {last:,}" if first != last else f"load at step {last:,}")
        _heat_map(figure, left, share * num_experts)
        right.set_title("fullest expert of each layer")
        _imbalance(figure, right, loads, num_layers=num_layers)
        _save(figure, path)


def plan_bars(plans: Sequence[Any], path: Path, *, title: str, limit_gb: float) -> None:
    """Memory of one device against its limit, and the time of a step, of planned layouts, as stacked bars in a PNG.

    Args:
        plans: of ``plan.search``, best first; at least one.
        path: where the picture goes.
        title: stands above it.
        limit_gb: memory of one device.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    rows = max(3, len(plans))
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(11, 2.1 + 0.5 * rows), layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        names = [_layout_name(plan) for plan in plans]
        left.set_title("memory of one device (GB)")
        _stacked(left, [plan.memory for plan in plans], PARTS, names=names, size=1e9, colours="tab10")
        left.axvline(limit_gb, color="0.2", linewidth=1.2, linestyle="--")
        left.text(
            limit_gb, 1.01, f"{limit_gb:,.0f} GB", ha="center", va="bottom", fontsize=8, color="0.2",
            transform=left.get_xaxis_transform(),
        )  # fmt: skip
        left.set_xlim(0, limit_gb * 1.06)
        right.set_title("time of a step (s)")
        _stacked(right, [plan.time for plan in plans], TIMES, names=[""] * len(plans), size=1.0, colours="Paired")
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.set_ylim(rows - 0.5, -0.5)
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.45 / (0.5 * rows + 0.6)),
                ncols=4,
                fontsize=8,
                handlelength=1.0,
            )
        _save(figure, path)


def _layout_name(plan: Any) -> str:
    layout = plan.layout
    offload = ", offload" if layout.offload_optimizer else ""
    return (
        f"{layout.gpus:,} devices, EP {layout.expert_parallel}, ZeRO-{layout.zero_stage}{offload}\n"
        f"recompute {layout.recompute}, {layout.micro_batch} x {layout.accumulation}"
    )


def _stacked(
    axes: Any, bars: Sequence[Any], parts: Sequence[str], *, names: Sequence[str], size: float, colours: str
) -> None:
    """One bar for each of ``bars``, from the top; parts that no bar shows are left out."""
    import matplotlib as mpl

    palette = mpl.colormaps[colours]
    largest = max(bar.total for bar in bars)
    left = [0.0] * len(bars)
    for index, part in enumerate(parts):
        widths = [getattr(bar, part) / size for bar in bars]
        if max(widths) * size > 0.003 * largest:
            label = part.replace("_", " ")
            axes.barh(range(len(bars)), widths, left=left, height=0.62, color=palette(index % palette.N), label=label)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f"{total:,.3g}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    axes.set_yticks(range(len(bars)), names)
    axes.set_xlim(0, max(left) * 1.12)


def document_lengths(lengths: Mapping[str, Sequence[int]], path: Path, *, title: str) -> None:
    """How long the documents of a batch are, one colour for each source, as a PNG of 1200 x 600 pixels.

    Args:
        lengths: tokens of each document, by the name of its source; none is 0.
        path: where the picture goes.
        title: stands above it.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    longest = max(max(each, default=1) for each in lengths.values())
    # borders at powers of the square root of two, but whole numbers: a document of 3 tokens lies in one bar alone
    edges = sorted({math.ceil(2 ** (place / 2)) for place in range(math.ceil(2 * math.log2(longest + 1)) + 1)})
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        names = [f"{name} ({len(each):,})" for name, each in lengths.items()]
        axes.hist(list(lengths.values()), bins=edges, stacked=True, label=names, rwidth=0.92,
                  color=SOURCE_COLOURS[: len(names)] if len(names) <= len(SOURCE_COLOURS) else None)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel("tokens of a document in its sequence")
        axes.set_ylabel("documents")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")
        _save(figure, path)


def _heat_map(figure: Any, axes: Any, load: Any) -> None:
    """``load`` is [L][E], 1 being fair."""
    from matplotlib.ticker import MaxNLocator

    num_layers, num_experts = load.shape
    # The same colours in every picture, so that two runs can be compared by eye; what is above 2 is dark alike.
    image = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    for axis, count in ((axes.xaxis, num_experts), (axes.yaxis, num_layers)):
        if count <= _MOST_EXPERTS_WITH_NUMBERS:
            axis.set_ticks(range(count))
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
    if num_experts <= _MOST_EXPERTS_WITH_NUMBERS:
        for layer, expert in ((i, j) for i in range(num_layers) for j in range(num_experts)):
            value = load[layer, expert]
            if math.isnan(value):
                continue
            colour = "white" if abs(value - 1) > 0.65 else "black"
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, aspect=30, extend="max" if (load > 2).any() else "neither")
    bar.set_label("share of tokens x experts (1 = fair)")
    bar.outline.set_visible(False)


def _imbalance(figure: Any, axes: Any, loads: Metrics, *, num_layers: int) -> None:
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    colours = mpl.colormaps["viridis"].resampled(num_layers)
    steps = [line["step"] for line in loads]
    for layer in range(num_layers):
        values = [_number(line["max_over_mean"][layer]) for line in loads]
        marker = "o" if len(loads) == 1 else None
        axes.plot(steps, values, color=colours(layer), linewidth=1.1, marker=marker, label=f"layer {layer}")
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=min(0.95, axes.get_ylim()[0]))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("max / mean load (1 = fair)")
    if num_layers <= _MOST_LAYERS_WITH_NAMES:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, handlelength=1.2)
    else:
        norm = BoundaryNorm([i - 0.5 for i in range(num_layers + 1)], num_layers)
        bar = figure.colorbar(ScalarMappable(norm=norm, cmap=colours), ax=axes, fraction=0.04, aspect=30)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
        bar.minorticks_off()
        bar.set_label("MoE layer")
        bar.outline.set_visible(False)


def _line(axes: Any, lines: Metrics, key: str, *, color: str, label: str = "", marker: str | None = None) -> None:
    if not lines:
        return
    # A line through one point is invisible.
    marker = marker or ("o" if len(lines) == 1 else None)
    values = [_number(line.get(key)) for line in lines]
    axes.plot([line["tokens"] for line in lines], values, color=color, label=label, marker=marker, ms=3.5, lw=1.2)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _save(figure: Any, path: Path) -> None:
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, format="png", dpi=DPI)
    os.replace(beside, path)
