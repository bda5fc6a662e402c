"""The work of ``prepare``: spool the text, divide it, train the tokenizer, encode, measure the baselines, write.

Everything is done in one directory of work, and every step leaves a file behind that says it is done: the next start
goes on from there. Nothing in memory grows with the text but, while they are looked at, a few bytes a document, and
up to a limit what the baselines and the tokenizer look at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moetrain.data.corpus import FORMAT_VERSION, TOKENIZER, Baselines, Meta, SourceFile, file_sha256, write_meta
from moetrain.data.tokenizer import end_of_text, fingerprint, load_tokenizer, train_tokenizer, vocabulary_size
from moetrain.errors import DataError
from moetrain.prepare.dedup import mark_duplicates
from moetrain.prepare.encoding import Encoding, Progress, encode_all, write_token_files
from moetrain.prepare.shards import BASELINE_TEXT, PLAN, SPOOL, kept_of, text_reader
from moetrain.prepare.text import Input, files_of, is_tokenized, is_visible, nothing_to_read, records_of
from moetrain.sources.hub import HubDataset, identity
from moetrain.sources.spool import (
    Shard,
    SpoolWriter,
    cut_between,
    read_json,
    rows_of,
    write_json,
)
from moetrain.sources.spool import texts_of as spooled_texts
from moetrain.tokenization.formats import read_tokenizer, tokenizer_files

OUT = "out"
"""The directory inside the directory of work that becomes the prepared one."""

LOCK = "lock"
"""The file inside the directory of work that its process holds."""

BASELINE_LIMITS = (16 << 20, 1 << 20)  # bytes of the training and of the held-out text that the baselines look at
TOKENIZER_LIMIT = 1 << 30  # bytes of text that a tokenizer is trained on: of more, an even sample

_READ = "read.json"
_TELL_EVERY = 1 << 18  # bytes of text between two words on how far reading is


@dataclass(frozen=True)
class Options:
    """What of the documents is taken, and how the work is done."""

    workers: int | None = None  # processes that encode; None: one for each core
    fast_encoder: bool = True  # use tiktoken where it is installed and gives the same ids
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
class Request:
    """What ``prepare`` was asked for."""

    inputs: list[Input]
    text_column: str
    held_out: float
    vocab_size: int
    tokenizer: str | None
    options: Options


def build_token_files(work: Path, request: Request, *, progress: Progress, say: Callable[[str], None]) -> None:
    """Fill ``work / OUT`` with everything of a prepared directory, from where an earlier start left off.

    Args:
        work: a directory of this process's own.
        request: what is wanted.
        progress: called with the stage (hash, read, tokenizer, encode, baselines, write), how much is done, and of how
            much; in bytes of the files for hash and read, of text for tokenizer and encode.
        say: called with a line for the user.

    Raises:
        DataError: as ``directory.prepare``.
        OSError: the directory cannot be written.
    """
    # The given tokenizer first: a fault there should not wait for the text to be read.
    given = None if request.tokenizer is None else read_tokenizer(Path(request.tokenizer))
    if is_tokenized(request.inputs[0]):
        _refuse_for_tokens(request)
    if given is not None:
        check_fits(vocabulary_size(given), what=f"the tokenizer {request.tokenizer}", vocab_size=request.vocab_size)
    sources = tuple(_hash_sources(request.inputs, progress=progress))
    _begin_or_go_on(work, request, sources=sources)
    shards = _read(work, request, progress=progress)
    duplicates: dict[str, int] = {}
    if request.options.duplicates != "keep":
        duplicates = mark_duplicates(
            work, shards, near=request.options.duplicates == "near", similarity=request.options.similarity,
            workers=request.options.workers, progress=progress,
        )  # fmt: skip
    cut = _cut(work, shards, held_out=request.held_out)
    tokenizer = _tokenizer(work, shards, request=request, cut=cut, given=given, progress=progress)
    _baseline_texts(work, shards, cut=cut)
    encoding = Encoding(cut=cut, workers=request.options.workers, fast=request.options.fast_encoder)
    measured = encode_all(work, encoding, progress=progress, say=say)
    _finish(work, tokenizer, measured=measured, sources=sources, left_out=shards[-1].passed_over | duplicates,
            is_ours=given is None, progress=progress)  # fmt: skip


def _finish(
    work: Path,
    tokenizer: Tokenizer,
    *,
    measured: dict[str, float],
    sources: tuple[SourceFile, ...],
    left_out: dict[str, int],
    is_ours: bool,
    progress: Progress,
) -> None:
    """Put everything of a prepared directory into ``work / OUT``."""
    out = work / OUT
    out.mkdir(exist_ok=True)
    written = write_token_files(work, out, progress=progress)
    found = written.round_trip
    assert not is_ours or found.same == found.tried, f"a byte-level tokenizer lost text: {found}"
    seen = [(work / name).stat().st_size for name in BASELINE_TEXT]
    (out / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    meta = Meta(
        format_version=FORMAT_VERSION,
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=end_of_text(tokenizer),
        tokenizer_fingerprint=fingerprint(tokenizer),
        empty_documents=left_out.get("empty", 0),
        dropped={reason: count for reason, count in left_out.items() if reason != "empty"},
        round_trip=found,
        train=written.train,
        held_out=written.held_out,
        sources=sources,
        baselines=Baselines(
            xz=measured["xz"],
            trigram=measured["trigram"],
            train_bytes=seen[0],
            held_out_bytes=seen[1],
            truncated=seen[0] < written.train.bytes or seen[1] < written.held_out.bytes,
        ),
    )
    write_meta(out, meta=meta)


def _refuse_for_tokens(request: Request) -> None:
    options = request.options
    if request.tokenizer is None:
        raise DataError(
            f"{request.inputs[0]} holds token ids, so data.tokenizer must name the tokenizer that made them"
        )
    if options.min_characters > 1 or options.max_characters is not None or options.duplicates == "near":
        raise DataError(
            f"{request.inputs[0]} holds token ids, not text: leave prepare.min_characters and prepare.max_characters "
            "as they are, and prepare.duplicates at keep or exact"
        )


def _hash_sources(inputs: list[Input], *, progress: Progress) -> Iterator[SourceFile]:
    total = sum(path.stat().st_size for source in inputs for path in files_of(source))
    done = 0
    for source in inputs:
        if isinstance(source, HubDataset):
            yield SourceFile(name=str(source), size=0, sha256=hub_sha256(source))
        for path in files_of(source):
            size = path.stat().st_size
            done += size
            progress("hash", done, total)
            yield SourceFile(name=path.name, size=size, sha256=source_sha256(path))


def hub_sha256(dataset: HubDataset) -> str:
    """sha256 of what identifies the content of a dataset."""
    return hashlib.sha256(f"{dataset} {identity(dataset)}".encode()).hexdigest()


def _begin_or_go_on(work: Path, request: Request, *, sources: tuple[SourceFile, ...]) -> None:
    """Keep what an earlier start left only if it had the same sources and settings."""
    plan = {
        "format_version": FORMAT_VERSION,
        "sources": [asdict(source) for source in sources],
        "text_column": request.text_column,
        "held_out": request.held_out,
        "vocab_size": request.vocab_size,
        "tokenizer": None if request.tokenizer is None else tokenizer_sha256(Path(request.tokenizer)),
        "tokenized": is_tokenized(request.inputs[0]),
        **request.options.covered(),
    }
    if read_json(work / PLAN) != plan:
        for path in work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        write_json(work / PLAN, plan)


def _read(work: Path, request: Request, *, progress: Progress) -> list[Shard]:
    """Spool what is not spooled."""
    spool = SpoolWriter.resume(work / SPOOL)
    if (work / _READ).exists():
        return spool.shards
    before = _stamps(request)
    sizes = [sum(path.stat().st_size for path in files_of(source)) for source in request.inputs]
    total = None if any(isinstance(source, HubDataset) for source in request.inputs) else sum(sizes)
    first, skip = spool.position
    for number in range(first, len(request.inputs)):

        def tell(position: int, *, number: int = number) -> None:
            read = sum(sizes[:number]) + min(position, sizes[number])
            progress("read", spool.num_bytes if total is None else read, total)

        _spool_input(spool, request, number=number, skip=skip, tell=tell)
        skip = 0
        tell(sizes[number])
    if _stamps(request) != before:
        raise DataError("the files of data.text changed while they were read: start again when they are still")
    spool.flush(source=len(request.inputs), row=0)
    _refuse_nothing(request.inputs, spool)
    write_json(work / _READ, {"finished": True})
    return spool.shards


def _spool_input(spool: SpoolWriter, request: Request, *, number: int, skip: int, tell: Callable[[int], None]) -> None:
    source, options = request.inputs[number], request.options
    is_text = not is_tokenized(source)
    position, told = 0, spool.num_bytes

    def note(read: int) -> None:
        nonlocal position
        position = read

    for row, document in enumerate(records_of(source, text_column=request.text_column, tell=note), start=1):
        if row <= skip:
            continue
        reason = why_not(document.decode(), options) if is_text else "" if document else "empty"
        if reason:
            spool.pass_over(reason)
        else:
            spool.add(document, source=number, row=row)
        if spool.num_bytes - told >= _TELL_EVERY:
            told = spool.num_bytes
            tell(position)


def why_not(text: str, options: Options) -> str:
    """Why a document is not taken; empty if it is."""
    if not is_visible(text):
        return "empty"
    if len(text) < options.min_characters:
        return "min_characters"
    if options.max_characters is not None and len(text) > options.max_characters:
        return "max_characters"
    return ""


def _stamps(request: Request) -> list[tuple[int, int]]:
    statuses = [path.stat() for source in request.inputs for path in files_of(source)]
    return [(status.st_size, status.st_mtime_ns) for status in statuses]


def _refuse_nothing(inputs: list[Input], spool: SpoolWriter) -> None:
    if spool.shards[-1].documents == 0:
        empty = spool.passed_over.get("empty", 0)
        raise nothing_to_read(inputs, num_empty=empty, num_other=sum(spool.passed_over.values()) - empty)


def _cut(work: Path, shards: list[Shard], *, held_out: float) -> int:
    """Documents with a place below it are held out: ``held_out`` of them, moved just so far that each part gets one."""
    assert 0 < held_out < 1, held_out
    smallest, largest, num_documents = 1 << 64, -1, 0
    for number in range(len(shards)):
        part = rows_of(work / SPOOL, shards, number)
        places = part.rows["place"][kept_of(work, part)]
        if len(places):
            smallest, largest = min(smallest, int(places.min())), max(largest, int(places.max()))
            num_documents += len(places)
    if smallest == largest:
        what = "one document" if num_documents == 1 else f"{num_documents:,} documents, all the same"
        raise DataError(
            f"data.text holds {what}, but training and held-out text need at least one each: split the text into "
            "several files or rows (a .txt file is one document)"
        )
    return cut_between(smallest, largest, held_out=held_out)


def _documents(work: Path, shards: list[Shard], number: int) -> Iterator[tuple[bytes, int]]:
    """The documents of a shard that are kept, each with its place."""
    part = rows_of(work / SPOOL, shards, number)
    kept = kept_of(work, part).tolist()
    texts = spooled_texts(work / SPOOL, shards[number], part)
    for document, place, keep in zip(texts, part.rows["place"].tolist(), kept, strict=True):
        if keep:
            yield document, place


def _tokenizer(
    work: Path, shards: list[Shard], *, request: Request, cut: int, given: Tokenizer | None, progress: Progress
) -> Tokenizer:
    """The given one, or one trained on the training documents."""
    path = work / TOKENIZER
    if path.exists():
        return load_tokenizer(path)
    tokenizer = given
    if tokenizer is None:
        documents = _training_documents(work, shards, cut=cut, progress=progress)
        tokenizer = train_tokenizer(
            documents,
            vocab_size=request.vocab_size,
            kind=request.options.tokenizer_kind,
            special_tokens=request.options.special_tokens,
        )
    beside = path.with_suffix(".tmp")
    beside.write_text(tokenizer.to_str(), encoding="utf-8")
    os.replace(beside, path)
    return tokenizer


def _training_documents(work: Path, shards: list[Shard], *, cut: int, progress: Progress) -> Iterator[str]:
    one_of = -(-shards[-1].bytes // TOKENIZER_LIMIT)
    num_bytes = 0
    for number in range(len(shards)):
        for document, place in _documents(work, shards, number):
            num_bytes += len(document)
            if place >= cut and place % one_of == 0:
                yield document.decode()
        progress("tokenizer", num_bytes, shards[-1].bytes)


def _baseline_texts(work: Path, shards: list[Shard], *, cut: int) -> None:
    """Put the beginnings of both parts of the text where the baselines are measured."""
    text_of = text_reader(work)
    texts = (bytearray(), bytearray())
    for number in range(len(shards)):
        if all(len(text) >= limit for text, limit in zip(texts, BASELINE_LIMITS, strict=True)):
            break
        for document, place in _documents(work, shards, number):
            part = 1 if place < cut else 0
            texts[part].extend(text_of(document)[: BASELINE_LIMITS[part] - len(texts[part])])
    for name, text in zip(BASELINE_TEXT, texts, strict=True):
        (work / name).write_bytes(text)


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


def tokenizer_sha256(path: Path) -> str:
    """Digest of the files that a tokenizer is made of.

    Raises:
        DataError: there is no such tokenizer.
    """
    digests = [file_sha256(file) for file in tokenizer_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def source_sha256(path: Path) -> str:
    """sha256 of a file of ``data.text``.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): data.text must name files that can be read") from error
