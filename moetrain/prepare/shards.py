"""Encoding, one shard at a time: in this process, or as ``python -m moetrain.prepare.shards`` in several.

encoded/000000.bin       token ids, those of the training documents first, then those held out
encoded/000000.rows.npy  for each document in the same order, tokens (uint32)
encoded/000000.json      what ``Encoded`` says; written last

A worker process reads a task from each line of its standard input and answers each with a line of JSON. It ends when
that input does, so none stays behind when the process that started it is killed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.corpus import TOKENIZER, token_dtype
from moetrain.data.tokenizer import (
    BatchEncoder,
    batch_encoder,
    encode,
    end_of_text,
    load_tokenizer,
    vocabulary_size,
)
from moetrain.errors import DataError
from moetrain.prepare.baselines import trigram_bits_per_byte, xz_bits_per_byte
from moetrain.prepare.spool import ShardRows, read_spool, rows_of, texts_of_shard, write_file, write_json
from moetrain.tokenization.fast import differs, fast_encoder

SPOOL, ENCODED, DROPPED = "spool", "encoded", "dropped.npy"
BASELINE_TEXT = ("baseline.train", "baseline.held_out")

_SPOT_CHECK = 256  # one document of so many, by its place, is encoded both ways and decoded again


@dataclass(frozen=True)
class Encoded:
    """What is in an encoded shard; of each pair, first the training part, then the part that is held out."""

    documents: tuple[int, int]
    tokens: tuple[int, int]
    bytes: tuple[int, int]  # of text
    tried: int  # documents decoded again
    same: int  # of those, that came back as they were
    same_ids: bool  # whether the faster encoder gave the ids of the tokenizer, where both were tried


@dataclass(frozen=True)
class Work:
    """A directory of work, as a task names it."""

    directory: Path
    cut: int  # documents with a place below it are held out
    fast: bool  # whether to use the faster encoder

    def encode(self, number: int) -> Encoded:
        """Encode one shard of the spool.

        Raises:
            OSError: the disk is full, or the like.
        """
        root = self.directory / SPOOL
        shards = _shards(root)
        part = rows_of(root, shards, number)
        kept = _kept(self.directory, part)
        documents = [
            text.decode()
            for text, keep in zip(texts_of_shard(shards[number].next_to(root)[0], part.rows), kept, strict=True)
            if keep
        ]
        rows = part.rows[kept]
        tokenizer = _tokenizer(self.directory / TOKENIZER)
        fast = _fast(self.directory / TOKENIZER) if self.fast else None
        end = np.array([end_of_text(tokenizer)], dtype=np.uint32)
        ids = [one.ids for one in encode(fast or batch_encoder(tokenizer), documents)]
        tried = [index for index, place in enumerate(rows["place"].tolist()) if place % _SPOT_CHECK == 0]
        held_out = rows["place"] < np.uint64(self.cut)
        order = [*np.flatnonzero(~held_out).tolist(), *np.flatnonzero(held_out).tolist()]
        pieces = [piece for index in order for piece in (ids[index], end)]
        tokens = np.concatenate(pieces).astype(token_dtype(vocabulary_size(tokenizer))) if pieces else end[:0]
        lengths = np.array([len(ids[index]) + 1 for index in order], dtype=np.uint32)
        num_train = int((~held_out).sum())
        train_tokens = int(lengths[:num_train].sum())
        train_bytes = int(rows["bytes"][~held_out].sum())
        result = Encoded(
            documents=(num_train, len(order) - num_train),
            tokens=(train_tokens, len(tokens) - train_tokens),
            bytes=(train_bytes, int(rows["bytes"].sum()) - train_bytes),
            tried=len(tried),
            same=sum(tokenizer.decode(ids[one].tolist(), skip_special_tokens=False) == documents[one] for one in tried),
            same_ids=fast is None or not differs(tokenizer, fast, [documents[one] for one in tried]),
        )
        if result.same_ids:
            self._write(number, tokens=tokens, lengths=lengths, result=result)
        return result

    def _write(
        self, number: int, *, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.uint32], result: Encoded
    ) -> None:
        bin_path, rows_path, about = encoded_files(self.directory, number)
        write_file(bin_path, tokens.tobytes())
        np.save(rows_path, lengths, allow_pickle=False)
        write_json(about, asdict(result))


def encoded_files(directory: Path, number: int) -> tuple[Path, Path, Path]:
    """The files of an encoded shard: tokens, lengths, and what ``Encoded`` says."""
    stem = directory / ENCODED / f"{number:06}"
    return stem.with_suffix(".bin"), stem.with_suffix(".rows.npy"), stem.with_suffix(".json")


def measure_baselines(directory: Path) -> dict[str, float]:
    """Bits per byte of the two plain models, on the beginnings of the text that lie in the directory of work."""
    train, held_out = ((directory / name).read_bytes() for name in BASELINE_TEXT)
    return {"xz": xz_bits_per_byte(held_out), "trigram": trigram_bits_per_byte(train, held_out)}


def do(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task, as a worker is told it; the answer can be written as JSON."""
    directory = Path(task["directory"])
    if task["what"] == "baselines":
        return measure_baselines(directory)
    return asdict(Work(directory=directory, cut=task["cut"], fast=task["fast"]).encode(task["shard"]))


def _kept(directory: Path, part: ShardRows) -> npt.NDArray[np.bool_]:
    if not (directory / DROPPED).exists():
        return np.ones(len(part.rows), dtype=np.bool_)
    dropped = np.load(directory / DROPPED, mmap_mode="r", allow_pickle=False)
    return ~np.asarray(dropped[part.first : part.first + len(part.rows)], dtype=np.bool_)


@lru_cache(maxsize=1)
def _shards(root: Path) -> list[Any]:
    return list(read_spool(root))


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Any:
    return load_tokenizer(path)


@lru_cache(maxsize=1)
def _fast(path: Path) -> BatchEncoder | None:
    return fast_encoder(_tokenizer(path)).encode


def main() -> None:
    """Do the tasks of standard input until it ends."""
    # whatever a library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = {"done": do(json.loads(line))}
        except DataError as error:
            answer = {"data_error": str(error)}
        except OSError as error:
            answer = {"errno": error.errno or 0, "error": str(error)}
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
