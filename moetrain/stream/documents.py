"""The documents of a text in order, from any position on, and whether each is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moetrain.errors import DataError
from moetrain.prepare.build import Request
from moetrain.prepare.reading import size_of, why_not
from moetrain.sources.spool import place_of
from moetrain.sources.text import Input, records_of


@dataclass(frozen=True)
class Document:
    """A document, and where to read on after it."""

    text: bytes  # UTF-8
    place: int  # see ``sources.spool.place_of``
    left_out: str  # why it is not taken; empty if it is
    source: int
    row: int


def documents_of(request: Request, *, sizes: Sequence[int], source: int = 0, row: int = 0) -> Iterator[Document]:
    """Every document after a position, those that are not taken too.

    What comes before it in its input is read and passed over: no format but plain lines could be entered in the middle.

    Args:
        request: which text, and what of it is taken.
        sizes: bytes of each input when the stream began.
        source, row: of the last document that was read.

    Raises:
        DataError: as ``sources.text.records_of``; or an input is not the one that the stream began with.
    """
    for number in range(source, len(request.inputs)):
        one, skip = request.inputs[number], row if number == source else 0
        _refuse_changed(one, sizes[number])
        for count, text in enumerate(records_of(one, text_column=request.text_column), start=1):
            if count > skip:
                reason = why_not(text.decode(), request.options)
                yield Document(text, place_of(text), reason, source=number, row=count)
        _refuse_changed(one, sizes[number])


def _refuse_changed(one: Input, size: int) -> None:
    try:
        now = size_of(one)
    except OSError as error:
        raise DataError(f"{one} cannot be read ({error}): data.text must name files that stay") from error
    if now != size:
        raise DataError(
            f"{one} has {now:,} bytes, but had {size:,} when the stream began: text that is still written to cannot be "
            "streamed; set it back, or begin another run"
        )
