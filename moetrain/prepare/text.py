"""Text in: from the patterns of ``data.text`` to files, and from files to documents.

The files are read through Hugging Face ``datasets`` in streaming mode, one file at a time so that an error can name
the file. Nothing is kept in memory but the document at hand (and, for a ``.json`` array, that file).
"""

from __future__ import annotations

import codecs
import glob
import importlib
import json
import locale
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrain.errors import DataError

BUILTIN = {"sotu": Path(__file__).parent / "corpora" / "sotu.jsonl.xz"}
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")


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
    # datasets leaves lock files in its cache directory even when it streams: not in the user's home.
    with tempfile.TemporaryDirectory(prefix="moetrain-datasets-") as cache:
        for path in files:
            for text in _texts(path, text_column=text_column, cache=cache):
                if text and not text.isspace():
                    num_documents += 1
                    yield text
                else:
                    num_empty += 1
                    if on_empty is not None:
                        on_empty(path)
    if num_documents == 0:
        names = ", ".join(str(path) for path in files[:3]) + (", ..." if len(files) > 3 else "")
        what = f"only empty documents ({num_empty:,} of them)" if num_empty else "no document at all"
        raise DataError(f"data.text holds {what} ({names}): name files with text in them")


def _texts(path: Path, *, text_column: str, cache: str) -> Iterator[str]:
    """Every document of one file, empty ones too."""
    if not path.is_file():
        raise DataError(f"{path} is not a file: data.text must name files that exist")
    known = _format(path)
    if known is None:
        raise DataError(f"{path} is of an unknown kind: data.text reads files that end in {_suffixes()}")
    try:
        if known == ".txt":
            yield from (_plain_text(text, path=path) for text in _raw_text(path, cache=cache, sample_by="document"))
        else:
            rows = {".csv": _csv_rows, ".parquet": _parquet_rows, ".json": _json_rows, ".jsonl": _json_rows}[known]
            for number, row in enumerate(rows(path, text_column=text_column, cache=cache), start=1):
                yield _text_of_row(row, text_column=text_column, where=f"{path}, row {number:,}")
    except DataError:
        raise
    except UnicodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error}): convert it, or leave it out of data.text if it is a binary file"
        ) from error
    except EOFError as error:
        raise DataError(f"{path} is cut short ({error}): copy or download it again") from error
    except Exception as error:  # datasets passes on whatever pyarrow, pandas, fsspec, gzip, lzma or zlib raise
        raise DataError(f"{path} cannot be read as {known} ({type(error).__name__}: {error})") from error


def _plain_text(text: str, *, path: Path) -> str:
    if "\0" in text:
        raise DataError(f"{path} holds NUL bytes, so it is a binary file or not UTF-8: leave it out or convert it")
    return text


def _text_of_row(row: Any, *, text_column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f'{where} is not an object: each must look like {{"{text_column}": ...}}')
    if text_column not in row:
        raise DataError(_missing_column(where, text_column=text_column, columns=row))
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where} holds {type(text).__name__} in column {text_column!r}, but it must be text: "
            "set data.text_column to the column with the text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair, which is not text: mend or leave out the row"
        ) from error
    return text


def _missing_column(where: str, *, text_column: str, columns: Iterable[str]) -> str:
    return (
        f"{where} has no column {text_column!r}; it has {', '.join(map(repr, columns)) or 'none'}: "
        "set data.text_column to the column with the text"
    )


def _json_rows(path: Path, *, text_column: str, cache: str) -> Iterator[Any]:
    # Not through the json builder of datasets: it guesses a schema from the first 10 MB, so a text like "2020-01-01"
    # comes back as a date, a column that first shows up later stops it, and its errors do not tell the line.
    if _format(path) == ".json" and _is_array(path, cache=cache):
        for text in _raw_text(path, cache=cache, sample_by="document"):
            yield from json.loads(text)
        return
    for number, line in enumerate(_raw_text(path, cache=cache, sample_by="line"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number:,} is not JSON ({error}): write one object a line"
                    + (", or one array of objects" if _format(path) == ".json" else "")
                ) from error


def _is_array(path: Path, *, cache: str) -> bool:
    first = next((line for line in _raw_text(path, cache=cache, sample_by="line") if line.strip()), "")
    return first.lstrip().startswith("[")


