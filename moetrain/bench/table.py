"""The rows of a benchmark, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one contestant took. None: it was not measured, and the note says why."""

    dtype: str
    routing: str
    experts: int
    top_k: int
    contestant: str
    ms: float | None = None
    """Median of the timed turns."""
    spread_ms: float | None = None
    """Third less first quartile; None for a single turn."""
    turns: int = 0
    ratio: float | None = None
    """Median over the dense block's median."""
    peak_mib: float | None = None
    """Peak of memory above what was held before (``timing.observe``)."""
    mfu: float | None = None
    """Share of the rate of a large matmul in the same run."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole benchmark."""

    title: str
    about: dict[str, Any]
    """Versions, machine and settings, by name."""
    rows: list[Row]
    remarks: list[str]
    """Lines under the tables."""


def row_of(seconds: Sequence[float], *, yardstick: Sequence[float], peak_bytes: int, **what: Any) -> Row:
    """The row of a contestant that took ``seconds`` in its timed turns."""
    median = statistics.median(seconds)
    spread = None
    if len(seconds) > 1:
        quarters = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = (quarters[2] - quarters[0]) * 1e3
    return Row(
        ms=median * 1e3,
        spread_ms=spread,
        turns=len(seconds),
        ratio=median / statistics.median(yardstick),
        peak_mib=peak_bytes / MIB,
        **what,
    )


def text(report: Report) -> str:
    """All tables, one for each dtype and routing."""
    about = ", ".join(f"{name} {value}" for name, value in report.about.items() if not isinstance(value, dict))
    lines = [report.title, about]
    for dtype, routing in dict.fromkeys((row.dtype, row.routing) for row in report.rows):
        rows = [row for row in report.rows if (row.dtype, row.routing) == (dtype, routing)]
        lines += ["", f"{dtype}, {routing} routing", *_aligned(rows)]
    return "\n".join([*lines, *([""] if report.remarks else []), *report.remarks])


def write_json(report: Report, path: Path) -> None:
    """Write in one step: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(json.dumps(asdict(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _aligned(rows: Sequence[Row]) -> list[str]:
    with_mfu = any(row.mfu is not None for row in rows)
    head = ["experts", "top_k", "contestant", "ms", "[spread]", "ratio", "peak MiB", *(["MFU"] if with_mfu else []), ""]
    cells, before = [head], (0, 0)
    for row in rows:
        shape = (row.experts, row.top_k)
        spread = "" if row.ms is None else f"[{_number(row.spread_ms, 1)}]"
        line = [*map(str, shape if shape != before else ("", "")), row.contestant, _number(row.ms, 1), spread]
        line += [
            _number(row.ratio, 2),
            _number(row.peak_mib, 1),
            *([_number(row.mfu, 2)] if with_mfu else []),
            row.note,
        ]
        cells.append(line)
        before = shape
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    to_the_left = {head.index("contestant"), len(head) - 1}
    return [
        "  ".join(
            cell.ljust(width) if column in to_the_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"
