"""What is done to a piece or a shard: in this process, or as ``python -m moetrain.prepare.shards`` in several.

encoded/000000.bin       token ids, those of the training documents first, then those held out
encoded/000000.rows.npy  for each document in the same order, tokens (uint32)
encoded/000000.json      what ``Encoded`` says; written last

A worker process (``parallel.pool.do_tasks``) ends when its standard input does, so none stays behind when the process
that started it is killed.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.corpus import TOKENIZER, Baselines, token_dtype
from moetrain.data.tokenizer import (
    TokenIds,
    batch_encoder,
    encode,
    end_of_text,
    load_tokenizer,
    vocabulary_size,
)
from moetrain.errors import DataError
from moetrain.parallel.pool import Task, Tell, do_tasks
from moetrain.prepare.baselines import LIMITS, measure
from moetrain.prepare.reading import source_sha256, spool_piece
from moetrain.sources.duplicates import digests
from moetrain.sources.spool import Spool, read_json, read_spool, write_json
from moetrain.tokenization.fast import Fast, alike_texts, differs, fast_encoder, unicode_texts, vocabulary_texts

SPOOL, ENCODED, DROPPED, DIGESTS = "spool", "encoded", "dropped.npy", "digests.npy"
PLAN = "plan.json"

_SPOT_CHECK, _SPOT_CHECK_FEW, _FEW = 256, 8, 16 << 20
# one document of so many, by its place, is encoded both ways and decoded again; the second number for few bytes of text

_SAMPLE_SHARDS, _SAMPLE_BYTES = 32, 1 << 16  # what the faster encoder is tried on: so much of each of so many shards


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
        directory: where the tokenizer and what is dropped lie, both finished.
        spool: of it, finished.
        cut: documents with a place below it are held out.
        fast: whether to use the faster encoder, where there is one.
    """

    def __init__(self, directory: Path, *, spool: Spool, cut: int, fast: bool) -> None:
        self._directory, self._spool = directory, spool
        self._cut = np.uint64(cut)
        self._tokenizer = load_tokenizer(directory / TOKENIZER)
        faster = fast_encoder(self._tokenizer) if fast else Fast(None, None)
        self._fast, self._missing = faster.encode, faster.reason
        self._one_of = _SPOT_CHECK if spool.num_bytes > _FEW else _SPOT_CHECK_FEW
        self._is_tokenized = is_tokenized(directory)
        self._end = end_of_text(self._tokenizer)
        self._dtype = token_dtype(vocabulary_size(self._tokenizer))

    def prove(self) -> dict[str, Any]:
        """Try the faster encoder on all that can be tried once.

        Returns:
            ``same_ids``, whether it gives the ids of the tokenizer; ``missing``, why there is no faster one and the
            tokenizer does all, else None.
        """
        texts = (vocabulary_texts(self._tokenizer), unicode_texts(), alike_texts(), _sample(self._spool))
        fast = self._fast
        same = fast is None or not any(differs(self._tokenizer, fast, some) for some in texts)
        return {"same_ids": same, "missing": self._missing}

    def encode(self, index: int) -> Encoded:
        """Encode one shard of the spool; its files are written unless the two encoders differ.

        Raises:
            OSError: the disk is full, or the like.
        """
        rows = self._spool.rows(index)
        records = list(self._spool.texts(index, rows))
        kept = kept_of(self._directory, self._spool, index)
        if kept is not None:
            rows, records = rows[kept], [text for text, keep in zip(records, kept.tolist(), strict=True) if keep]
        if self._is_tokenized:
            return self._take_ids(index, rows=rows, records=records)
        documents = [record.decode() for record in records]
        found = encode(self._fast or batch_encoder(self._tokenizer), documents)
        tried = np.flatnonzero(rows["place"] % np.uint64(self._one_of) == 0).tolist()
        if self._fast is not None and differs(self._tokenizer, self._fast, [documents[number] for number in tried]):
            nothing = (0, 0)
            return Encoded(nothing, nothing, nothing, tried=0, same=0, crc=0, same_ids=False)
        ends = np.cumsum(found.lengths)
        same = sum(self._decode(found.ids[ends[n] - found.lengths[n] : ends[n]]) == documents[n] for n in tried)
        sizes = rows["bytes"].astype(np.int64)
        return self._write(index, places=rows["place"], sizes=sizes, found=found, tried=len(tried), same=same)

    def _take_ids(self, index: int, *, rows: npt.NDArray[Any], records: list[bytes]) -> Encoded:
        ids = [np.frombuffer(record, dtype="<u4") for record in records]
        limit = vocabulary_size(self._tokenizer)
        largest = max((int(one.max()) for one in ids), default=0)
        if largest >= limit:
            raise DataError(
                f"data.text holds the token id {largest:,}, but data.tokenizer has ids below {limit:,}: it is not the "
                "tokenizer that made these token files"
            )
        ids = [one[:-1] if one[-1] == self._end else one for one in ids]
        text_of = text_reader(self._directory)
        sizes = np.array([len(text_of(one.tobytes())) for one in ids], dtype=np.int64)
        flat = np.concatenate([np.zeros(0, dtype=np.uint32), *ids])
        found = TokenIds(flat, np.array([len(one) for one in ids], dtype=np.int64))
        return self._write(index, places=rows["place"], sizes=sizes, found=found, tried=0, same=0)

    def _write(
        self,
        index: int,
        *,
        places: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.int64],
        found: TokenIds,
        tried: int,
        same: int,
    ) -> Encoded:
        held_out = places < self._cut
        train = ~held_out
        ended = np.insert(found.ids.astype(self._dtype), np.cumsum(found.lengths), self._end)
        is_held_out = np.repeat(held_out, found.lengths + 1)
        tokens = np.concatenate([ended[~is_held_out], ended[is_held_out]])
        lengths = np.concatenate([found.lengths[train], found.lengths[held_out]]).astype(np.uint32) + np.uint32(1)
        num_train = int(train.sum())
        train_tokens, train_bytes = len(tokens) - int(is_held_out.sum()), int(sizes[train].sum())
        result = Encoded(
            documents=(num_train, len(lengths) - num_train),
            tokens=(train_tokens, len(tokens) - train_tokens),
            bytes=(train_bytes, int(sizes.sum()) - train_bytes),
            tried=tried,
            same=same,
            crc=checksum(tokens, lengths),
            same_ids=True,
        )
        bin_path, rows_path, about = encoded_files(self._directory, index)
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


