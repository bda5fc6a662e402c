"""The producer: ``python -m moetrain.stream.produce RUN_DIR``. Text in, blocks out, not too far ahead of the training.

    documents -> chunks -> worker processes -> ids in order -> blocks -> position
        ^ no further than the blocks that training wants, and so many chunks beyond what is in order

A document that the hash of its text holds out is passed over. Where the position is lost the text is read from its
beginning again, and gives the same blocks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moetrain.parallel.lifeline import die_with_parent

if __name__ == "__main__":
    # before anything slow: a run that is killed must not leave this process behind
    die_with_parent()

import numpy as np
import numpy.typing as npt

from moetrain.config.freeze import read_run
from moetrain.errors import DataError, MoetrainError
from moetrain.parallel.pool import Here, Pool, Task, WorkerLost
from moetrain.prepare.build import Request
from moetrain.sources.text import nothing_to_read
from moetrain.stream.blocks import Blocks, End, Fault, Position, open_again
from moetrain.stream.documents import documents_of
from moetrain.stream.encode import Worker, from_text
from moetrain.stream.opening import request_of

_POLL_SECONDS = 0.03
_LARGEST_CHUNK = 1 << 20  # bytes of text
_SMALL = 16 << 20
"""Bytes of all the text below which no process is started, unless prepare.workers asks for it."""

_MOST_WORKERS = 8
"""Unless prepare.workers says otherwise: some 5 million tokens a second, more than a node trains on."""


@dataclass
class Chunk:
    """Some documents, and what is counted up to their end."""

    position: Position
    texts: list[str] = field(default_factory=list)
    size: int = 0


def produce(
    blocks: Blocks,
    request: Request,
    *,
    sizes: list[int],
    cut: int,
    tokenizer: Path,
    workers: int,
) -> End:
    """Make every block that is not there, as training wants them, until the text ends.

    Args:
        blocks: where they go.
        request: which text, and what of it is taken.
        sizes: bytes of each input when the stream began.
        cut: documents with a place below it are held out.
        tokenizer: path of the tokenizer.json.
        workers: processes that encode; 0: this one does.

    Raises:
        DataError: the text cannot be read, has no document, or not one sequence.
        WorkerLost: a worker was killed.
        OSError: the disk is full, or the like.
    """
    position, waiting = blocks.read_position()
    step, stop = blocks.shape.tokens, threading.Event()
    done = position.blocks

    def may_go_on(ahead: int) -> bool:
        return done < blocks.wanted() and ahead < 2 * workers + 2

    chunks = _chunks(request, position=position, sizes=sizes, cut=cut, size=min(_LARGEST_CHUNK, 2 * step))
    encoded = _in_order(chunks, tokenizer=tokenizer, dtype=blocks.dtype, workers=workers, may_go_on=may_go_on,
                        stop=stop)  # fmt: skip
    with contextlib.closing(encoded):
        try:
            for position, tokens in encoded:
                waiting = np.concatenate([waiting, tokens])
                before = done
                # one more than a block has from its beginning to the next: both hold the token between them
                while len(waiting) > step:
                    blocks.write(done, waiting[: step + 1])
                    waiting, done = waiting[step:], done + 1
                if done > before:
                    blocks.write_position(replace(position, blocks=done), waiting)
        finally:
            stop.set()
    return _finish(blocks, request, position=position, done=done, waiting=waiting)


def _finish(blocks: Blocks, request: Request, *, position: Position, done: int, waiting: npt.NDArray[Any]) -> End:
    if not position.documents + position.held_out:
        empty = position.left_out.get("empty", 0)
        other = sum(position.left_out.values()) - empty
        raise nothing_to_read(request.inputs, num_empty=empty, num_other=other)
    shape = blocks.shape
    rest = max(0, len(waiting) - 1) // shape.sequence_length
    total = done * shape.sequences + rest
    tokens = done * shape.tokens + len(waiting)
    if not total:
        raise DataError(
            f"the training text has {tokens:,} tokens, but one sequence takes {shape.sequence_length + 1:,} "
            "(batch.sequence_length and one to predict): add text, or set a smaller batch.sequence_length"
        )
    if rest:
        blocks.write(done, waiting[: rest * shape.sequence_length + 1])
    end = End(total, tokens, documents=position.documents, bytes=position.bytes, left_out=position.left_out)
    blocks.write_end(end)
    return end


def _chunks(request: Request, *, position: Position, sizes: list[int], cut: int, size: int) -> Iterator[Chunk]:
    """The training documents after a position, some at a time."""
    chunk = Chunk(position)
    for document in documents_of(request, sizes=sizes, source=position.source, row=position.row):
        now = replace(chunk.position, source=document.source, row=document.row)
        if document.left_out:
            counts = now.left_out | {document.left_out: now.left_out.get(document.left_out, 0) + 1}
            chunk.position = replace(now, left_out=counts)
        elif document.place < cut:
            chunk.position = replace(now, held_out=now.held_out + 1)
        else:
            length = len(document.text)
            chunk.position = replace(now, documents=now.documents + 1, bytes=now.bytes + length)
            chunk.texts.append(document.text.decode())
            chunk.size += length
        if chunk.size >= size:
            yield chunk
            chunk = Chunk(chunk.position)
    yield chunk


def _in_order(
    chunks: Iterator[Chunk],
    *,
    tokenizer: Path,
    dtype: np.dtype[Any],
    workers: int,
    may_go_on: Callable[[int], bool],
    stop: threading.Event,
) -> Generator[tuple[Position, npt.NDArray[Any]], None, None]:
    """The position after each chunk, and its ids; chunks in order, however many processes encode them.

    Args:
        may_go_on: told how many chunks were drawn beyond those that are in order; another is drawn when it agrees.
        stop: no more are drawn once it is set.
    """
    given, taken = itertools.count(), 0
    positions: dict[int, Position] = {}

    def drawn() -> Iterator[tuple[int, Chunk]]:
        while True:
            while not stop.is_set() and not may_go_on(len(positions)):
                time.sleep(_POLL_SECONDS)
            chunk = None if stop.is_set() else next(chunks, None)
            if chunk is None:
                return
            number = next(given)
            positions[number] = chunk.position
            yield number, chunk

    tasks: Iterator[Task] = (
        {"number": number, "tokenizer": str(tokenizer), "texts": chunk.texts} for number, chunk in drawn()
    )
    early: dict[int, npt.NDArray[Any]] = {}
    crew = Pool("moetrain.stream.encode", workers=workers) if workers else Here(Worker().do)
    try:
        for result in crew.run(tasks):
            early[result.task["number"]] = from_text(result.answer["tokens"], dtype=dtype)
            while taken in early:
                yield positions.pop(taken), early.pop(taken)
                taken += 1
    finally:
        crew.close()


def fault_of(error: BaseException, *, directory: Path) -> Fault:
    """What training is told of an error."""
    if isinstance(error, WorkerLost):
        return Fault("lost", str(error))
    if isinstance(error, MoetrainError):
        return Fault("data", str(error))
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full: make room" if is_full else f"{error}: mend that"
        return Fault("data", f"{directory} cannot be written ({what}, and the same command goes on)")
    return Fault("crash", "".join(traceback.format_exception(error)))


def main(run_dir: Path) -> int:
    """Produce the stream of a run, and leave the error, if there is one, where training looks for it."""
    run = read_run(run_dir)
    stream = open_again(run, run_dir)
    workers = run.prepare.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0))
        is_small = 0 < sum(stream.sizes) < _SMALL
        workers = 0 if is_small else max(1, min(_MOST_WORKERS, cores - (run.launch.processes or 1)))
    try:
        produce(
            stream.blocks,
            request_of(run),
            sizes=stream.sizes,
            cut=stream.cut,
            tokenizer=stream.tokenizer,
            workers=workers,
        )
    except BaseException as error:
        traceback.print_exc()
        stream.blocks.write_fault(fault_of(error, directory=stream.blocks.directory))
        return 1
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    # not sys.exit: a library's thread must not keep this process alive
    os._exit(code)
