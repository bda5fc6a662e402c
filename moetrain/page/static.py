"""The same pictures as files: PNG to look at, SVG to print."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.page.charts import HEAT, PALETTE, Chart, HeatMap, Number, Series

DPI = 130
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "moetrain",  # the same picture, the same file
}
_MOST_MAPS, _MOST_OF_ALL = 3, 12


def draw(part: Chart | HeatMap, directory: Path, *, title: str) -> list[Path]:
    """Write KEY.png and KEY.svg; returns their paths.

    Args:
        title: stands above it, before the picture's own.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        figure.suptitle(f"{title}: {part.title}", x=0.01, ha="left", fontweight="bold", fontsize=10)
        if isinstance(part, Chart):
            _lines(figure.subplots(), part)
        else:
            _heat_maps(figure, part)
        return [_save(figure, directory / f"{part.key}.{kind}") for kind in ("png", "svg")]


def _lines(axes: Any, chart: Chart) -> None:
    places = None if chart.categories is None else {label: place for place, label in enumerate(chart.categories)}
    for index, series in enumerate(chart.series):
        colour = PALETTE[(index if series.colour is None else series.colour) % len(PALETTE)]
        x = [places[str(each)] if places is not None else _number(each) for each in series.x]
        y = [_number(each) for each in series.y]
        if series.band is not None:
            axes.fill_between(x, *series.band, color=colour, alpha=0.18, linewidth=0)
        errors = None if series.error is None else [_number(each) for each in series.error]
        axes.errorbar(x, y, yerr=errors, color=colour, label=series.name, capsize=2.5, **_marks(series))
    if chart.log_x:
        axes.set_xscale("log")
    if chart.ticks is not None:
        axes.set_xticks(list(chart.ticks), [f"{tick:,.4g}" for tick in chart.ticks])
        axes.minorticks_off()
    if chart.log_y:
        axes.set_yscale("log")
    if places is not None:
        axes.set_xticks(list(places.values()), list(places))
    if chart.zero:
        axes.set_ylim(0, 1.04 * axes.get_ylim()[1])
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if len(chart.series) > 1:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _marks(series: Series) -> dict[str, Any]:
    # a line through one point is invisible
    with_marks = series.markers or len(series.x) == 1
    line = "" if not series.lines else "--" if series.dashed else "-"
    return {"linestyle": line, "linewidth": 1.4, "marker": "o" if with_marks else "", "markersize": 4.5}


def _heat_maps(figure: Any, part: HeatMap) -> None:
    """A few moments side by side: the first, those between and the last; or every frame."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    count = min(_MOST_OF_ALL if part.every_frame else _MOST_MAPS, len(part.frames))
    chosen = [part.frames[round(i * (len(part.frames) - 1) / max(1, count - 1))] for i in range(count)]
    if count == 1:
        chosen = [part.frames[-1]]
    rows_of_maps = -(-count // _MOST_MAPS)
    grid = figure.subplots(rows_of_maps, min(count, _MOST_MAPS), squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    image = None
    for place, (axes, (label, rows)) in enumerate(zip(grid.flat, chosen, strict=False)):
        values = [[_number(each) for each in row] for row in rows]
        image = axes.imshow(
            values,
            cmap=LinearSegmentedColormap.from_list("heat", HEAT),
            vmin=part.low,
            vmax=part.high,
            aspect="auto",
            origin="lower",
        )
        axes.set_title(label, fontsize=9)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(part.x_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if place % _MOST_MAPS == 0:
            axes.set_ylabel(part.y_label)
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.04, aspect=30, extend="max")
    bar.set_label(part.scale_label)
    bar.outline.set_visible(False)


def _number(value: Number | str) -> float:
    return math.nan if value is None else float(value)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    # no date in an SVG: the same run, the same file
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(beside, format=path.suffix[1:], dpi=DPI, metadata=metadata)
    os.replace(beside, path)
    return path


def draw_all(parts: Sequence[Chart | HeatMap], directory: Path, *, title: str) -> list[Path]:
    """Every picture of a page, as files."""
    return [path for part in parts for path in draw(part, directory, title=title)]
