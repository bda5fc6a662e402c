"""What a step reads, on the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.report.figures import document_lengths

COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red")
BORDER = "▮"
"""Stands where a document ends: the end-of-text token."""


def show(view: Any, *, decode: Callable[[Sequence[int]], str], samples: int) -> None:
    """Print a batch: a table of its sources and some of its samples as text.

    Args:
        view: as ``data.build.BatchView``.
        decode: token ids to text.
        samples: how many are written out; 0: all.
    """
    console = Console(highlight=False, soft_wrap=True)
    rows, length = view.tokens.shape
    console.print(
        f"step {view.step:,} of {view.steps:,}: samples {view.samples[0]:,} to {view.samples[-1]:,}, {rows:,} "
        f"sequences of {length - 1:,} tokens, sha256 {view.fingerprint[:16]}"
    )
    console.print(_sources(view))
    shown = rows if samples == 0 else min(samples, rows)
    for row in range(shown):
        source = int(view.source[row])
        pieces = list(_documents(view, row))
        whole = sum(1 for _, ends in pieces if ends)
        console.print(
            Text.assemble(
                "\n",
                (f"sample {view.samples[row]:,}", "bold"),
                "  ",
                (view.names[source], f"bold {_colour(source)}"),
                f", epoch {view.epoch[row]:,}, {len(pieces):,} document{'s' * (len(pieces) > 1)}, {whole:,} to the end",
            )
        )
        console.print(_text(view, row, decode=decode))
    if shown < rows:
        console.print(f"\n[dim]{rows - shown:,} more; samples=0 shows all[/dim]")


def draw_lengths(view: Any, path: Path) -> None:
    """The lengths of the documents in a batch, as a PNG; a document ends where its sequence does."""
    lengths: dict[str, list[int]] = {name: [] for name in view.names}
    for row in range(len(view.tokens)):
        for place, ends in _documents(view, row):
            lengths[view.names[view.source[row]]].append(place.stop - place.start + ends)
    document_lengths(lengths, path, title=f"step {view.step:,}: lengths of the documents in the batch")


def _documents(view: Any, row: int) -> Iterator[tuple[slice, bool]]:
    """Where each document of a sample lies, without its end-of-text token, and whether it has one."""
    start = 0
    for end in [place for place, token in enumerate(view.tokens[row].tolist()) if token == view.end_of_text]:
        yield slice(start, end), True
        start = end + 1
    if start < view.tokens.shape[1]:
        yield slice(start, view.tokens.shape[1]), False


def _text(view: Any, row: int, *, decode: Callable[[Sequence[int]], str]) -> Text:
    """The documents of a sample in the colour of their source; what has no loss is dim."""
    colour = _colour(int(view.source[row]))
    text = Text()
    for place, ends in _documents(view, row):
        for run, counted in _runs(view, row, place):
            text.append(decode(view.tokens[row, run].tolist()), style=colour if counted else f"dim {colour}")
        if ends:
            text.append(BORDER, style="bold reverse")
    return text


def _runs(view: Any, row: int, place: slice) -> Iterator[tuple[slice, bool]]:
    """A document in runs of tokens that all have a loss, or all have none."""
    if view.counted is None:
        yield place, True
        return
    flags, start = view.counted[row].tolist(), place.start
    for here in range(place.start + 1, place.stop + 1):
        if here == place.stop or flags[here] != flags[start]:
            yield slice(start, here), flags[start]
            start = here


def _sources(view: Any) -> Table:
    table = Table("source", "sequences", "tokens", "share", "documents", box=None, pad_edge=False, header_style="dim")
    for column in table.columns[1:]:
        column.justify = "right"
    rows, length = view.tokens.shape
    for number, name in enumerate(view.names):
        own = [row for row in range(rows) if view.source[row] == number]
        documents = sum(len(list(_documents(view, row))) for row in own)
        table.add_row(Text(name, style=_colour(number)), f"{len(own):,}", f"{len(own) * (length - 1):,}",
                      f"{len(own) / rows:.1%}", f"{documents:,}")  # fmt: skip
    return table


def _colour(source: int) -> str:
    return COLOURS[source % len(COLOURS)]
