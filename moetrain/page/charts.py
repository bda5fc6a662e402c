"""What a picture shows, as data: built once, drawn by ``interactive`` for the page and by ``static`` for files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

HEAT = ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b")
"""From low over fair to high: red and blue of equal strength (ColorBrewer's RdBu)."""
PALETTE = ("#3b78c4", "#e0812b", "#3d9a50", "#a05fc0", "#c94f4f", "#2aa3a3", "#b0892f", "#7a7f87")
"""Told apart on light and on dark ground, and by most people who see fewer colours."""

Number = float | None
"""None leaves a gap."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one kind of marks."""

    name: str
    x: Sequence[Number | str]
    y: Sequence[Number]
    error: Sequence[Number] | None = None
    """Half the length of each error bar."""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper edge of an area around the line."""
    lines: bool = True
    markers: bool = False
    dashed: bool = False
    text: Sequence[str] | None = None
    """What hovering over a mark tells besides its numbers."""
    colour: int | None = None
    """Place in the palette; None: the next one."""
    other_x: dict[str, Sequence[Number]] = field(default_factory=dict)
    """Label -> the same points over something else."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines and marks over two axes."""

    key: str
    """Name of its files."""
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] | None = None
    """Where the x axis has its marks; None: anywhere."""
    categories: Sequence[str] | None = None
    """Places of an x axis that has no numbers, in their order."""
    zero: bool = False
    """Whether the y axis begins at 0."""
    note: str = ""
    """A sentence under it."""

    @property
    def x_labels(self) -> list[str]:
        """Everything that it can be drawn over."""
        others = {label: None for series in self.series for label in series.other_x}
        return [self.x_label, *others]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A number for each place of a table, over time or whatever else its frames are."""

    key: str
    title: str
    x_label: str
    y_label: str
    frames: Sequence[tuple[str, Sequence[Sequence[Number]]]]
    """Label of the moment, or the like, and its rows."""
    low: float
    high: float
    scale_label: str
    every_frame: bool = False
    """Whether a file shows all frames, and not a few moments of many alike."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    wide: bool = False
    """Whether it is long, and opens on demand."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    text: str = ""
    parts: Sequence[Chart | HeatMap | Table] = ()


def charts_of(sections: Sequence[Section]) -> list[Chart | HeatMap]:
    """Every picture of a page."""
    return [part for section in sections for part in section.parts if not isinstance(part, Table)]
