"""The spool: documents as they were read, in shards beside the token files, until those are whole.

spool/000000-000000.text       UTF-8, one document after the other
spool/000000-000000.rows.npy   for each, bytes (uint32) and place (uint64)
spool/000000-000000.json       what ``Shard`` says; written last, so a shard without it was not finished

What is read is cut into pieces, from its size alone; a piece is read once, by one process, into one shard or several.
Everything later works on shards, in any number of processes, and goes on after a crash where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
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
    """A finished shard."""

    piece: int
    number: int  # in the piece
    documents: int
    bytes: int  # of text
    row: int  # documents of the piece read when it ended
    passed_over: dict[str, int]  # documents of the piece up to there that are not in the spool, by reason
    crc: int  # crc32 of the shard's text
    is_last: bool  # of its piece

    def next_to(self, root: Path) -> tuple[Path, Path, Path]:
        """Its files: text, rows, and this."""
        return _files(root, piece=self.piece, number=self.number)


@dataclass(frozen=True)
class Spool:
    """All shards, in the order of the text."""

    root: Path
    shards: list[Shard]

    @property
    def num_bytes(self) -> int:
        """Of text."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """How many there are."""
        return sum(shard.documents for shard in self.shards)

    @property
    def passed_over(self) -> dict[str, int]:
        """Documents that are not in it, by reason."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            if shard.is_last:
                counts.update(shard.passed_over)
        return dict(sorted(counts.items()))

    @cached_property
    def firsts(self) -> list[int]:
        """Of each shard, the number of its first document in the corpus."""
        return list(itertools.accumulate((shard.documents for shard in self.shards), initial=0))[:-1]

    def rows(self, index: int) -> npt.NDArray[Any]:
        """[documents] of ROW: those of a shard."""
        rows: npt.NDArray[Any] = np.load(self.shards[index].next_to(self.root)[1], allow_pickle=False)
        return rows

    def texts(self, index: int, rows: npt.NDArray[Any]) -> Iterator[bytes]:
        """The documents of a shard.

        Raises:
            DataError: the file is not what was written.
        """
        shard = self.shards[index]
        path = shard.next_to(self.root)[0]
        content = path.read_bytes()
        if zlib.crc32(content) != shard.crc:
            raise damaged(path)
        start = 0
        for end in np.cumsum(rows["bytes"], dtype=np.int64).tolist():
            yield content[start:end]
            start = end


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


class SpoolWriter:
    """Adds to a piece of a spool, after the shards of it that are there; one that was not finished is begun again.

    Args:
        root: of the spool.
        piece: the piece's number.
        shard_bytes: about so many bytes are in a shard.
    """

    def __init__(self, root: Path, *, piece: int, shard_bytes: int) -> None:
        self._root, self._piece, self._shard_bytes = root, piece, shard_bytes
        shards = list(_shards_of(root, piece))
        last = shards[-1] if shards else None
        self.is_finished = last is not None and last.is_last
        self.row = last.row if last else 0
        """Documents of the piece that are read already."""
        self._passed_over = Counter(last.passed_over if last else {})
        self._number, self._before = len(shards), sum(shard.bytes for shard in shards)
        self._documents: list[bytes] = []
        self._size = 0

    def pass_over(self, reason: str) -> None:
        """Count a document that is not spooled."""
        self.row += 1
        self._passed_over[reason] += 1

    def add(self, document: bytes) -> None:
        """Spool a document."""
        self.row += 1
        self._documents.append(document)
        self._size += len(document)
        if self._size >= min(LARGEST, max(self._shard_bytes, self._before // _GROWTH)):
            self._flush(is_last=False)

    def finish(self) -> None:
        """End the piece."""
        self._flush(is_last=True)
        self.is_finished = True

    def _flush(self, *, is_last: bool) -> None:
        documents, content = self._documents, b"".join(self._documents)
        shard = Shard(
            piece=self._piece,
            number=self._number,
            documents=len(documents),
            bytes=len(content),
            row=self.row,
            passed_over=dict(self._passed_over),
            crc=zlib.crc32(content),
            is_last=is_last,
        )
        rows = np.zeros(len(documents), dtype=ROW)
        rows["bytes"] = [len(document) for document in documents]
        rows["place"] = np.array([place_of(document) for document in documents], dtype=np.uint64)
        text, rows_path, about = shard.next_to(self._root)
        text.write_bytes(content)
        np.save(rows_path, rows, allow_pickle=False)
        write_json(about, asdict(shard))
        self._number += 1
        self._before += self._size
        self._documents, self._size = [], 0


def read_spool(root: Path) -> Spool:
    """The spool as it lies, up to the first piece that is not finished."""
    shards: list[Shard] = []
    for piece in itertools.count():
        own = list(_shards_of(root, piece))
        if not own or not own[-1].is_last:
            return Spool(root, shards)
        shards += own
    raise AssertionError


def _shards_of(root: Path, piece: int) -> Iterator[Shard]:
    for number in itertools.count():
        values = read_json(_files(root, piece=piece, number=number)[2])
        if values is None:
            return
        shard = Shard(**values)
        yield shard
        if shard.is_last:
            return


def _files(root: Path, *, piece: int, number: int) -> tuple[Path, Path, Path]:
    stem = root / f"{piece:06}-{number:06}"
    return stem.with_suffix(".text"), stem.with_suffix(".rows.npy"), stem.with_suffix(".json")


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
