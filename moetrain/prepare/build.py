"""The work of ``prepare``: split, train the tokenizer, encode, measure the baselines, into one empty directory.

The text is streamed from its files once for each of these: to split, to train the tokenizer, to encode. Nothing grows
with the text but one number for each document and, up to ``BASELINE_LIMIT``, what the baselines are measured on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moetrain.data.corpus import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER,
    Baselines,
    Meta,
    Source,
    Split,
    SplitWriter,
    file_sha256,
    write_meta,
)
from moetrain.data.tokenizer import (
    encode,
    end_of_text,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from moetrain.errors import DataError
from moetrain.prepare.baselines import trigram_bits_per_byte, xz_bits_per_byte
from moetrain.prepare.text import read_documents

Progress = Callable[[str, int, int | None], None]
"""Called with the stage (hash, read, tokenizer, encode, baselines), how much is done, and of how much (None: not yet
known), in bytes: of the files for hash, of UTF-8 text for the others."""

BASELINE_LIMIT = 64 << 20  # bytes of each split that the baselines look at


@dataclass(frozen=True)
class _Division:
    """Which documents are held out: those whose hash is below ``cut``."""

    cut: int
    num_bytes: int
    num_empty: int


def build_token_files(
    partial: Path,
    files: list[Path],
    *,
    text_column: str,
    held_out: float,
    vocab_size: int,
    tokenizer: str | None,
    progress: Progress,
) -> None:
    """Fill ``partial``, an empty directory, with everything of a prepared one; the other arguments as in ``prepare``.

    Raises:
        DataError: as ``prepare``.
        OSError: the directory cannot be written.
    """
    # The given tokenizer first: a fault there should not wait for the text to be read.
    given = None if tokenizer is None else load_tokenizer(Path(tokenizer))
    if given is not None:
        check_fits(vocabulary_size(given), what=f"the tokenizer {tokenizer}", vocab_size=vocab_size)
    sources = tuple(_hash_sources(files, progress=progress))
    division = _divide(files, text_column=text_column, held_out=held_out, progress=progress)
    if given is None:
        documents = _training_documents(files, text_column=text_column, division=division, progress=progress)
        chosen = train_tokenizer(documents, vocab_size=vocab_size)
    else:
        chosen = given
    encoded = _encode(partial, files, text_column=text_column, division=division, tokenizer=chosen, progress=progress)
    (partial / TOKENIZER).write_text(chosen.to_str(), encoding="utf-8")
    meta = Meta(
        format_version=FORMAT_VERSION,
        vocab_size=vocabulary_size(chosen),
        end_of_text=end_of_text(chosen),
        tokenizer_fingerprint=fingerprint(chosen),
        empty_documents=division.num_empty,
        train=encoded.train,
        held_out=encoded.held_out,
        sources=sources,
        baselines=_baselines(encoded, progress=progress),
    )
    write_meta(partial, meta=meta)


def _hash_sources(files: list[Path], *, progress: Progress) -> Iterator[Source]:
    sizes = [path.stat().st_size for path in files]
    for number, path in enumerate(files):
        progress("hash", sum(sizes[: number + 1]), sum(sizes))
        yield Source(name=path.name, size=sizes[number], sha256=source_sha256(path))


def _divide(files: list[Path], *, text_column: str, held_out: float, progress: Progress) -> _Division:
    """The cut of ``held_out``, moved just so far that each part gets a document."""
    assert 0 < held_out < 1, held_out
    num_documents = num_bytes = num_empty = 0
    smallest, largest = 1 << 64, -1

    def count_empty(_: Path) -> None:
        nonlocal num_empty
        num_empty += 1

    for document in read_documents(files, text_column=text_column, on_empty=count_empty):
        place = _place(document)
        smallest, largest = min(smallest, place), max(largest, place)
        num_documents += 1
        num_bytes += len(document.encode())
        progress("read", num_bytes, None)
    if smallest == largest:
        what = "one document" if num_documents == 1 else f"{num_documents:,} documents, all the same"
        raise DataError(
            f"data.text holds {what}, but training and held-out text need at least one each: split the text into "
            "several files or rows (a .txt file is one document)"
        )
    cut = min(max(round(held_out * (1 << 64)), smallest + 1), largest)
    return _Division(cut=cut, num_bytes=num_bytes, num_empty=num_empty)


def _place(document: str) -> int:
    """A document's place on a line of 2^64, by its text alone: the same text is never on both sides of a cut."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def _training_documents(
    files: list[Path], *, text_column: str, division: _Division, progress: Progress
) -> Iterator[str]:
    num_bytes = 0
    for document in read_documents(files, text_column=text_column):
        num_bytes += len(document.encode())
        progress("tokenizer", num_bytes, division.num_bytes)
        if _place(document) >= division.cut:
            yield document


@dataclass(frozen=True)
class _Encoded:
    """Both splits on the disk, and the beginnings of their text."""

    train: Split
    held_out: Split
    train_text: bytes
    held_out_text: bytes


def _encode(
    partial: Path,
    files: list[Path],
    *,
    text_column: str,
    division: _Division,
    tokenizer: Tokenizer,
    progress: Progress,
) -> _Encoded:
    end, size = end_of_text(tokenizer), vocabulary_size(tokenizer)
    num_bytes = 0
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(partial, split=split, vocab_size=size)) for split in SPLITS}
        texts = {split: bytearray() for split in writers}
        for document in encode(tokenizer, read_documents(files, text_column=text_column)):
            split = "train" if _place(document.text) >= division.cut else "held_out"
            data = document.text.encode()
            writers[split].add(np.append(document.ids, end), num_bytes=len(data))
            texts[split] += data[: BASELINE_LIMIT - len(texts[split])]
            num_bytes += len(data)
            progress("encode", num_bytes, division.num_bytes)
        if num_bytes != division.num_bytes:
            raise DataError("the files of data.text changed while they were read: start again when they are still")
        return _Encoded(
            train=writers["train"].finish(),
            held_out=writers["held_out"].finish(),
            train_text=bytes(texts["train"]),
            held_out_text=bytes(texts["held_out"]),
        )


def _baselines(encoded: _Encoded, *, progress: Progress) -> Baselines:
    train, held_out = encoded.train_text, encoded.held_out_text
    progress("baselines", 0, len(held_out))
    baselines = Baselines(
        xz=xz_bits_per_byte(held_out),
        trigram=trigram_bits_per_byte(train, held_out),
        train_bytes=len(train),
        held_out_bytes=len(held_out),
        truncated=len(train) < encoded.train.bytes or len(held_out) < encoded.held_out.bytes,
    )
    progress("baselines", len(held_out), len(held_out))
    return baselines


def check_fits(entries: int, *, what: str, vocab_size: int) -> None:
    """Refuse token ids that the model would have no row for.

    Args:
        entries: the largest id of ``what``, plus one.
        what: begins the message.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: there are more ids than rows.
    """
    if entries > vocab_size:
        raise DataError(
            f"{what} has {entries:,} token ids, but model.vocab_size is {vocab_size:,}, and each id needs a row of the "
            f"embedding: set model.vocab_size={entries}"
        )


def source_sha256(path: Path) -> str:
    """sha256 of a file of ``data.text``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): data.text must name files that can be read") from error