def encoded_files(directory: Path, index: int) -> tuple[Path, Path, Path]:
    """The files of an encoded shard: tokens, lengths, and what ``Encoded`` says."""
    stem = directory / ENCODED / f"{index:06}"
    return stem.with_suffix(".bin"), stem.with_suffix(".rows.npy"), stem.with_suffix(".json")


def checksum(tokens: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> int:
    """crc32 of the content of an encoded shard."""
    return zlib.crc32(lengths.data, zlib.crc32(tokens.data))


def measure_baselines(directory: Path, spool: Spool, *, cut: int) -> Baselines:
    """The two plain models, on the beginnings of both parts of the text; documents below ``cut`` are held out."""
    text_of = text_reader(directory)
    train, held_out = texts = (bytearray(), bytearray())
    is_cut = False
    documents = (each for index in range(len(spool.shards)) for each in documents_of(directory, spool, index))
    for document, place in documents:
        part = 1 if place < cut else 0
        text, room = text_of(document), LIMITS[part] - len(texts[part])
        texts[part].extend(text[:room])
        is_cut |= len(text) > room
        if is_cut and all(len(text) == limit for text, limit in zip(texts, LIMITS, strict=True)):
            break
    return measure(bytes(train), bytes(held_out), truncated=is_cut)


def digest_shard(directory: Path, spool: Spool, index: int) -> None:
    """Put the MinHash of each document of a shard where it belongs among those of all."""
    texts = [text.decode() for text in spool.texts(index, spool.rows(index))]
    found = np.load(directory / DIGESTS, mmap_mode="r+", allow_pickle=False)
    first = spool.firsts[index]
    found[first : first + len(texts)] = digests(texts)
    found.flush()


def documents_of(directory: Path, spool: Spool, index: int) -> Iterator[tuple[bytes, int]]:
    """The documents of a shard that are kept, each with its place."""
    rows, kept = spool.rows(index), kept_of(directory, spool, index)
    marks = itertools.repeat(True, len(rows)) if kept is None else kept.tolist()
    for document, place, keep in zip(spool.texts(index, rows), rows["place"].tolist(), marks, strict=True):
        if keep:
            yield document, place


def kept_of(directory: Path, spool: Spool, index: int) -> npt.NDArray[np.bool_] | None:
    """[documents of the shard], False for duplicates; None where none are looked for."""
    if not (directory / DROPPED).exists():
        return None
    dropped = np.load(directory / DROPPED, mmap_mode="r", allow_pickle=False)
    first = spool.firsts[index]
    return ~np.asarray(dropped[first : first + spool.shards[index].documents], dtype=np.bool_)


def _sample(spool: Spool) -> Iterator[str]:
    """The beginnings of some shards, evenly spread over the corpus."""
    for index in range(0, len(spool.shards), max(1, len(spool.shards) // _SAMPLE_SHARDS)):
        size = 0
        for text in spool.texts(index, spool.rows(index)):
            if size + len(text) > _SAMPLE_BYTES and size:
                break
            size += len(text)
            yield text.decode()


class Worker:
    """Does the tasks of one directory of work, whose spool does not change once there are others than spooling."""

    def __init__(self) -> None:
        self._encoder: ShardEncoder | None = None
        self._spool: Spool | None = None

    def do(self, task: Task, tell: Tell) -> dict[str, Any]:
        """Do a task; returns the answer. Raises what the work raises."""
        directory = Path(task["directory"])
        match task["what"]:
            case "hash":
                return {"sha256": source_sha256(Path(task["file"]))}
            case "spool":
                spool_piece(directory / SPOOL, task, tell=tell)
                return {}
        if self._spool is None:
            self._spool = read_spool(directory / SPOOL)
        match task["what"]:
            case "digest":
                digest_shard(directory, self._spool, task["shard"])
                return {}
            case "baselines":
                return asdict(measure_baselines(directory, self._spool, cut=task["cut"]))
        if self._encoder is None:
            self._encoder = ShardEncoder(directory, spool=self._spool, cut=task["cut"], fast=task["fast"])
        if task["what"] == "prove":
            return self._encoder.prove()
        return asdict(self._encoder.encode(task["shard"]))


if __name__ == "__main__":
    do_tasks(Worker().do)
