"""From the spool to token files: all shards encoded, by as many processes as are of use, and put together in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetrain.data.corpus import SPLITS, TOKENIZER, RoundTrip, Split, SplitWriter, token_dtype
from moetrain.data.tokenizer import load_tokenizer, vocabulary_size
from moetrain.parallel.pool import Done, Here, Pool, Task
from moetrain.prepare.shards import ENCODED, Encoded, checksum, encoded_files
from moetrain.sources.spool import Spool, damaged, read_json, write_json
from moetrain.tokenization.fast import fast_encoder

_BASELINES = "baselines.json"
_CHOICE = "encoder.json"

Progress = Callable[[str, int, int | None], None]


def encode_all(
    work: Path,
    spool: Spool,
    *,
    cut: int,
    fast: bool,
    crew: Here | Pool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Encode every shard that is not, and measure the baselines beside; returns those, in bits per byte.

    Args:
        work: with the tokenizer and the texts for the baselines.
        spool: of it.
        cut: documents with a place below it are held out.
        fast: whether to use the faster encoder where it gives the same ids.
        crew: who does it.
        progress: told "encode" and bytes of text, and "baselines".
        say: told once why a faster encoder is not used, where one could be.

    Raises:
        DataError: a worker process was killed.
        OSError: the disk is full, or the like.
    """
    (work / ENCODED).mkdir(exist_ok=True)
    is_right = fast and _is_right(work, crew=crew, progress=progress, say=say)
    if not _encode(work, spool, cut=cut, fast=is_right, crew=crew, progress=progress):
        _refuse_fast(work, say=say, why="it gave other ids for a document")
        crew.close()  # workers keep their encoder
        for index in range(len(spool.shards)):
            encoded_files(work, index)[2].unlink(missing_ok=True)
        _encode(work, spool, cut=cut, fast=False, crew=crew, progress=progress)
    baselines = read_json(work / _BASELINES)
    assert baselines is not None
    return baselines


def _is_right(work: Path, *, crew: Here | Pool, progress: Progress, say: Callable[[str], None]) -> bool:
    """Whether the faster encoder is there and gives the ids of the tokenizer."""
    choice = read_json(work / _CHOICE)
    if choice is not None:
        return bool(choice["fast"])
    fast = fast_encoder(load_tokenizer(work / TOKENIZER))
    if fast.encode is None:
        _refuse_fast(work, say=say, why=str(fast.reason))
        return False
    (result,) = _run([{"what": "prove", "directory": str(work)}], work=work, crew=crew, progress=progress)
    if not result.answer["same_ids"]:
        _refuse_fast(work, say=say, why="it gave other ids for a sample")
        return False
    write_json(work / _CHOICE, {"fast": True})
    return True


def _run(tasks: Iterable[Task], *, work: Path, crew: Here | Pool, progress: Progress) -> Iterator[Done]:
    """Have tasks done, and beside the first of them the baselines measured, if they are not."""
    missing = [] if (work / _BASELINES).exists() else [{"what": "baselines", "directory": str(work)}]
    for result in crew.run(itertools.chain(missing, tasks)):
        if result.task["what"] == "baselines":
            write_json(work / _BASELINES, result.answer)
            progress("baselines", 1, 1)
        else:
            yield result


@dataclass(frozen=True)
class Written:
    """Both splits as they lie in the new directory, and what was found on the way."""

    train: Split
    held_out: Split
    round_trip: RoundTrip


def write_token_files(work: Path, out: Path, *, shards: int, progress: Progress) -> Written:
    """Put the encoded shards together, in order.

    Args:
        work: with every shard encoded.
        out: an empty directory, for the files of the splits.
        shards: how many there are.
        progress: told "write" and shards.
    """
    vocab_size = vocabulary_size(load_tokenizer(work / TOKENIZER))
    tried = same = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(out, split=split, vocab_size=vocab_size)) for split in SPLITS]
        for index in range(shards):
            bin_path, rows_path, about = encoded_files(work, index)
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
            progress("write", index + 1, shards)
        train, held_out = (writer.finish() for writer in writers)
    return Written(train=train, held_out=held_out, round_trip=RoundTrip(tried=tried, same=same))


def _encode(work: Path, spool: Spool, *, cut: int, fast: bool, crew: Here | Pool, progress: Progress) -> bool:
    """Whether the faster encoder, if it was used, gave the right ids throughout."""
    pending = [index for index in range(len(spool.shards)) if not encoded_files(work, index)[2].exists()]
    about = {"what": "encode", "directory": str(work), "cut": cut, "fast": fast}
    total = spool.num_bytes
    done = total - sum(spool.shards[index].bytes for index in pending)
    progress("encode", done, total)
    tasks = ({**about, "shard": index} for index in pending)
    for result in _run(tasks, work=work, crew=crew, progress=progress):
        if not result.answer["same_ids"]:
            return False
        done += spool.shards[result.task["shard"]].bytes
        progress("encode", done, total)
    return True


def _refuse_fast(work: Path, *, say: Callable[[str], None], why: str) -> None:
    write_json(work / _CHOICE, {"fast": False})
    say(f"encoding with tokenizers, not with the faster fastokens: {why}")
