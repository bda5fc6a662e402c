"""From the spool to token files: all shards encoded, by as many processes as are of use, and put together in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.data.corpus import SPLITS, TOKENIZER, RoundTrip, Split, SplitWriter, token_dtype
from moetrain.data.tokenizer import load_tokenizer, vocabulary_size
from moetrain.parallel.pool import Task, run_tasks
from moetrain.prepare.shards import (
    ENCODED,
    SPOOL,
    Encoded,
    ShardEncoder,
    checksum,
    encoded_files,
    is_tokenized,
    measure_baselines,
)
from moetrain.sources.spool import Shard, damaged, read_json, read_spool, rows_of, texts_of, write_json
from moetrain.tokenization.fast import differs, fast_encoder, vocabulary_texts

SMALL = 16 << 20
"""Bytes of text below which no process is started and no encoder proved: this one is done sooner."""

_SAMPLE_SHARDS, _SAMPLE_BYTES = 32, 1 << 16  # what the faster encoder is tried on: so much of each of so many shards
_BASELINES = "baselines.json"
_CHOICE = "encoder.json"

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Encoding:
    """How the shards are to be encoded."""

    cut: int  # documents with a place below it are held out
    workers: int | None  # None: one for each core
    fast: bool  # whether to use the faster encoder where it gives the same ids


def encode_all(work: Path, encoding: Encoding, *, progress: Progress, say: Callable[[str], None]) -> dict[str, float]:
    """Encode every shard that is not, and measure the baselines beside; returns those, in bits per byte.

    Args:
        work: with the spool, the tokenizer and the texts for the baselines.
        encoding: how.
        progress: told "encode" and bytes of text, and "baselines".
        say: told once why a faster encoder is not used, where one could be.

    Raises:
        DataError: a worker process was killed.
        OSError: the disk is full, or the like.
    """
    shards = list(read_spool(work / SPOOL))
    (work / ENCODED).mkdir(exist_ok=True)
    num_bytes = shards[-1].bytes
    is_small = num_bytes < SMALL
    fast = encoding.fast and not is_small and not is_tokenized(work) and _choose_fast(work, shards, say=say)
    pending = [shard for shard in shards if not encoded_files(work, shard.number)[2].exists()]
    if is_small:
        return _encode_here(work, encoding, pending=pending, num_bytes=num_bytes, progress=progress)
    workers = encoding.workers or len(os.sched_getaffinity(0))
    if not _encode_in_workers(
        work, encoding, fast=fast, workers=workers, pending=pending, num_bytes=num_bytes, progress=progress
    ):
        _refuse_fast(work, say=say, why="it gave other ids for a document")
        for shard in shards:
            encoded_files(work, shard.number)[2].unlink(missing_ok=True)
        return encode_all(work, encoding, progress=progress, say=say)
    found = read_json(work / _BASELINES)
    assert found is not None
    return found


@dataclass(frozen=True)
class Written:
    """Both splits as they lie in the new directory, and what was found on the way."""

    train: Split
    held_out: Split
    round_trip: RoundTrip


def write_token_files(work: Path, out: Path, *, progress: Progress) -> Written:
    """Put the encoded shards together, in order.

    Args:
        work: with every shard encoded.
        out: an empty directory, for the files of the splits.
        progress: told "write" and shards.
    """
    vocab_size = vocabulary_size(load_tokenizer(work / TOKENIZER))
    shards = list(read_spool(work / SPOOL))
    tried = same = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(out, split=split, vocab_size=vocab_size)) for split in SPLITS]
        for shard in shards:
            bin_path, rows_path, about = encoded_files(work, shard.number)
            values = read_json(about)
            assert values is not None, about
            encoded = Encoded(**values)
            tokens = np.fromfile(bin_path, dtype=token_dtype(vocab_size))
            lengths = np.load(rows_path, allow_pickle=False)
            if checksum(tokens, lengths) != encoded.crc:
                raise damaged(bin_path)
            token, document = 0, 0
            for part, writer in enumerate(writers):
                token_end, document_end = token + encoded.tokens[part], document + encoded.documents[part]
                writer.add_many(
                    tokens[token:token_end], lengths=lengths[document:document_end], num_bytes=encoded.bytes[part]
                )
                token, document = token_end, document_end
            tried, same = tried + encoded.tried, same + encoded.same
            progress("write", shard.number + 1, len(shards))
        train, held_out = (writer.finish() for writer in writers)
    return Written(train=train, held_out=held_out, round_trip=RoundTrip(tried=tried, same=same))


def _encode_here(
    work: Path, encoding: Encoding, *, pending: list[Shard], num_bytes: int, progress: Progress
) -> dict[str, float]:
    encoder = ShardEncoder(work, cut=encoding.cut, fast=False)
    done = num_bytes - _size(work, pending)
    progress("encode", done, num_bytes)
    for shard in pending:
        encoder.encode(shard.number)
        done += _size(work, [shard])
        progress("encode", done, num_bytes)
    progress("baselines", 0, 1)
    found = measure_baselines(work)
    progress("baselines", 1, 1)
    return found


def _encode_in_workers(
    work: Path,
    encoding: Encoding,
    *,
    fast: bool,
    workers: int,
    pending: list[Shard],
    num_bytes: int,
    progress: Progress,
) -> bool:
    """Whether the faster encoder, if it was used, gave the right ids throughout."""

    def tasks() -> Iterator[Task]:
        # the longest first
        if not (work / _BASELINES).exists():
            yield {"what": "baselines", "directory": str(work)}
        for shard in pending:
            yield {"what": "encode", "directory": str(work), "cut": encoding.cut, "fast": fast, "shard": shard.number}

    sizes = {shard.number: _size(work, [shard]) for shard in pending}
    done = num_bytes - sum(sizes.values())
    progress("encode", done, num_bytes)
    for result in run_tasks(tasks(), module="moetrain.prepare.shards", workers=max(1, min(workers, len(pending) + 1))):
        if result.task["what"] == "baselines":
            write_json(work / _BASELINES, result.answer)
            continue
        if not result.answer["same_ids"]:
            return False
        done += sizes[result.task["shard"]]
        progress("encode", done, num_bytes)
    return True


def _choose_fast(work: Path, shards: list[Shard], *, say: Callable[[str], None]) -> bool:
    """Whether the faster encoder may be used: it is there, and proved on a sample of the text."""
    chosen = read_json(work / _CHOICE)
    if chosen is not None:
        return bool(chosen["fast"])
    tokenizer = load_tokenizer(work / TOKENIZER)
    fast = fast_encoder(tokenizer)
    if fast.encode is None:
        _refuse_fast(work, say=say, why=str(fast.reason))
        return False
    if differs(tokenizer, fast.encode, vocabulary_texts(tokenizer)) or differs(
        tokenizer, fast.encode, _sample(work, shards)
    ):
        _refuse_fast(work, say=say, why="it gave other ids for a sample")
        return False
    write_json(work / _CHOICE, {"fast": True})
    return True


def _refuse_fast(work: Path, *, say: Callable[[str], None], why: str) -> None:
    write_json(work / _CHOICE, {"fast": False})
    say(f"encoding with tokenizers, not with the faster tiktoken: {why}")


def _sample(work: Path, shards: list[Shard]) -> Iterator[str]:
    """The beginnings of some shards, evenly spread over the corpus."""
    step = max(1, len(shards) // _SAMPLE_SHARDS)
    for shard in shards[::step]:
        size = 0
        part = rows_of(work / SPOOL, shards, shard.number)
        for text in texts_of(work / SPOOL, shard, part):
            if size + len(text) > _SAMPLE_BYTES and size:
                break
            size += len(text)
            yield text.decode()


def _size(work: Path, shards: list[Shard]) -> int:
    return sum(shard.next_to(work / SPOOL)[0].stat().st_size for shard in shards)
