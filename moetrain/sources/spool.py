"""The spool: documents as they were read, in shards beside the token files, until those are whole.

spool/000000.text       UTF-8, one document after the other
spool/000000.rows.npy   for each, bytes (uint32) and place (uint64)
spool/000000.json       what ``Shard`` says; written last, so a shard without it was not finished

Text is read once, by one process, and spooled; everything later works on shards, in any number of processes, and goes
on after a crash where it was. Where a shard ends follows from the text before it alone. Shards grow with the corpus,
so that a small one has enough of them to share among processes and a large one not too many files.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.errors import DataError

SMALLEST, LARGEST = 1 << 20, 1 << 25
"""Bytes of text in a shard, but for its last document."""

_GROWTH = 64  # a shard is about this part of the text before it

ROW = np.dtype([("bytes", "<u4"), ("place", "<u8")])


@dataclass(frozen=True)
class Shard:
    """A finished shard. What is counted is counted from the beginning of the corpus to its end."""

    number: int
    documents: int
    bytes: int  # of text
    source: int  # sources that were read to their end
    row: int  # documents read of the next source
    passed_over: dict[str, int]  # documents that are not in the spool, by reason
    crc: int  # crc32 of the shard's text

    def next_to(self, root: Path) -> tuple[Path, Path, Path]:
        """Its files: text, rows, and this."""
        stem = root / f"{self.number:06}"
        return stem.with_suffix(".text"), stem.with_suffix(".rows.npy"), stem.with_suffix(".json")


@dataclass(frozen=True)
class ShardRows:
    """The documents of one shard."""

    first: int  # number of its first document in the corpus
    rows: npt.NDArray[Any]  # [documents] of ROW


def place_of(document: bytes) -> int:
    """A document's place on a line of 2^64, by its text alone: the same text is never on both sides of a cut."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")


def cut_between(smallest: int, largest: int, *, held_out: float) -> int:
    """Where the line is cut so that about a share of the documents lies below, and of the two given, one on each side.

    Args:
        smallest: place of the first document on the line.
        largest: of the last; above it.
        held_out: the share, in (0, 1).
    """
    return min(max(round(held_out * (1 << 64)), smallest + 1), largest)


@dataclass
class SpoolWriter:
    """Adds to a spool, after the shards that are there."""

    root: Path
    shards: list[Shard]
    passed_over: dict[str, int]
    _text: list[bytes] = field(default_factory=list)
    _places: list[int] = field(default_factory=list)
    _size: int = 0

    @classmethod
    def resume(cls, root: Path) -> SpoolWriter:
        """The spool as it lies; a shard that was not finished is begun again."""
        root.mkdir(exist_ok=True)
        shards = list(read_spool(root))
        return cls(root=root, shards=shards, passed_over=dict(shards[-1].passed_over) if shards else {})

    @property
    def num_bytes(self) -> int:
        """Of text, spooled so far."""
        return (self.shards[-1].bytes if self.shards else 0) + self._size

    @property
    def position(self) -> tuple[int, int]:
        """Where to go on reading: sources read to their end, documents read of the next."""
        return (self.shards[-1].source, self.shards[-1].row) if self.shards else (0, 0)

    def pass_over(self, reason: str) -> None:
        """Count a document that is not spooled."""
        self.passed_over[reason] = self.passed_over.get(reason, 0) + 1

    def add(self, document: bytes, *, source: int, row: int) -> None:
        """Spool a document; (source, row) is where to read on after it."""
        self._text.append(document)
        self._places.append(place_of(document))
        self._size += len(document)
        before = self.shards[-1].bytes if self.shards else 0
        if self._size >= min(LARGEST, max(SMALLEST, before // _GROWTH)):
            self.flush(source=source, row=row)

    def flush(self, *, source: int, row: int) -> None:
        """Finish the shard that is being filled."""
        last = self.shards[-1] if self.shards else None
        content = b"".join(self._text)
        shard = Shard(
            number=len(self.shards),
            documents=(last.documents if last else 0) + len(self._text),
            bytes=self.num_bytes,
            source=source,
            row=row,
            passed_over=dict(self.passed_over),
            crc=zlib.crc32(content),
        )
        rows = np.zeros(len(self._text), dtype=ROW)
        rows["bytes"] = [len(document) for document in self._text]
        rows["place"] = np.array(self._places, dtype=np.uint64)
        text, rows_path, about = shard.next_to(self.root)
        text.write_bytes(content)
        np.save(rows_path, rows, allow_pickle=False)
        write_json(about, asdict(shard))
        self.shards.append(shard)
        self._text, self._places, self._size = [], [], 0


def read_spool(root: Path) -> Iterator[Shard]:
    """The finished shards, in order."""
    number = 0
    while (about := read_json(root / f"{number:06}.json")) is not None:
        yield Shard(**about)
        number += 1


def rows_of(root: Path, shards: list[Shard], number: int) -> ShardRows:
    """The rows of one of the shards."""
    first = shards[number - 1].documents if number else 0
    return ShardRows(first=first, rows=np.load(shards[number].next_to(root)[1], allow_pickle=False))


def texts_of(root: Path, shard: Shard, part: ShardRows) -> Iterator[bytes]:
    """The documents of a shard.

    Raises:
        DataError: the file is not what was written.
    """
    path = shard.next_to(root)[0]
    content = path.read_bytes()
    if zlib.crc32(content) != shard.crc:
        raise damaged(path)
    ends = np.cumsum(part.rows["bytes"], dtype=np.int64).tolist()
    start = 0
    for end in ends:
        yield content[start:end]
        start = end


def damaged(path: Path) -> DataError:
    """The error for a file that is not what was written.

    Nothing here is brought to the disk file by file (fsync), which would cost more than all the rest on a slow one: a
    killed process loses nothing by that, and what a power cut spoils is found by its checksum.
    """
    return DataError(f"{path} was damaged since it was written, as by a power cut: the same command starts anew")


def write_json(path: Path, values: Any) -> None:
    """Write atomically."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(values))
    os.replace(beside, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What ``write_json`` wrote; None where nothing is."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path) from error
    return values
