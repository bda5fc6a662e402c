"""Pictures as Plotly figures: plain JSON, which the page hands to Plotly's script."""

from __future__ import annotations

from typing import Any

from moetrain.page.charts import HEAT, PALETTE, Chart, HeatMap, Series

_MARGIN = {"l": 64, "r": 16, "t": 36, "b": 52}
_BUTTONS = 28
"""At the top there is room for Plotly's buttons, and for the legend under them."""


def figure(part: Chart | HeatMap) -> dict[str, Any]:
    """What ``Plotly.newPlot`` takes: data and layout; colours of text and grid are the page's to set."""
    return _lines(part) if isinstance(part, Chart) else _heat_map(part)


def _lines(chart: Chart) -> dict[str, Any]:
    data = []
    for index, series in enumerate(chart.series):
        colour = PALETTE[(index if series.colour is None else series.colour) % len(PALETTE)]
        if series.band is not None:
            data.append(_band(series, colour))
        data.append(_trace(series, colour))
    layout: dict[str, Any] = {
        "margin": dict(_MARGIN) | {"t": _MARGIN["t"] + (_BUTTONS if len(chart.series) > 1 else 0)},
        "height": 400,
        "hovermode": "closest",
        "xaxis": {"title": {"text": chart.x_label}, "automargin": True},
        "yaxis": {"title": {"text": chart.y_label}, "automargin": True},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "showlegend": len(chart.series) > 1,
    }
    if chart.log_x:
        # within a decade Plotly would set a mark at every half
        layout["xaxis"] |= {"type": "log", "exponentformat": "power", "nticks": 6}
    if chart.ticks is not None:
        layout["xaxis"] |= {"tickvals": list(chart.ticks), "ticktext": [f"{tick:,.4g}" for tick in chart.ticks]}
    if chart.log_y:
        layout["yaxis"] |= {"type": "log"}
    if chart.categories is not None:
        layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": list(chart.categories)}
    if chart.zero:
        layout["yaxis"] |= {"rangemode": "tozero"}
    return {"data": data, "layout": layout, "choices": _choices(chart)}


def _trace(series: Series, colour: str) -> dict[str, Any]:
    modes = [name for name, wanted in (("lines", series.lines), ("markers", series.markers)) if wanted]
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": series.name,
        "x": list(series.x),
        "y": list(series.y),
        "mode": "+".join(modes),
        "line": {"color": colour, "width": 2, "dash": "dash" if series.dashed else "solid"},
        "marker": {"color": colour, "size": 8},
        "hovertemplate": "%{y:.5g} at %{x}" + ("<br>%{text}" if series.text else "") + f"<extra>{series.name}</extra>",
    }
    if series.text:
        trace["text"] = list(series.text)
    if series.error is not None:
        trace["error_y"] = {"type": "data", "array": list(series.error), "color": colour, "thickness": 1.5, "width": 4}
    return trace


def _band(series: Series, colour: str) -> dict[str, Any]:
    assert series.band is not None
    low, high = series.band
    return {
        "type": "scatter",
        "name": f"{series.name}, interval",
        "x": [*series.x, *reversed(series.x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "mode": "lines",
        "fillcolor": _faint(colour),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _choices(chart: Chart) -> list[dict[str, Any]]:
    """For each thing to draw over: its label, and the x of every trace."""
    if len(chart.x_labels) == 1:
        return []
    return [
        {"label": label, "x": [list(series.other_x.get(label, series.x)) for series in chart.series]}
        for label in chart.x_labels
    ]


def _heat_map(part: HeatMap) -> dict[str, Any]:
    labels = [label for label, _ in part.frames]
    rows = [[list(row) for row in frame] for _, frame in part.frames]
    height = min(700, 180 + 34 * len(rows[-1]))
    layout = {
        "margin": dict(_MARGIN) | {"b": 96},
        "height": max(340, height),
        "xaxis": {"title": {"text": part.x_label}, "dtick": _dtick(len(rows[-1][0])), "showgrid": False},
        "yaxis": {"title": {"text": part.y_label}, "dtick": _dtick(len(rows[-1])), "showgrid": False},
    }
    if len(rows) > 1:
        layout["sliders"] = [
            {
                "active": len(rows) - 1,
                "pad": {"t": 44},
                "currentvalue": {"prefix": "", "xanchor": "left"},
                "steps": [
                    {"label": label, "method": "restyle", "args": [{"z": [frame]}, [0]]}
                    for label, frame in zip(labels, rows, strict=True)
                ],
            }
        ]
    trace = {
        "type": "heatmap",
        "z": rows[-1],
        "zmin": part.low,
        "zmax": part.high,
        "colorscale": [[place / (len(HEAT) - 1), colour] for place, colour in enumerate(HEAT)],
        "colorbar": {"title": {"text": part.scale_label, "side": "right"}, "outlinewidth": 0, "thickness": 14},
        "hovertemplate": f"{part.y_label} %{{y}}, {part.x_label} %{{x}}: %{{z:.3f}}<extra></extra>",
    }
    return {"data": [trace], "layout": layout, "choices": []}


def _dtick(count: int) -> int:
    return max(1, -(-count // 16))


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
