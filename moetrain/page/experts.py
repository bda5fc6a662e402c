"""What the experts have made their own, by source and by token: counted by `moetrain evaluate`, drawn here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import DataError
from moetrain.page.charts import Chart, HeatMap, Number, Section, Series, Table
from moetrain.plan.flops import format_count

EXPERTS_FILE = "experts.json"
"""In RUN_DIR: ``step``, ``tokens`` (counted), ``all`` and ``sources`` (shares, [blocks][experts]), ``told_by_token``
([blocks]), ``favourites`` ([blocks][experts] -> ``text``, ``occurrences``, ``share``, ``times``)."""
MOST_FAVOURITES = 8
_MOST_BLOCKS, _MOST_EXPERTS = 8, 64
"""Tables of tokens on the page; a model of many blocks would make it huge."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """As experts.json has it."""

    step: int
    tokens: int
    all: Sequence[Sequence[float]]
    sources: Mapping[str, Sequence[Sequence[float]]]
    told_by_token: Sequence[float]
    favourites: Sequence[Sequence[Sequence[Mapping[str, Any]]]]


def read_experts(run_dir: Path) -> Experts | None:
    """What was counted last; None: nothing.

    Raises:
        DataError: the file is damaged.
    """
    path = run_dir / EXPERTS_FILE
    try:
        return Experts(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): moetrain evaluate {run_dir} writes it anew") from None


def experts_section(found: Experts | None) -> Section:
    """Pictures by source, tables by token."""
    title = "Specialisation"
    if found is None:
        return Section(title=title, text="Not counted yet: moetrain report RUN --experts, or moetrain evaluate RUN.")
    several = len(found.sources) > 1
    sources = f", of {len(found.sources)} sources" if several else ""
    tokens = format_count(found.tokens)
    text = f"Choices of {tokens} tokens of held-out text{sources}, by the model of step {found.step:,}."
    parts: list[Chart | HeatMap | Table] = []
    if several:
        parts += [_by_source(found), _apart(found)]
    if len(found.told_by_token) > 1:
        parts.append(_by_token(found))
    return Section(title=title, text=text, parts=[*parts, *_tables(found)])


def apart(share_E: Sequence[float], common_E: Sequence[float]) -> float:
    """How far the experts of one source are from those of all: the share of its copies that would have to move (total
    variation); 0: the same experts, near 1: none in common."""
    return sum(abs(own - common) for own, common in zip(share_E, common_E, strict=True)) / 2


def _by_source(found: Experts) -> HeatMap:
    frames = [
        (
            name,
            [[_over(own, common) for own, common in zip(own_E, common_E, strict=True)]
             for own_E, common_E in zip(share_LE, found.all, strict=True)],
        )
        for name, share_LE in found.sources.items()
    ]  # fmt: skip
    return HeatMap(
        key="experts_by_source",
        title="experts by source",
        x_label="expert",
        y_label="MoE layer",
        frames=frames,
        low=0.0,
        high=2.0,
        scale_label="times the average",
        every_frame=True,
        note="How many times the average share of a source each expert takes. The slider goes through the sources.",
    )


def _apart(found: Experts) -> Chart:
    layers = list(range(len(found.all)))
    series = [
        Series(name=name, x=layers, y=[apart(share_LE[layer], found.all[layer]) for layer in layers], markers=True)
        for name, share_LE in found.sources.items()
    ]
    return Chart(
        key="sources_apart",
        title="how far each source is from the average",
        x_label="MoE layer",
        y_label="share of choices that differ",
        series=series,
        ticks=layers if len(layers) <= 16 else None,
        zero=True,
        note="0: its tokens are spread over the experts like all text; 1: over other experts altogether.",
    )


def _by_token(found: Experts) -> Chart:
    layers = list(range(len(found.told_by_token)))
    return Chart(
        key="told_by_token",
        title="what the token alone tells of its expert",
        x_label="MoE layer",
        y_label="I(token; expert) / H(expert)",
        series=[Series(name="told by the token", x=layers, y=list(found.told_by_token), markers=True)],
        ticks=layers if len(layers) <= 16 else None,
        zero=True,
        note="0: any expert may get any token; 1: the token alone decides, whatever stands around it.",
    )


def _tables(found: Experts) -> list[Table]:
    count = len(found.favourites)
    shown = sorted({round(place * (count - 1) / max(1, _MOST_BLOCKS - 1)) for place in range(_MOST_BLOCKS)})
    return [_table(found, layer) for layer in shown if layer < count]


def _table(found: Experts, layer: int) -> Table:
    experts = found.favourites[layer]
    rows = [
        (str(expert), f"{found.all[layer][expert]:.1%}", " · ".join(map(_told, best)) or "none stands out")
        for expert, best in list(enumerate(experts))[:_MOST_EXPERTS]
    ]
    left = f", the first {_MOST_EXPERTS} of {len(experts)} experts" if len(experts) > _MOST_EXPERTS else ""
    head = ("expert", "share", "tokens it takes most above average, and how many times the average token")
    return Table(head=head, rows=rows, title=f"tokens of MoE layer {layer}{left}", wide=True)


def _told(best: Mapping[str, Any]) -> str:
    text = str(best["text"]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return f"{text} {best['times']:.1f}x"


def _over(share: float, common: float) -> Number:
    return share / common if common else None
