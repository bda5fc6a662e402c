"""From text to token files: where they go, and how a directory of them becomes whole at one moment or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moetrain.data.corpus import FILES, FORMAT_VERSION, META, Prepared, open_prepared
from moetrain.errors import DataError
from moetrain.parallel.pool import WorkerLost
from moetrain.prepare.build import (
    LOCK,
    OUT,
    Request,
    build_token_files,
    check_fits,
    tokenizer_sha256,
)
from moetrain.prepare.encoding import Progress
from moetrain.prepare.reading import Options, hub_sha256, source_sha256
from moetrain.sources.hub import HubDataset
from moetrain.sources.text import Input, files_of, inputs

_HASH_LIMIT = 64 << 20  # bytes; larger sources are told apart by size and time of change, not by content


def prepared_directory(
    base: Path,
    *,
    name: str,
    text: Sequence[str],
    text_column: str,
    held_out: float,
    vocab_size: int,
    tokenizer: str | None,
    options: Options = Options(),  # noqa: B008 (it is frozen)
) -> Path:
    """BASE/NAME-DIGEST: where ``prepare`` should put these settings' token files.

    The digest covers the settings and the text itself, not where it lies: of sources below 64 MiB the content, of
    larger ones size and time of change. Changed text therefore gives another directory.

    Raises:
        DataError: the text or the tokenizer file cannot be found, or ``name`` is not a file name.
    """
    if not name or "/" in name:
        raise DataError(f"data.name is {name!r}, but it becomes part of a directory's name: write one word without '/'")
    covered = {
        "format_version": FORMAT_VERSION,
        "sources": [key for source in inputs(text) for key in _source_keys(source)],
        "text_column": text_column,
        "held_out": held_out,
        "vocab_size": vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer_sha256(Path(tokenizer)),
        **options.covered(),
    }
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
    return base / f"{name}-{digest[:8]}"


def prepare(
    directory: Path,
    *,
    text: Sequence[str],
    text_column: str,
    held_out: float,
    vocab_size: int,
    tokenizer: str | None,
    progress: Progress,
    say: Callable[[str], None] = print,
    options: Options = Options(),  # noqa: B008 (it is frozen)
    verify: bool = False,
) -> Prepared:
    """Make the token files, unless they are there.

    A whole directory is opened as it is: what is in it counts, whatever the other settings say, as long as its
    vocabulary fits. Several processes may prepare the same directory at once; the first to finish wins.

    Args:
        directory: of the token files; made whole by one rename, so that a crash leaves nothing that opens. The work is
            done beside it, in directory.partial-0; after a crash the next call goes on with that.
        text: patterns, see ``text.expand``.
        text_column: see ``text.read_documents``.
        held_out: share of the documents kept for evaluation; which ones depends on their text alone.
        vocab_size: rows of the model's embedding; the tokenizer trained here has at most so many entries.
        tokenizer: path of a tokenizer.json, or None to train one on the training documents.
        progress: see ``build.build_token_files``.
        say: called with a line for the user.
        options: what of the documents is taken, and how the work is done.
        verify: of a directory that is whole already, compare every file with its digest.

    Raises:
        DataError: the text cannot be read or has fewer than two different documents, the tokenizer does not fit, the
            directory holds other things, or the disk is full.
    """
    if (directory / META).exists():
        return _fitting(open_prepared(directory, verify=verify), vocab_size=vocab_size)
    request = Request(
        inputs=inputs(text),
        text_column=text_column,
        held_out=held_out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        options=options,
    )
    fill(directory, lambda work: build_token_files(work, request, progress=progress, say=say))
    return _fitting(open_prepared(directory), vocab_size=vocab_size)


def fill(directory: Path, build: Callable[[Path], None]) -> None:
    """Make a prepared directory whole by one rename, out of a directory of work beside it.

    Args:
        build: fills ``OUT`` in the directory of work, in which there may be what an earlier start left.

    Raises:
        DataError: from ``build``; the directory holds other things, or the disk is full.
    """
    _refuse_foreign(directory)
    try:
        _fill(directory, build)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            f"{directory} cannot be written ({'the disk is full' if is_full else error}): "
            + ("make room, and the same command goes on with what lies beside it, or " if is_full else "")
            + "set data.prepared to another directory"
        ) from error


def _fill(directory: Path, build: Callable[[Path], None]) -> None:
    with _directory_of_work(directory) as work:
        try:
            build(work)
            _commit(work / OUT, directory)
        except DataError as error:
            if not isinstance(error, WorkerLost):  # else the next start goes on, as after an interrupt
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    _sweep(directory)


def _fitting(prepared: Prepared, *, vocab_size: int) -> Prepared:
    check_fits(prepared.vocab_size, what=f"the prepared directory {prepared.directory}", vocab_size=vocab_size)
    return prepared


def _source_keys(source: Input) -> list[list[str | int]]:
    if isinstance(source, HubDataset):
        return [[hub_sha256(source)]]
    return [_source_key(path) for path in files_of(source)]


def _source_key(path: Path) -> list[str | int]:
    status = path.stat()
    if status.st_size < _HASH_LIMIT:
        return [path.name, status.st_size, source_sha256(path)]
    return [path.name, status.st_size, status.st_mtime_ns]


def _refuse_foreign(directory: Path) -> None:
    """Only an unfinished directory of ours is ours to replace."""
    if not directory.exists():
        return
    foreign = ["(it is a file)"] if not directory.is_dir() else sorted(set(os.listdir(directory)) - FILES)
    if foreign:
        raise DataError(
            f"{directory} is to hold the token files, but there are other things in it, such as {foreign[0]}: "
            "set data.prepared to a new or an empty directory"
        )


@contextmanager
def _directory_of_work(directory: Path) -> Iterator[Path]:
    """A directory beside the final one that no other process uses; one that a dead process left is gone on with.

    The kernel owns the lock (flock(2)) and lets go of it however a process ends.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        work = directory.with_name(f"{directory.name}.partial-{number}")
        with _locked(work) as is_ours:
            if is_ours:
                yield work
                return


def _sweep(directory: Path) -> None:
    """Remove what dead processes left of the same work."""
    for work in directory.parent.glob(f"{glob.escape(directory.name)}.partial-*"):
        if work.is_dir():
            with _locked(work) as is_ours:
                if is_ours:
                    shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(work: Path) -> Iterator[bool]:
    """Whether the directory, made if need be, is this process's own while the block runs."""
    work.mkdir(exist_ok=True)
    try:
        file = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:  # its owner has just removed it
        yield False
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # of a file that its owner removed, or another process has made anew, the lock is worth nothing
            is_ours = os.path.samestat(os.fstat(file), os.stat(work / LOCK))
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        yield is_ours
    finally:
        os.close(file)


def _commit(out: Path, directory: Path) -> None:
    if directory.exists() and not (directory / META).exists():
        shutil.rmtree(directory)
    try:
        os.rename(out, directory)
    except OSError:
        # Another process was faster, and its files are as good as ours.
        if not (directory / META).exists():
            raise
