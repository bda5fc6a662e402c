"""One HTML file with everything in it: Plotly's script, figures, tables, both themes. It needs no network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from moetrain.errors import DataError
from moetrain.page.charts import Chart, HeatMap, Section, Table
from moetrain.page.interactive import figure

_ASSETS = Path(__file__).parent


def write_page(path: Path, *, title: str, subtitle: str, sections: Sequence[Section]) -> None:
    """Write the page in one step.

    Raises:
        DataError: Plotly is not installed.
    """
    figures: dict[str, Any] = {}
    body = "\n".join(_section(section, figures) for section in sections)
    page = Template((_ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=(_ASSETS / "page.css").read_text(encoding="utf-8"),
        plotly=_plotly(),
        figures=_in_script(figures),
        script=(_ASSETS / "page.js").read_text(encoding="utf-8"),
        contents="".join(f'<a href="#{_anchor(each.title)}">{html.escape(each.title)}</a>' for each in sections),
        body=body,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise DataError('the page needs Plotly, which is not installed: pip install "moetrain[report]"') from None
    return str(get_plotlyjs())


def _section(section: Section, figures: dict[str, Any]) -> str:
    parts = "\n".join(_table(part) if isinstance(part, Table) else _picture(part, figures) for part in section.parts)
    text = f"<p>{html.escape(section.text)}</p>" if section.text else ""
    heading = html.escape(section.title)
    return f'<section id="{_anchor(section.title)}"><h2>{heading}</h2>{text}<div class="parts">{parts}</div></section>'


def _picture(part: Chart | HeatMap, figures: dict[str, Any]) -> str:
    figures[part.key] = figure(part)
    note = f"<figcaption>{html.escape(part.note)}</figcaption>" if part.note else ""
    name = html.escape(part.key)
    choices = figures[part.key]["choices"]
    buttons = "".join(
        f'<button type="button" data-figure="{name}" data-choice="{place}" aria-pressed="{str(place == 0).lower()}">'
        f"{html.escape(choice['label'])}</button>"
        for place, choice in enumerate(choices)
    )
    over = f'<div class="choices" role="group" aria-label="over">{buttons}</div>' if choices else ""
    return f'<figure><h3>{html.escape(part.title)}</h3>{over}<div class="plot" id="plot-{name}"></div>{note}</figure>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(each)}</td>" for each in row) + "</tr>" for row in table.rows)
    top = f"<thead><tr>{head}</tr></thead>" if any(table.head) else ""
    inner = f'<div class="table"><table>{top}<tbody>{rows}</tbody></table></div>'
    title = html.escape(table.title)
    if table.wide:
        return f"<details><summary>{title or 'more'}</summary>{inner}</details>"
    return (f"<h3>{title}</h3>" if title else "") + inner


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower())


def _in_script(value: Any) -> str:
    """JSON that no text in it can end the script with."""
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
