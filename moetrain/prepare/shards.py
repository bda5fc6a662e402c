"""Encoding, one shard at a time: in this process, or as ``python -m moetrain.prepare.shards`` in several.

encoded/000000.bin       token ids, those of the training documents first, then those held out
encoded/000000.rows.npy  for each document in the same order, tokens (uint32)
encoded/000000.json      what ``Encoded`` says; written last

A worker process (``parallel.pool.do_tasks``) ends when its standard input does, so none stays behind when the process
that started it is killed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.corpus import TOKENIZER, token_dtype
from moetrain.data.tokenizer import (
    batch_encoder,
    encode,
    end_of_text,
    load_tokenizer,
    vocabulary_size,
)
from moetrain.errors import DataError
from moetrain.parallel.pool import do_tasks
from moetrain.prepare.baselines import trigram_bits_per_byte, xz_bits_per_byte
from moetrain.sources.duplicates import digests
from moetrain.sources.spool import Shard, ShardRows, read_json, read_spool, rows_of, texts_of, write_json
from moetrain.tokenization.fast import differs, fast_encoder

SPOOL, ENCODED, DROPPED, DIGESTS = "spool", "encoded", "dropped.npy", "digests.npy"
PLAN = "plan.json"
BASELINE_TEXT = ("baseline.train", "baseline.held_out")

_SPOT_CHECK, _SPOT_CHECK_FEW, _FEW = 256, 8, 16 << 20
# one document of so many, by its place, is encoded both ways and decoded again; the second number for few bytes of text


@dataclass(frozen=True)
class Encoded:
    """What is in an encoded shard; of each pair, first the training part, then the part that is held out."""

    documents: tuple[int, int]
    tokens: tuple[int, int]
    bytes: tuple[int, int]  # of text
    tried: int  # documents decoded again
    same: int  # of those, that came back as they were
    crc: int  # of tokens and lengths
    same_ids: bool  # whether the faster encoder gave the ids of the tokenizer, where both were tried


class ShardEncoder:
    """Encodes the shards of one directory of work.

    Args:
        directory: where the spool, the tokenizer and what is dropped lie; all of them finished.
        cut: documents with a place below it are held out.
        fast: whether to use the faster encoder, where there is one.
    """

    def __init__(self, directory: Path, *, cut: int, fast: bool) -> None:
        self._directory = directory
        self._cut = np.uint64(cut)
        self._shards = list(read_spool(directory / SPOOL))
        self._tokenizer = load_tokenizer(directory / TOKENIZER)
        self._fast = fast_encoder(self._tokenizer).encode if fast else None
        self._one_of = _SPOT_CHECK if self._shards[-1].bytes > _FEW else _SPOT_CHECK_FEW
        self._is_tokenized = is_tokenized(directory)
        self._end = np.array([end_of_text(self._tokenizer)], dtype=np.uint32)
        self._dtype = token_dtype(vocabulary_size(self._tokenizer))

    def encode(self, number: int) -> Encoded:
        """Encode one shard of the spool; its files are written unless the two encoders differ.

        Raises:
            OSError: the disk is full, or the like.
        """
        part = rows_of(self._directory / SPOOL, self._shards, number)
        kept = kept_of(self._directory, part)
        texts = texts_of(self._directory / SPOOL, self._shards[number], part)
        rows = part.rows[kept]
        records = [text for text, keep in zip(texts, kept, strict=True) if keep]
        if self._is_tokenized:
            return self._take_ids(number, rows=rows, records=records)
        documents = [record.decode() for record in records]
        ids = [one.ids for one in encode(self._fast or batch_encoder(self._tokenizer), documents)]
        tried = [index for index, place in enumerate(rows["place"].tolist()) if place % self._one_of == 0]
        if self._fast is not None and differs(self._tokenizer, self._fast, [documents[index] for index in tried]):
            nothing = (0, 0)
            return Encoded(nothing, nothing, nothing, tried=0, same=0, crc=0, same_ids=False)
        same = sum(self._decode(ids[index]) == documents[index] for index in tried)
        sizes = rows["bytes"].astype(np.int64)
        return self._write(number, places=rows["place"], sizes=sizes, ids=ids, tried=len(tried), same=same)

    def _take_ids(self, number: int, *, rows: npt.NDArray[Any], records: list[bytes]) -> Encoded:
        ids = [np.frombuffer(record, dtype="<u4") for record in records]
        limit = vocabulary_size(self._tokenizer)
        largest = max((int(one.max()) for one in ids), default=0)
        if largest >= limit:
            raise DataError(
                f"data.text holds the token id {largest:,}, but data.tokenizer has ids below {limit:,}: it is not the "
                "tokenizer that made these token files"
            )
        ids = [one[:-1] if one[-1] == self._end[0] else one for one in ids]
        text_of = text_reader(self._directory)
        sizes = np.array([len(text_of(one.tobytes())) for one in ids], dtype=np.int64)
        return self._write(number, places=rows["place"], sizes=sizes, ids=ids, tried=0, same=0)

    def _write(
        self,
        number: int,
        *,
        places: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.int64],
        ids: list[npt.NDArray[np.uint32]],
        tried: int,
        same: int,
    ) -> Encoded:
        held_out = places < self._cut
        train = ~held_out
        order = [*np.flatnonzero(train).tolist(), *np.flatnonzero(held_out).tolist()]
        pieces = [piece for index in order for piece in (ids[index], self._end)] or [self._end[:0]]
        tokens = np.concatenate(pieces).astype(self._dtype)
        lengths = np.array([len(ids[index]) + 1 for index in order], dtype=np.uint32)
        num_train = int(train.sum())
        train_tokens, train_bytes = int(lengths[:num_train].sum()), int(sizes[train].sum())
        result = Encoded(
            documents=(num_train, len(order) - num_train),
            tokens=(train_tokens, len(tokens) - train_tokens),
            bytes=(train_bytes, int(sizes.sum()) - train_bytes),
            tried=tried,
            same=same,
            crc=checksum(tokens, lengths),
            same_ids=True,
        )
        bin_path, rows_path, about = encoded_files(self._directory, number)
        tokens.tofile(bin_path)
        np.save(rows_path, lengths, allow_pickle=False)
        write_json(about, asdict(result))
        return result

    def _decode(self, ids: npt.NDArray[np.uint32]) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text


def is_tokenized(directory: Path) -> bool:
    """Whether the spool of a directory of work holds token ids, not text."""
    plan = read_json(directory / PLAN)
    return plan is not None and bool(plan["tokenized"])


def text_reader(directory: Path) -> Callable[[bytes], bytes]:
    """From a document of the spool to its UTF-8 text."""
    if not is_tokenized(directory):
        return lambda record: record
    tokenizer = load_tokenizer(directory / TOKENIZER)

    def decode(record: bytes) -> bytes:
        ids = np.frombuffer(record, dtype="<u4").tolist()
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text.encode()

    return decode


def encoded_files(directory: Path, number: int) -> tuple[Path, Path, Path]:
    """The files of an encoded shard: tokens, lengths, and what ``Encoded`` says."""
    stem = directory / ENCODED / f"{number:06}"
    return stem.with_suffix(".bin"), stem.with_suffix(".rows.npy"), stem.with_suffix(".json")


def checksum(tokens: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> int:
    """crc32 of the content of an encoded shard."""
    return zlib.crc32(lengths.data, zlib.crc32(tokens.data))


def measure_baselines(directory: Path) -> dict[str, float]:
    """Bits per byte of the two plain models, on the beginnings of the text that lie in the directory of work."""
    train, held_out = ((directory / name).read_bytes() for name in BASELINE_TEXT)
    return {"xz": xz_bits_per_byte(held_out), "trigram": trigram_bits_per_byte(train, held_out)}


def digest_shard(directory: Path, shards: list[Shard], number: int) -> None:
    """Put the MinHash of each document of a shard where it belongs among those of all."""
    part = rows_of(directory / SPOOL, shards, number)
    texts = [text.decode() for text in texts_of(directory / SPOOL, shards[number], part)]
    found = np.load(directory / DIGESTS, mmap_mode="r+", allow_pickle=False)
    found[part.first : part.first + len(texts)] = digests(texts)
    found.flush()


def kept_of(directory: Path, part: ShardRows) -> npt.NDArray[np.bool_]:
    """[documents of the shard], False for duplicates."""
    if not (directory / DROPPED).exists():
        return np.ones(len(part.rows), dtype=np.bool_)
    dropped = np.load(directory / DROPPED, mmap_mode="r", allow_pickle=False)
    return ~np.asarray(dropped[part.first : part.first + len(part.rows)], dtype=np.bool_)


class _Worker:
    """Does the tasks of one directory of work."""

    def __init__(self) -> None:
        self._encoder: ShardEncoder | None = None
        self._shards: list[Shard] | None = None

    def do(self, task: dict[str, Any]) -> dict[str, Any]:
        directory = Path(task["directory"])
        if task["what"] == "baselines":
            return measure_baselines(directory)
        if task["what"] == "digest":
            if self._shards is None:
                self._shards = list(read_spool(directory / SPOOL))
            digest_shard(directory, self._shards, task["shard"])
            return {}
        if self._encoder is None:
            self._encoder = ShardEncoder(directory, cut=task["cut"], fast=task["fast"])
        return asdict(self._encoder.encode(task["shard"]))


if __name__ == "__main__":
    do_tasks(_Worker().do)
