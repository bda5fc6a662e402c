"""The work of ``prepare``: spool the text, divide it, train the tokenizer, encode, measure the baselines, write.

Everything is done in one directory of work, and every step leaves a file behind that says it is done: the next start
goes on from there. Nothing in memory grows with the text but, while they are looked at, a few bytes a document, and
up to a limit what the baselines and the tokenizer look at.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moetrain.data.corpus import FORMAT_VERSION, TOKENIZER, Baselines, Meta, SourceFile, file_sha256, write_meta
from moetrain.data.tokenizer import end_of_text, fingerprint, load_tokenizer, train_tokenizer, vocabulary_size
from moetrain.errors import DataError
from moetrain.parallel.pool import Done, Here, Pool, Task
from moetrain.prepare.dedup import mark_duplicates
from moetrain.prepare.encoding import Progress, Written, write_token_files
from moetrain.prepare.reading import (
    Options,
    hub_sha256,
    pieces_of,
    shard_bytes,
    size_of,
    size_of_part,
    spool_task,
    workers_for,
)
from moetrain.prepare.shards import PLAN, SPOOL, Worker, documents_of, kept_of
from moetrain.sources.hub import HubDataset
from moetrain.sources.spool import Spool, cut_between, read_json, read_spool, write_json
from moetrain.sources.text import Input, files_of, is_tokenized, nothing_to_read
from moetrain.tokenization.formats import read_tokenizer, tokenizer_files

OUT = "out"
"""The directory inside the directory of work that becomes the prepared one."""

LOCK = "lock"
"""The file inside the directory of work that its process holds."""

TOKENIZER_LIMIT = 1 << 30  # bytes of text that a tokenizer is trained on: of more, an even sample

_READ = "read.json"

Stamps = list[list[str | int]]
"""Of each file, its name, size and time of change."""


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
    crew = _crew(request)
    try:
        _build(work, request, given=given, crew=crew, progress=progress, say=say)
    finally:
        crew.close()


def _crew(request: Request) -> Here | Pool:
    """Who does the work: this process where there is little."""
    most = request.options.workers or len(os.sched_getaffinity(0))
    workers = workers_for(request.inputs, most=most)
    return Pool("moetrain.prepare.shards", workers=workers) if workers else Here(Worker().do)


def _build(
    work: Path,
    request: Request,
    *,
    given: Tokenizer | None,
    crew: Here | Pool,
    progress: Progress,
    say: Callable[[str], None],
) -> None:
    options = request.options
    sources, spool = _read(work, request, crew=crew, progress=progress)
    duplicates: dict[str, int] = {}
    if options.duplicates != "keep":
        duplicates = mark_duplicates(
            work, spool, near=options.duplicates == "near", similarity=options.similarity, crew=crew, progress=progress
        )
    cut = _cut(work, spool, held_out=request.held_out)
    tokenizer = _tokenizer(work, spool, request=request, cut=cut, given=given, progress=progress)
    fast = options.fast_encoder and isinstance(crew, Pool) and not is_tokenized(request.inputs[0])
    (work / OUT).mkdir(exist_ok=True)
    written, baselines = write_token_files(
        work, work / OUT, spool, cut=cut, fast=fast, crew=crew, progress=progress, say=say
    )
    _finish(work, tokenizer, written=written, baselines=baselines, sources=sources,
            left_out=spool.passed_over | duplicates, is_ours=given is None)  # fmt: skip


def _finish(
    work: Path,
    tokenizer: Tokenizer,
    *,
    written: Written,
    baselines: Baselines,
    sources: tuple[SourceFile, ...],
    left_out: dict[str, int],
    is_ours: bool,
) -> None:
    """Put what makes token files a prepared directory beside them."""
    out = work / OUT
    found = written.round_trip
    assert not is_ours or found.same == found.tried, f"a byte-level tokenizer lost text: {found}"
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
        baselines=baselines,
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


class _Sources:
    """The digests of the files of ``data.text``, as they come."""

    def __init__(self, work: Path, inputs: list[Input], *, progress: Progress) -> None:
        self._work, self._inputs, self._progress = work, inputs, progress
        self._sizes = {str(path): path.stat().st_size for source in inputs for path in files_of(source)}
        self._total, self._done = sum(self._sizes.values()), 0
        self._hub = {source: hub_sha256(source) for source in inputs if isinstance(source, HubDataset)}
        self._found: dict[str, str] = {}

    def tasks(self) -> Iterator[Task]:
        return ({"what": "hash", "directory": str(self._work), "file": path} for path in self._sizes)

    def take(self, result: Done) -> None:
        path = result.task["file"]
        self._found[path] = result.answer["sha256"]
        self._done += self._sizes[path]
        self._progress("hash", self._done, self._total)

    def all(self) -> tuple[SourceFile, ...] | None:
        """None: some are still to come."""
        if len(self._found) < len(self._sizes):
            return None
        return tuple(each for source in self._inputs for each in self._files(source))

    def _files(self, source: Input) -> Iterator[SourceFile]:
        if isinstance(source, HubDataset):
            yield SourceFile(name=str(source), size=0, sha256=self._hub[source])
        for path in files_of(source):
            yield SourceFile(name=path.name, size=self._sizes[str(path)], sha256=self._found[str(path)])


def _plan(request: Request, sources: tuple[SourceFile, ...] | None) -> dict[str, Any]:
    """What a directory of work is for: what an earlier start left there is kept only if it had the same.

    Args:
        sources: None while digests are still to come: their files are then known by size and time.
    """
    return {
        "format_version": FORMAT_VERSION,
        "sources": _stamps(request) if sources is None else [asdict(source) for source in sources],
        "text_column": request.text_column,
        "held_out": request.held_out,
        "vocab_size": request.vocab_size,
        "tokenizer": None if request.tokenizer is None else tokenizer_sha256(Path(request.tokenizer)),
        "tokenized": is_tokenized(request.inputs[0]),
        "shard_bytes": shard_bytes(request.inputs),
        **request.options.covered(),
    }


def _clear(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _read(
    work: Path, request: Request, *, crew: Here | Pool, progress: Progress
) -> tuple[tuple[SourceFile, ...], Spool]:
    """Digest the files, and spool what is not spooled."""
    before, left = _stamps(request), read_json(work / PLAN)
    sources = _Sources(work, request.inputs, progress=progress)
    hashing: Iterable[Task] = sources.tasks()
    if left is not None and left != _plan(request, None):
        # not beside the reading: whether what is there may be gone on with, the digests tell
        for result in crew.run(hashing):
            sources.take(result)
        hashing = []
    if left != (plan := _plan(request, sources.all())):
        _clear(work)
        write_json(work / PLAN, plan)
    (work / SPOOL).mkdir(exist_ok=True)
    if not (work / _READ).exists():
        _spool(work, request, sources, hashing=hashing, before=before, crew=crew, progress=progress)
        _refuse_changed(request, before)
    spool = read_spool(work / SPOOL)
    if spool.num_documents == 0:
        empty = spool.passed_over.get("empty", 0)
        other = sum(spool.passed_over.values()) - empty
        raise nothing_to_read(request.inputs, num_empty=empty, num_other=other)
    write_json(work / _READ, {"finished": True})
    found = sources.all()
    assert found is not None
    return found, spool


def _spool(
    work: Path,
    request: Request,
    sources: _Sources,
    *,
    hashing: Iterable[Task],
    before: Stamps,
    crew: Here | Pool,
    progress: Progress,
) -> None:
    """Spool what is not spooled, and take the digests that are left; with the last one, the plan is known."""
    inputs, options = request.inputs, request.options
    size = shard_bytes(inputs)
    pieces = pieces_of(inputs, piece_bytes=size)
    settings = {"text_column": request.text_column, "shard_bytes": size, "min_characters": options.min_characters,
                "max_characters": options.max_characters}  # fmt: skip
    is_known = not any(isinstance(source, HubDataset) for source in inputs)
    total = sum(map(size_of, inputs)) if is_known else None
    read, done = [0] * len(pieces), 0

    def told(task: Task, now: int) -> None:
        nonlocal done
        number = task["piece"]
        done, read[number] = done + max(0, now - read[number]), max(now, read[number])
        progress("read", done, total)

    tasks = (spool_task(work, number, piece, inputs=inputs, **settings) for number, piece in enumerate(pieces))
    for result in crew.run(itertools.chain(hashing, tasks), heard=lambda task, values: told(task, values["read"])):
        if result.task["what"] == "hash":
            sources.take(result)
            if (found := sources.all()) is not None:
                # else what was read before a change would pass, after a crash, for text with the digests of after it
                _refuse_changed(request, before)
                write_json(work / PLAN, _plan(request, found))
        else:
            told(result.task, sum(size_of_part(part, inputs) for part in pieces[result.task["piece"]]))


def _refuse_changed(request: Request, before: Stamps) -> None:
    if _stamps(request) != before:
        raise DataError("the files of data.text changed while they were read: start again when they are still")


def _stamps(request: Request) -> Stamps:
    found = [(path, path.stat()) for source in request.inputs for path in files_of(source)]
    return [[path.name, status.st_size, status.st_mtime_ns] for path, status in found]


def _cut(work: Path, spool: Spool, *, held_out: float) -> int:
    """Documents with a place below it are held out: ``held_out`` of them, moved just so far that each part gets one."""
    assert 0 < held_out < 1, held_out
    smallest, largest, num_documents = 1 << 64, -1, 0
    for index in range(len(spool.shards)):
        places, kept = spool.rows(index)["place"], kept_of(work, spool, index)
        places = places if kept is None else places[kept]
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


def _tokenizer(
    work: Path, spool: Spool, *, request: Request, cut: int, given: Tokenizer | None, progress: Progress
) -> Tokenizer:
    """The given one, or one trained on the training documents."""
    path = work / TOKENIZER
    if path.exists():
        return load_tokenizer(path)
    tokenizer = given
    if tokenizer is None:
        documents = _training_documents(work, spool, cut=cut, progress=progress)
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


def _training_documents(work: Path, spool: Spool, *, cut: int, progress: Progress) -> Iterator[str]:
    total, num_bytes = spool.num_bytes, 0
    one_of = -(-total // TOKENIZER_LIMIT)
    for index in range(len(spool.shards)):
        for document, place in documents_of(work, spool, index):
            num_bytes += len(document)
            if place >= cut and place % one_of == 0:
                yield document.decode()
        progress("tokenizer", num_bytes, total)


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