def _csv_rows(path: Path, *, text_column: str, cache: str) -> Iterator[Any]:
    from datasets import Features, Value

    # Only a given type keeps pandas from turning a text like "1984" into a number and "NA" into a hole.
    features = Features({text_column: Value("string")})
    try:
        yield from _stream("csv", path, cache=cache, features=features, keep_default_na=False)
    except KeyError as error:
        columns: dict[str, Any] = next(iter(_stream("csv", path, cache=cache)), {})
        if text_column in columns:
            raise
        raise DataError(_missing_column(str(path), text_column=text_column, columns=columns)) from error


def _parquet_rows(path: Path, *, text_column: str, cache: str) -> Iterator[Any]:
    columns = _stream("parquet", path, cache=cache).features
    if text_column not in columns:
        raise DataError(_missing_column(str(path), text_column=text_column, columns=columns))
    # batch_size: without it a whole row group comes into memory, and a file of no rows is an error.
    yield from _stream("parquet", path, cache=cache, columns=[text_column], batch_size=1024)


def _raw_text(path: Path, *, cache: str, sample_by: str) -> Iterator[str]:
    if path.suffix.lower() in COMPRESSIONS:
        _require_utf8_locale(path)
    for number, row in enumerate(_stream("text", path, cache=cache, sample_by=sample_by)):
        # A byte-order mark is no text, and json refuses it.
        yield row["text"].removeprefix("\ufeff") if number == 0 else row["text"]


def _stream(builder: str, path: Path, *, cache: str, **options: Any) -> Any:
    """A streaming dataset over one local file: no network, no cache kept, nothing printed."""
    if "::" in str(path):
        raise DataError(f"{path} cannot be read: datasets takes '::' in a path for a chain of addresses; rename it")
    if path.suffix.lower() == ".zst":
        _require_whole_zstd(path)
    with _quiet_datasets() as datasets:
        return datasets.load_dataset(
            # escaped: datasets takes [ ] * ? in a file's name for a glob
            builder, data_files=[glob.escape(str(path))], split="train", streaming=True, cache_dir=cache, **options
        )  # fmt: skip


@contextmanager
def _quiet_datasets() -> Iterator[Any]:
    """The datasets module without its call home, its progress bars, its log and its import of torch."""
    import datasets

    logging = datasets.utils.logging
    config = datasets.config
    before = config.HF_HUB_OFFLINE, config.TORCH_AVAILABLE
    # Even for local files load_dataset asks huggingface.co to count the use unless it is offline (load.py).
    config.HF_HUB_OFFLINE, config.TORCH_AVAILABLE = True, False
    # These two stay: rows are read after this door has closed, and a failure is told by a DataError.
    logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        config.HF_HUB_OFFLINE, config.TORCH_AVAILABLE = before


def _require_utf8_locale(path: Path) -> None:
    """Refuse a machine on which compressed text would be garbled.

    datasets forgets the encoding on the way into a compressed file (file_utils.xopen), so Python decodes with the
    locale's; Latin-1, for one, takes any bytes without complaint.
    """
    encoding = locale.getpreferredencoding(False)
    if codecs.lookup(encoding).name != "utf-8":
        raise DataError(
            f"{path} is compressed, and datasets would decode it as {encoding}, this machine's locale: "
            "set the environment variable PYTHONUTF8=1, or decompress the file"
        )


def _require_whole_zstd(path: Path) -> None:
    """Refuse the package ``zstandard``: it takes a file that is cut short, or of several frames, for a whole one."""
    opener = importlib.import_module("fsspec.compression").compr.get("zstd")
    if not isinstance(opener, type):
        raise DataError(
            f"{path} needs a zstd reader that notices a file cut short: pip install backports.zstd "
            "(part of Python from 3.14 on), or decompress the file"
        )


def _format(path: Path) -> str | None:
    """The one of ``FORMATS`` that the file's name tells, or None."""
    name = path.name.lower()
    for known in FORMATS:
        if name.endswith(known) or (known != ".parquet" and name.endswith(tuple(known + c for c in COMPRESSIONS))):
            return known
    return None


def _suffixes() -> str:
    return f"{', '.join(FORMATS)} (all but .parquet also with {', '.join(COMPRESSIONS)} after it)"
