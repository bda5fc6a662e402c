"""What is read, cut into pieces that several processes can read at once, and how a piece is spooled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetrain.data.corpus import file_sha256
from moetrain.errors import DataError
from moetrain.parallel.pool import Task, Tell
from moetrain.sources import hub, spool
from moetrain.sources.files import Span
from moetrain.sources.hub import HubDataset, identity
from moetrain.sources.text import Input, files_of, is_lines, is_tokenized, is_visible, records_of, texts_of

SMALL = 16 << 20
"""Bytes of text below which no process is started and no faster encoder proved: this one is done sooner."""

_SHARDS = 128  # the text is cut into so many, within limits: the last ones to be done leave few processes idle
_TELL_EVERY = 1 << 22  # bytes between two words on how far reading is
_PACKED = 4  # bytes of text that a byte of a compressed file may hold


@dataclass(frozen=True)
class Options:
    """What of the documents is taken, and how the work is done."""

    workers: int | None = None  # processes that read and encode; None: one for each core
    fast_encoder: bool = True  # use fastokens where it is installed and gives the same ids
    min_characters: int = 1  # shorter documents are left out
    max_characters: int | None = None  # longer ones, too
    duplicates: str = "keep"  # keep, exact or near: of documents alike, all or only the first is taken
    similarity: float = 0.8  # Jaccard similarity of word 5-grams from which on two documents are near duplicates
    tokenizer_kind: str = "bpe"  # of a tokenizer trained here: bpe or unigram
    special_tokens: tuple[str, ...] = ()  # of a tokenizer trained here, after the end-of-text token

    def covered(self) -> dict[str, Any]:
        """Those that the token files depend on."""
        values = asdict(self) | {"special_tokens": list(self.special_tokens)}
        if self.duplicates != "near":
            values.pop("similarity")
        return {key: value for key, value in values.items() if key not in ("workers", "fast_encoder")}


@dataclass(frozen=True)
class Part:
    """What a piece has of one input."""

    source: int  # number of the input
    span: Span | None  # None: all of it


def why_not(text: str, options: Options) -> str:
    """Why a document is not taken; empty if it is."""
    if not is_visible(text):
        return "empty"
    if len(text) < options.min_characters:
        return "min_characters"
    if options.max_characters is not None and len(text) > options.max_characters:
        return "max_characters"
    return ""


def size_of(source: Input) -> int:
    """Bytes of an input's files; 0 for a dataset of the hub."""
    return sum(path.stat().st_size for path in files_of(source))


def size_of_part(part: Part, inputs: list[Input]) -> int:
    """Bytes of a part."""
    return size_of(inputs[part.source]) if part.span is None else part.span.end - part.span.start


def workers_for(inputs: list[Input], *, most: int) -> int:
    """Processes that are of use: none below ``SMALL``, else at most one for each of the smallest shards."""
    if any(isinstance(source, HubDataset) for source in inputs):
        return most
    about = sum(size_of(source) * (1 if _is_plain(source) else _PACKED) for source in inputs)
    return 0 if about < SMALL else max(1, min(most, about // spool.SMALLEST))


def shard_bytes(inputs: list[Input]) -> int:
    """Bytes of a piece and of a shard, about; from the files' sizes alone."""
    return min(spool.LARGEST, max(spool.SMALLEST, sum(map(size_of, inputs)) // _SHARDS))


def pieces_of(inputs: list[Input], *, piece_bytes: int) -> list[list[Part]]:
    """The inputs in order, cut into pieces of about so many bytes where they can be: lines, and between files."""
    pieces: list[list[Part]] = []
    size = piece_bytes
    for number, source in enumerate(inputs):
        total = size_of(source)
        cuts = range(0, total, piece_bytes) if is_lines(source) and total > piece_bytes else range(1)
        for start in cuts:
            if size >= piece_bytes or isinstance(source, HubDataset):
                pieces.append([])
                size = 0
            span = Span(start, min(total, start + piece_bytes)) if len(cuts) > 1 else None
            pieces[-1].append(Part(number, span))
            size += total if span is None else span.end - span.start
    return pieces


def spool_task(work: Path, number: int, piece: list[Part], *, inputs: list[Input], **settings: Any) -> Task:
    """The task of spooling a piece, in JSON."""
    parts = [[str(inputs[part.source]), part.span and [part.span.start, part.span.end]] for part in piece]
    return {"what": "spool", "directory": str(work), "piece": number, "parts": parts, **settings}


def spool_piece(root: Path, task: Task, *, tell: Tell) -> None:
    """Spool what of a piece is not spooled.

    Args:
        root: of the spool.
        task: from ``spool_task``, with text_column, shard_bytes, min_characters and max_characters.
        tell: told now and then "read", bytes of the files; of a dataset of the hub, bytes of text.

    Raises:
        DataError: as ``sources.text.read_documents``, but for there being nothing to read.
    """
    writer = spool.SpoolWriter(root, piece=task["piece"], shard_bytes=task["shard_bytes"])
    if writer.is_finished:
        return
    reading = _Reading(tell)
    left = writer.row  # so many are in the spool
    for name, ends in task["parts"]:
        source: Input = hub.parse(name) if name.startswith(hub.PREFIX) else Path(name)
        span = None if ends is None else Span(*ends)
        reading.begin(span)
        for document, reason in _documents(source, span, task, note=reading.note):
            if left:
                left -= 1
            elif reason:
                writer.pass_over(reason)
            else:
                writer.add(document)
    writer.finish()


class _Reading:
    """Tells how far the reading of a piece is."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._before = self._start = self._now = self._told = 0

    def begin(self, span: Span | None) -> None:
        """A part begins; the ones before it are done."""
        self._before, self._now = self._before + self._now, 0
        self._start = 0 if span is None else span.start

    def note(self, position: int) -> None:
        """Reading has come to this byte of the file."""
        self._now = position - self._start
        if self._before + self._now - self._told >= _TELL_EVERY:
            self._told = self._before + self._now
            self._tell({"read": self._told})


def _documents(
    source: Input, span: Span | None, task: Task, *, note: Callable[[int], None]
) -> Iterator[tuple[bytes, str]]:
    """Each document, and why it is not taken; empty if it is."""
    if is_tokenized(source):
        for record in records_of(source, text_column=task["text_column"], tell=note):
            yield record, "" if record else "empty"
        return
    options = Options(min_characters=task["min_characters"], max_characters=task["max_characters"])
    size = 0
    for text in texts_of(source, text_column=task["text_column"], tell=note, span=span):
        document = text.encode()
        yield document, why_not(text, options)
        if isinstance(source, HubDataset):
            size += len(document)
            note(size)


def hub_sha256(dataset: HubDataset) -> str:
    """sha256 of what identifies the content of a dataset."""
    return hashlib.sha256(f"{dataset} {identity(dataset)}".encode()).hexdigest()


def source_sha256(path: Path) -> str:
    """sha256 of a file of ``data.text``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): data.text must name files that can be read") from error


def _is_plain(source: Input) -> bool:
    return isinstance(source, Path) and source.suffix.lower() in (".jsonl", ".json", ".txt", ".csv", ".idx")
