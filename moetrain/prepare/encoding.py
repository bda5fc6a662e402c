"""From the spool to token files: all shards encoded, by as many processes as are of use, and put together in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moetrain.data.corpus import SPLITS, TOKENIZER, Baselines, RoundTrip, Split, SplitWriter, token_dtype
from moetrain.data.tokenizer import load_tokenizer, vocabulary_size
from moetrain.parallel.pool import Here, Pool
from moetrain.prepare.shards import ENCODED, Encoded, checksum, encoded_files
from moetrain.sources.spool import Spool, damaged, read_json, write_json

_BASELINES = "baselines.json"
_CHOICE = "encoder.json"
_NOT_FAST = "encoding with tokenizers, not with the faster fastokens"

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Written:
    """Both splits as they lie in the new directory, and what was found on the way."""

    train: Split
    held_out: Split
    round_trip: RoundTrip


def write_token_files(
    work: Path,
    out: Path,
    spool: Spool,
    *,
    cut: int,
    fast: bool,
    crew: Here | Pool,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Written, Baselines]:
    """Encode every shard that is not, put them together, and measure the baselines beside.

    Args:
        work: with the tokenizer and the texts for the baselines.
        out: a directory for the files of the splits.
        spool: of ``work``.
        cut: documents with a place below it are held out.
        fast: whether to use the faster encoder where it gives the same ids.
        crew: who does it.
        progress: told "encode" and bytes of text, "baselines", and "write" and shards.
        say: told once why a faster encoder is not used, where one could be.

    Returns:
        What was written, and the baselines.

    Raises:
        DataError: a worker process was killed, or an encoded shard is damaged.
        OSError: the disk is full, or the like.
    """
    (work / ENCODED).mkdir(exist_ok=True)
    choice = read_json(work / _CHOICE)
    if choice is None and not fast:
        _begin_with_tokenizers(work, spool)
    write = partial(_write, work, out, spool, cut=cut, crew=crew, progress=progress, say=say)
    written = write(fast=fast and (choice is None or bool(choice["fast"])), is_proved=choice is not None)
    if written is None:
        crew.close()  # workers keep their encoder
        _begin_with_tokenizers(work, spool)
        say(f"{_NOT_FAST}: it gives other ids")
        written = write(fast=False, is_proved=True)
    baselines = read_json(work / _BASELINES)
    assert written is not None
    assert baselines is not None
    return written, Baselines(**baselines)


def _write(
    work: Path,
    out: Path,
    spool: Spool,
    *,
    cut: int,
    fast: bool,
    is_proved: bool,
    crew: Here | Pool,
    progress: Progress,
    say: Callable[[str], None],
) -> Written | None:
    """None: the faster encoder gave other ids."""
    pending = [index for index in range(len(spool.shards)) if not encoded_files(work, index)[2].exists()]
    about = {"directory": str(work), "cut": cut, "fast": fast}
    total = spool.num_bytes
    done = total - sum(spool.shards[index].bytes for index in pending)
    progress("encode", done, total)
    # what takes longest comes first, and nobody waits for the proof: should it fail, all is encoded again
    proof = [{**about, "what": "prove"}] if fast and not is_proved else []
    baselines = [] if (work / _BASELINES).exists() else [{**about, "what": "baselines"}]
    shards = ({**about, "what": "encode", "shard": index} for index in pending)
    with _Together(work, out, shards=len(spool.shards)) as together:
        for result in crew.run(itertools.chain(proof, baselines, shards)):
            if not result.answer.get("same_ids", True):
                return None
            match result.task["what"]:
                case "prove":
                    missing = result.answer["missing"]
                    write_json(work / _CHOICE, {"fast": missing is None})
                    if missing is not None:
                        say(f"{_NOT_FAST}: {missing}")
                case "baselines":
                    write_json(work / _BASELINES, result.answer)
                    progress("baselines", 1, 1)
                case _:
                    done += spool.shards[result.task["shard"]].bytes
                    progress("encode", done, total)
                    # now, while the others encode: at the end everyone would wait for it
                    together.take_ready()
        together.take_ready()
        return together.finish(progress)


def _begin_with_tokenizers(work: Path, spool: Spool) -> None:
    for index in range(len(spool.shards)):
        encoded_files(work, index)[2].unlink(missing_ok=True)
    # not before they are gone: the next start would keep what an encoder that was never proved has made
    write_json(work / _CHOICE, {"fast": False})


class _Together:
    """The encoded shards, put together in order as they come."""

    def __init__(self, work: Path, out: Path, *, shards: int) -> None:
        self._work, self._out, self._shards = work, out, shards
        self._vocab_size = vocabulary_size(load_tokenizer(work / TOKENIZER))
        self._next = self._tried = self._same = 0
        self._stack = ExitStack()

    def __enter__(self) -> _Together:
        with self._stack as opening:
            self._writers = [
                opening.enter_context(SplitWriter(self._out, split=split, vocab_size=self._vocab_size))
                for split in SPLITS
            ]
            self._stack = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take_ready(self) -> None:
        """Add the next shards that are encoded."""
        while self._next < self._shards and (values := read_json(encoded_files(self._work, self._next)[2])) is not None:
            self._add(self._next, Encoded(**values))
            self._next += 1

    def _add(self, index: int, encoded: Encoded) -> None:
        bin_path, rows_path, _ = encoded_files(self._work, index)
        tokens = np.fromfile(bin_path, dtype=token_dtype(self._vocab_size))
        lengths = np.load(rows_path, allow_pickle=False)
        if checksum(tokens, lengths) != encoded.crc:
            raise damaged(bin_path)
        token, document = 0, 0
        for part, writer in enumerate(self._writers):
            token_end, document_end = token + encoded.tokens[part], document + encoded.documents[part]
            writer.add_many(
                tokens[token:token_end], lengths=lengths[document:document_end], num_bytes=encoded.bytes[part]
            )
            token, document = token_end, document_end
        self._tried, self._same = self._tried + encoded.tried, self._same + encoded.same

    def finish(self, progress: Progress) -> Written:
        """Bring everything to the disk."""
        assert self._next == self._shards, (self._next, self._shards)
        progress("write", self._shards, self._shards)
        train, held_out = (writer.finish() for writer in self._writers)
        return Written(train=train, held_out=held_out, round_trip=RoundTrip(tried=self._tried, same=self._same))
