"""Text in: from the patterns of ``data.text`` to files, and from files to documents.

Nothing is kept in memory but the document at hand (and, for a ``.json`` array, that file).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moetrain.errors import DataError
from moetrain.sources import hub, megatron
from moetrain.sources.files import (
    Span,
    Tell,
    csv_columns,
    csv_rows,
    json_rows,
    lines_before,
    parquet_columns,
    parquet_values,
    read_text,
)
from moetrain.sources.hub import HubDataset

BUILTIN = {"sotu": Path(__file__).parent / "corpora" / "sotu.jsonl.xz"}
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".idx")
COMPRESSIONS = (".gz", ".xz", ".zst")


Input = Path | HubDataset
"""What text is read from: a file, or a dataset of the hub."""


def inputs(patterns: Sequence[str]) -> list[Input]:
    """What ``data.text`` names: files as ``expand`` gives them, then the datasets (``hf:``) in the order given.

    Raises:
        DataError: a pattern names nothing that can be read, or text and token files are mixed.
    """
    datasets = list(dict.fromkeys(hub.parse(pattern) for pattern in patterns if pattern.startswith(hub.PREFIX)))
    others = [pattern for pattern in patterns if not pattern.startswith(hub.PREFIX)]
    found: list[Input] = [*(expand(others) if others or not datasets else []), *datasets]
    tokenized = [one for one in found if is_tokenized(one)]
    if tokenized and len(tokenized) < len(found):
        other = next(one for one in found if not is_tokenized(one))
        raise DataError(f"data.text names token files ({tokenized[0]}) and text ({other}): prepare them as two sources")
    return found


def is_lines(source: Input) -> bool:
    """Whether it is a file of plain lines, of which a part can be read alone."""
    return isinstance(source, Path) and source.name.lower().endswith(".jsonl")


def is_tokenized(source: Input) -> bool:
    """Whether it holds token ids (Megatron's files), not text."""
    return isinstance(source, Path) and _format(source) == ".idx"


def told_nothing(position: int) -> None:
    """Nobody asked how far reading is."""


def records_of(source: Input, *, text_column: str, tell: Tell = told_nothing) -> Iterator[bytes]:
    """Every document of an input: UTF-8, or token ids as little-endian uint32 where it ``is_tokenized``.

    Raises:
        DataError: as ``read_documents``.
    """
    if isinstance(source, Path) and is_tokenized(source):
        for ids in megatron.documents(source):
            yield ids.astype("<u4").tobytes()
        tell(source.stat().st_size)
    else:
        for text in texts_of(source, text_column=text_column, tell=tell):
            yield text.encode()


def files_of(source: Input) -> list[Path]:
    """The files that an input is made of."""
    if isinstance(source, HubDataset):
        return []
    return [source, megatron.bin_of(source)] if is_tokenized(source) else [source]


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that ``data.text`` names: sorted, absolute, each once.

    A pattern is ``builtin:NAME``, a file, a directory (read with everything below it), or a glob (``**`` crosses
    directories). Directories and globs give only files of a known kind and pass over names that begin with a dot.

    Raises:
        DataError: a pattern names nothing that can be read.
    """
    if not patterns:
        raise DataError("data.text is empty: name at least one file, directory or glob, or builtin:sotu")
    found: dict[str, Path] = {}
    for path in sorted(path for pattern in patterns for path in _expand_one(pattern)):
        found.setdefault(os.path.realpath(path), path)  # of a file and the links to it, the first name
    return list(found.values())


def _expand_one(pattern: str) -> list[Path]:
    if pattern.startswith("builtin:"):
        name = pattern.removeprefix("builtin:")
        if name not in BUILTIN:
            known = ", ".join(f"builtin:{known}" for known in BUILTIN)
            raise DataError(f"data.text names {pattern!r}, but the corpora that ship with moetrain are: {known}")
        return [BUILTIN[name]]
    path = Path(pattern).expanduser().absolute()
    index = path.with_suffix(".idx") if path.suffix == ".bin" else path.with_name(f"{path.name}.idx")
    if index.is_file() and not path.is_dir() and _format(path) is None:
        return [index]  # Megatron's files, named as it names them: by what both have in common
    if path.is_file():
        if _format(path) is None:
            raise DataError(f"{path} is of an unknown kind: data.text reads files that end in {_suffixes()}")
        return [path]
    search = f"{glob.escape(str(path))}/**" if path.is_dir() else str(path)
    matches = [Path(match) for match in glob.glob(search, recursive=True)]
    files = [match for match in matches if match.is_file() and _format(match) is not None]
    if not files:
        raise DataError(
            f"data.text names {pattern!r}, but there is no such file, or nothing in it that can be read: "
            f"give files that end in {_suffixes()}"
        )
    return files


def read_documents(
    files: Iterable[Path], *, text_column: str, on_empty: Callable[[Path], None] | None = None
) -> Iterator[str]:
    """The documents of some files, in order; documents without a visible character are passed over.

    A ``.txt`` file is one document (line ends become ``\\n``, a byte-order mark goes away). A line of ``.jsonl``, an
    element of a ``.json`` array, and a row of ``.csv`` or ``.parquet`` is one document each, its text in
    ``text_column``; a null there is an empty document. All but ``.parquet``, which compresses inside, may end in
    ``.gz``, ``.xz`` or ``.zst`` as well.

    Args:
        files: what ``expand`` gave.
        text_column: column of the rows that holds the text.
        on_empty: called with the file for every empty document.

    Raises:
        DataError: a file is missing, of an unknown kind, cut short, not UTF-8 text, or not what its name says; a row
            lacks the column or holds something else than text there; there is no document, or all are empty.
    """
    files = list(files)
    num_documents = num_empty = 0
    for path in files:
        for text in texts_of(path, text_column=text_column):
            if is_visible(text):
                num_documents += 1
                yield text
            else:
                num_empty += 1
                if on_empty is not None:
                    on_empty(path)
    if num_documents == 0:
        raise nothing_to_read(files, num_empty=num_empty)


def is_visible(text: str) -> bool:
    """Whether a document has a visible character."""
    return bool(text) and not text.isspace()


def nothing_to_read(files: Sequence[object], *, num_empty: int, num_other: int = 0) -> DataError:
    """The error for a text without a document.

    Args:
        files: what was read.
        num_empty: documents without a visible character.
        num_other: documents that a filter left out.
    """
    names = ", ".join(str(path) for path in files[:3]) + (", ..." if len(files) > 3 else "")
    if num_other:
        return DataError(
            f"data.text holds {num_other:,} documents, but the filters of prepare.min_characters and "
            f"prepare.max_characters leave none ({names}): set them further apart"
        )
    what = f"only empty documents ({num_empty:,} of them)" if num_empty else "no document at all"
    return DataError(f"data.text holds {what} ({names}): name files with text in them")


def texts_of(source: Input, *, text_column: str, tell: Tell = told_nothing, span: Span | None = None) -> Iterator[str]:
    """Every document of a file of text, or of a dataset of the hub, those without a visible character too.

    Args:
        source: the file or the dataset.
        text_column: column of the rows that holds the text.
        tell: see ``sources.files.Tell``.
        span: read only this part of a file that ``is_lines``.

    Raises:
        DataError: as ``read_documents``.
    """
    if isinstance(source, HubDataset):
        for number, row in enumerate(hub.rows(source), start=1):
            _require_column(text_column, row, where=f"{source}, row {number:,}")
            yield _checked(row[text_column], text_column=text_column, where=partial(_row, source, number, None))
        return
    path = source
    known = _format(path)
    if known is None or known == ".idx":
        raise DataError(f"{path} is of an unknown kind: data.text reads files that end in {_suffixes()}")
    with _read_as(known, path):
        if known == ".txt":
            yield _plain_text(read_text(path, tell=tell), path=path)
        elif known == ".parquet":
            _require_column(text_column, parquet_columns(path), where=str(path))
            for number, value in enumerate(parquet_values(path, column=text_column, tell=tell), start=1):
                yield _checked(value, text_column=text_column, where=partial(_row, path, number, None))
        else:
            yield from _texts_of_rows(path, text_column=text_column, tell=tell, known=known, span=span)


def values_of(path: Path, *, tell: Tell = told_nothing) -> Iterator[tuple[int, Any]]:
    """Every line of a .jsonl file, every element of a .json array, with its number; whatever they are.

    Raises:
        DataError: the file is missing, of another kind, cut short, or not what its name says.
    """
    known = _format(path)
    if known not in (".jsonl", ".json"):
        raise DataError(f"{path} is no .jsonl and no .json (also with {', '.join(COMPRESSIONS)} after it)")
    with _read_as(known, path):
        yield from json_rows(path, tell=tell, may_be_array=known == ".json")


@contextmanager
def _read_as(known: str, path: Path) -> Iterator[None]:
    """Turns whatever reading a file raises into an error that names it."""
    if not path.is_file():
        raise DataError(f"{path} is not a file: data.text must name files that exist")
    try:
        yield
    except DataError:
        raise
    except UnicodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error}): convert it, or leave it out of data.text if it is a binary file"
        ) from error
    except EOFError as error:
        raise DataError(f"{path} is cut short ({error}): copy or download it again") from error
    except Exception as error:  # whatever pyarrow, csv, json, gzip, lzma, zlib or zstd raise
        raise DataError(f"{path} cannot be read as {known} ({type(error).__name__}: {error})") from error


def _texts_of_rows(path: Path, *, text_column: str, tell: Tell, known: str, span: Span | None) -> Iterator[str]:
    rows: Iterator[tuple[int, Any]]
    if known == ".csv":
        columns = csv_columns(path)
        if columns:
            _require_column(text_column, columns, where=str(path))
        rows = enumerate(csv_rows(path, tell=tell), start=1)
    else:
        rows = json_rows(path, tell=tell, may_be_array=known == ".json", span=span)
    for number, row in rows:
        where = partial(_row, path, number, span)
        if not isinstance(row, dict):
            raise DataError(f'{where()} is not an object: each must look like {{"{text_column}": ...}}')
        if text_column not in row:
            _require_column(text_column, row, where=where())
        yield _checked(row[text_column], text_column=text_column, where=where)


def _row(source: Input, number: int, span: Span | None) -> str:
    before = lines_before(source, span) if isinstance(source, Path) else 0
    return f"{source}, row {before + number:,}"


def _plain_text(text: str, *, path: Path) -> str:
    if "\0" in text:
        raise DataError(f"{path} holds NUL bytes, so it is a binary file or not UTF-8: leave it out or convert it")
    return text


def _checked(value: Any, *, text_column: str, where: Callable[[], str]) -> str:
    if isinstance(value, str):
        check_whole(value, where=where)
        return value
    if value is None:
        return ""
    raise DataError(
        f"{where()} holds {type(value).__name__} in column {text_column!r}, but it must be text: "
        "set data.text_column to the column with the text"
    )


def check_whole(text: str, *, where: Callable[[], str]) -> None:
    """Refuse what JSON can spell and UTF-8 cannot.

    Args:
        text: a value of JSON.
        where: the place that the message names.

    Raises:
        DataError: it holds half of a surrogate pair.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where()} holds half of a surrogate pair, which is not text: mend or leave out the row"
        ) from error


def _require_column(text_column: str, columns: Iterable[str], *, where: str) -> None:
    if text_column not in columns:
        raise DataError(
            f"{where} has no column {text_column!r}; it has {', '.join(map(repr, columns)) or 'none'}: "
            "set data.text_column to the column with the text"
        )


def _format(path: Path) -> str | None:
    """The one of ``FORMATS`` that the file's name tells, or None."""
    name = path.name.lower()
    for known in FORMATS:
        if name.endswith(known) or (
            known not in (".parquet", ".idx") and name.endswith(tuple(known + c for c in COMPRESSIONS))
        ):
            return known
    return None


def _suffixes() -> str:
    return f"{', '.join(FORMATS)} (all but .parquet and .idx also with {', '.join(COMPRESSIONS)} after it)"
