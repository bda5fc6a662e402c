"""Rows of one file: text, json lines, csv or parquet, also compressed; in bounded memory.

Plain Python and pyarrow rather than ``datasets``: its streaming reader brings some 12 MB/s of json lines to a caller,
``json.loads`` on the same lines 600 (measured on two cores), and reading must not be what encoding waits for.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moetrain.errors import DataError

LONGEST = 1 << 28
"""Bytes of a line, a field or a text file at most: what is longer is more likely a file of another kind, and would be
held in memory several times over."""

LARGEST_ARRAY = 1 << 30
"""Bytes of a .json array at most: it is read as a whole."""

Tell = Callable[[int], None]
"""Called now and then with how many bytes of the file, as it lies on the disk, have been read."""

_TELL_EVERY = 64  # rows
_BUFFER = 1 << 20  # bytes; with the usual 8 KiB a file is read at half the speed


def read_text(path: Path, *, tell: Tell) -> str:
    """A whole file of UTF-8 text with ``\\n`` as line ends and no byte-order mark.

    Raises:
        DataError: it is longer than ``LONGEST``, or needs a reader that is not installed.
        UnicodeError: it is not UTF-8.
        EOFError: it is compressed and cut short.
    """
    with open(path, "rb", buffering=_BUFFER) as raw:
        data = _decompressed(raw, path=path).read(LONGEST + 1)
        tell(raw.tell())
    if len(data) > LONGEST:
        raise DataError(
            f"{path} is one document of more than {LONGEST >> 20} MiB: split it into several files, or rows of jsonl"
        )
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class Span:
    """Bytes of a file of plain json lines: the lines that begin in them."""

    start: int
    end: int


def lines_before(path: Path, span: Span | None) -> int:
    """Lines of the file before those of a span, for a message that names one."""
    left, count, is_begin = 0 if span is None else span.start, 0, True
    with open(path, "rb", buffering=_BUFFER) as raw:
        while left and (block := raw.read(min(left, _BUFFER))):
            count, is_begin = count + block.count(b"\n"), block.endswith(b"\n")
            left -= len(block)
    return count if is_begin else count + 1


def json_rows(path: Path, *, tell: Tell, may_be_array: bool, span: Span | None = None) -> Iterator[tuple[int, Any]]:
    """Every line of a file of json lines, or every element of an array, each with its number; blank lines are passed
    over, and counted.

    Args:
        path: the file.
        tell: see ``Tell``.
        may_be_array: whether a file that begins with ``[`` is one array, which is read as a whole.
        span: read only these lines, and count from the first of them.

    Raises:
        DataError: a line is not JSON or longer than ``LONGEST``, or an array larger than ``LARGEST_ARRAY``.
        UnicodeError, EOFError: as ``read_text``.
    """
    if may_be_array and _is_array(path):
        with open(path, "rb", buffering=_BUFFER) as raw:
            data = _decompressed(raw, path=path).read(LARGEST_ARRAY + 1)
        if len(data) > LARGEST_ARRAY:
            raise DataError(
                f"{path} is an array of more than {LARGEST_ARRAY >> 30} GiB, which would be held in memory: "
                "write one object a line (.jsonl)"
            )
        yield from enumerate(json.loads(data.decode("utf-8-sig")), start=1)
        return
    decode = json.JSONDecoder().decode
    for number, line in enumerate(_lines(path, tell=tell, span=span), start=1):
        if line and not line.isspace():
            try:
                row = decode(line)
            except json.JSONDecodeError as error:
                way = "write one object a line" + (", or one array of objects" if may_be_array else "")
                place = lines_before(path, span) + number
                raise DataError(f"{path}, line {place:,} is not JSON ({error}): {way}") from error
            yield number, row


def csv_rows(path: Path, *, tell: Tell) -> Iterator[dict[str, Any]]:
    """Every row of a csv file (RFC 4180) as its header names the columns; all values are text.

    Raises:
        csv.Error: a quote is not closed, or a field is longer than ``LONGEST``.
        UnicodeError, EOFError: as ``read_text``.
    """
    csv.field_size_limit(LONGEST)
    with open(path, "rb", buffering=_BUFFER) as raw:
        text = io.TextIOWrapper(_decompressed(raw, path=path), encoding="utf-8-sig", newline="")
        yield from _told(csv.DictReader(text, strict=True), raw=raw, tell=tell)


def csv_columns(path: Path) -> list[str]:
    """The columns that the header of a csv file names."""
    with open(path, "rb", buffering=_BUFFER) as raw:
        text = io.TextIOWrapper(_decompressed(raw, path=path), encoding="utf-8-sig", newline="")
        return next(csv.reader(text, strict=True), [])


def parquet_columns(path: Path) -> list[str]:
    """The columns of a parquet file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def parquet_values(path: Path, *, column: str, tell: Tell) -> Iterator[Any]:
    """The values of one column of a parquet file; a few hundred rows are in memory at a time."""
    import pyarrow.parquet

    size = path.stat().st_size
    with pyarrow.parquet.ParquetFile(path) as file:
        total, done = max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=512, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()
            done += batch.num_rows
            tell(size * done // total)


def _is_array(path: Path) -> bool:
    first = next((line for line in _lines(path, tell=lambda _: None) if line and not line.isspace()), "")
    return first.lstrip().startswith("[")


def _lines(path: Path, *, tell: Tell, span: Span | None = None) -> Iterator[str]:
    """Lines of UTF-8 text, ended by ``\\n``, ``\\r\\n`` or ``\\r``; nothing else, U+2028 for one, ends a line."""
    with open(path, "rb", buffering=_BUFFER) as raw:
        file = _decompressed(raw, path=path)
        is_first, number, left = True, 0, sys.maxsize
        if span is not None:
            begin = _begin_of_line(raw, span.start)
            is_first, left = begin == 0, span.end - begin
        while left > 0 and (line := file.readline(LONGEST + 1)):
            number += 1
            left -= len(line)
            if len(line) > LONGEST:
                place = lines_before(path, span) + number
                raise DataError(
                    f"{path}, line {place:,} is longer than {LONGEST >> 20} MiB: write one document a line "
                    "(is it an array? then call it .json)"
                )
            if number % _TELL_EVERY == 0:
                tell(raw.tell())
            text = line.decode("utf-8-sig" if is_first else "utf-8")
            is_first = False
            # a bare \r cannot stand in JSON, so it ends a line, too; almost never there, so looked for first
            if "\r" in text and "\r" in text.removesuffix("\n").removesuffix("\r"):
                yield from text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            else:
                yield text
        tell(raw.tell())


def _begin_of_line(raw: BinaryIO, position: int) -> int:
    """Go to the first line that begins there or later; returns where that is."""
    if position == 0:
        return 0
    raw.seek(position - 1)
    while (block := raw.readline(_BUFFER)) and not block.endswith(b"\n"):
        pass
    return raw.tell()


def _told(rows: Iterable[dict[str, Any]], *, raw: BinaryIO, tell: Tell) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if number % _TELL_EVERY == 0:
            tell(raw.tell())
        yield row
    tell(raw.tell())


def _decompressed(raw: BinaryIO, *, path: Path) -> io.BufferedReader:
    suffix = path.suffix.lower()
    stream: Any = raw
    if suffix == ".gz":
        stream = gzip.GzipFile(fileobj=raw)
    elif suffix == ".xz":
        stream = lzma.LZMAFile(raw)  # noqa: SIM115 (closed with what it reads)
    elif suffix == ".zst":
        stream = _zstd(path).ZstdFile(raw)
    return stream if stream is raw else io.BufferedReader(stream, buffer_size=1 << 17)  # type: ignore[return-value]


def _zstd(path: Path) -> Any:
    # not the package zstandard: it takes a file that is cut short, or of several frames, for a whole one
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{path} needs a reader of zstd: pip install 'moetrain[zstd]', or decompress the file"
        ) from error
