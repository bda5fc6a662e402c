"""Token files: a prepared directory, as it lies on disk.

train.bin  held_out.bin                       token ids, every document followed by the end-of-text token;
                                              little-endian uint16 if the vocabulary has at most 65,536 entries,
                                              else uint32
train.documents.npy  held_out.documents.npy   the document index: int64, where each document starts, in tokens
tokenizer.json                                what made the ids
meta.json                                     counts, digests, sources, baselines; written last, so a directory
                                              without it is an unfinished one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.tokenizer import fingerprint, load_tokenizer
from moetrain.errors import DataError

FORMAT_VERSION = 2
SPLITS = ("train", "held_out")
TOKENIZER = "tokenizer.json"
META = "meta.json"
_SYNC_EVERY = 32 << 20  # bytes of tokens that are brought to the disk together
_NPY_HEADER = 128  # bytes before the numbers of a .npy file of one dimension
FILES = frozenset({TOKENIZER, META} | {f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ".documents.npy")})


@dataclass(frozen=True)
class Split:
    """What ``meta.json`` says about one split."""

    documents: int
    tokens: int  # with the end-of-text tokens
    bytes: int  # of UTF-8 text, without any end-of-text token: the denominator of bits per byte
    sha256: str  # of the .bin file
    documents_sha256: str  # of the .documents.npy file


@dataclass(frozen=True)
class SourceFile:
    """A file that the text came from."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Baselines:
    """What needs no training, on the held-out text, in bits per byte (see ``baselines.py``)."""

    xz: float
    trigram: float
    train_bytes: int  # of training text that the trigram counts
    held_out_bytes: int  # of held-out text that both are measured on
    truncated: bool  # whether either is only the beginning of that text


@dataclass(frozen=True)
class RoundTrip:
    """Of the documents that were tried, how many come back from their tokens as they were."""

    tried: int
    same: int


@dataclass(frozen=True)
class Meta:
    """All of ``meta.json``."""

    format_version: int
    vocab_size: int  # ids are below it
    end_of_text: int  # id of the token that ends a document
    tokenizer_fingerprint: str
    empty_documents: int  # passed over
    train: Split
    held_out: Split
    sources: tuple[SourceFile, ...]
    baselines: Baselines
    dropped: dict[str, int] = field(default_factory=dict)  # left out as too short, too long, or duplicates
    round_trip: RoundTrip = RoundTrip(tried=0, same=0)


@dataclass(frozen=True)
class TokenFile:
    """The tokens of one split, read from disk as they are needed."""

    path: Path
    tokens: np.memmap[Any, np.dtype[np.unsignedinteger[Any]]]  # [num_tokens]
    documents: npt.NDArray[np.int64]  # [num_documents], start of each
    num_bytes: int  # of UTF-8 text

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    def frequencies(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """How often each token id occurs among the first 2^26 tokens, [vocab_size]."""
        return np.bincount(self.tokens[: 1 << 26], minlength=vocab_size)


@dataclass(frozen=True)
class Prepared:
    """A whole prepared directory."""

    directory: Path
    tokenizer_path: Path
    train: TokenFile
    held_out: TokenFile
    meta: Meta

    @property
    def vocab_size(self) -> int:
        """Ids are below it; ``model.vocab_size`` must be at least this."""
        return self.meta.vocab_size

    def digests(self) -> dict[str, str]:
        """What a model trained on this must find again: its tokens and their meaning."""
        return {
            "training text": self.meta.train.sha256,
            "held-out text": self.meta.held_out.sha256,
            "tokenizer": self.meta.tokenizer_fingerprint,
        }


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The type of the ids in a .bin file."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def open_prepared(directory: Path, *, verify: bool = False) -> Prepared:
    """Open a prepared directory.

    Args:
        directory: what ``prepare`` wrote.
        verify: read every file and compare its sha256; without it only names, sizes and counts are checked.

    Raises:
        DataError: the directory is missing, unfinished, of another format version, or a file does not fit its meta.
    """
    meta = read_meta(directory)
    tokenizer_path = directory / TOKENIZER
    if not tokenizer_path.is_file():
        raise DataError(f"{tokenizer_path} is missing: {_redo(directory)}")
    if verify:
        _check_tokenizer(tokenizer_path, meta=meta)
    return Prepared(
        directory=directory,
        tokenizer_path=tokenizer_path,
        train=_open_split(directory, "train", meta=meta, verify=verify),
        held_out=_open_split(directory, "held_out", meta=meta, verify=verify),
        meta=meta,
    )


def read_meta(directory: Path) -> Meta:
    """``meta.json`` of a prepared directory.

    Raises:
        DataError: it is missing, unreadable, or of another format version.
    """
    path = directory / META
    if not path.is_file():
        what = "is an unfinished one (it has no meta.json)" if directory.is_dir() else "does not exist"
        raise DataError(f"the prepared directory {directory} {what}: {_redo(directory)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): {_redo(directory)}") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, but this moetrain reads version {FORMAT_VERSION}: {_redo(directory)}"
        )
    try:
        return Meta(
            **values
            | {split: Split(**values[split]) for split in SPLITS}
            | {"sources": tuple(SourceFile(**source) for source in values["sources"])}
            | {"baselines": Baselines(**values["baselines"]), "round_trip": RoundTrip(**values["round_trip"])}
        )
    except (TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}): {_redo(directory)}") from error


def was_touched(directory: Path) -> bool:
    """Whether a file may be another than when ``meta.json`` was written, or ``mark_compared`` called.

    By the times of change that the file system keeps (ctime), which no program can set back.
    """
    if not (directory / META).is_file():
        return False
    known = (directory / META).stat().st_ctime_ns
    return any(path.stat().st_ctime_ns > known for path in directory.iterdir())


def mark_compared(directory: Path) -> None:
    """Every file is what ``meta.json`` tells: none is touched, until one changes again."""
    with contextlib.suppress(OSError):  # not ours to write: it is compared again
        os.utime(directory / META)


def write_meta(directory: Path, *, meta: Meta) -> None:
    """Write ``meta.json``, the last file of a directory, by way of a file beside it."""
    beside = directory / f"{META}.tmp"
    with open(beside, "w", encoding="utf-8") as file:
        json.dump(asdict(meta), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, directory / META)


class SplitWriter:
    """Writes the files of one split; nothing of them stays in memory.

    Args:
        directory: where to; ``{split}.bin`` and ``{split}.documents.npy`` are begun anew.
        split: one of ``SPLITS``.
        vocab_size: tells the width of an id, see ``token_dtype``.
    """

    def __init__(self, directory: Path, *, split: str, vocab_size: int) -> None:
        self._dtype = token_dtype(vocab_size)
        self._starts_path = directory / f"{split}.documents.npy"
        self._file = open(directory / f"{split}.bin", "wb")  # noqa: SIM115 (closed in __exit__)
        self._starts = open(self._starts_path, "wb")  # noqa: SIM115
        self._starts.write(bytes(_NPY_HEADER))
        self._digest = hashlib.sha256()
        self._tokens = self._documents = self._bytes = self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(1, "sync")

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncer.shutdown()
        with self._starts, self._file:  # closed both, even if the first cannot be flushed
            pass

    def add(self, ids: npt.ArrayLike, *, num_bytes: int) -> None:
        """One document: its ids, the end-of-text token included, and how many bytes of UTF-8 text it was."""
        tokens = np.asarray(ids, dtype=self._dtype)
        self.add_many(tokens, lengths=np.array([len(tokens)]), num_bytes=num_bytes)

    def add_many(self, tokens: npt.NDArray[Any], *, lengths: npt.NDArray[Any], num_bytes: int) -> None:
        """Several documents, one after the other.

        Args:
            tokens: [sum of lengths], ids, each document ended by the end-of-text token.
            lengths: [documents], tokens of each.
            num_bytes: of UTF-8 text, of all of them.
        """
        assert lengths.sum() == len(tokens), (lengths.sum(), len(tokens))
        data = tokens.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._digest.update(data)
        starts = self._tokens + np.cumsum(lengths, dtype=np.int64) - lengths
        self._starts.write(starts.astype("<i8").tobytes())
        self._tokens += len(tokens)
        self._documents += len(lengths)
        self._bytes += num_bytes
        self._unsynced += len(data)
        # now, beside the work for the next ones: at the end everyone would wait for the disk
        if self._unsynced >= _SYNC_EVERY and (self._syncing is None or self._syncing.done()):
            self._bring_to_disk()

    def finish(self) -> Split:
        """Bring everything to the disk, and say what is there."""
        self._starts.seek(0)
        np.lib.format.write_array_header_1_0(
            self._starts, {"descr": "<i8", "fortran_order": False, "shape": (self._documents,)}
        )
        assert self._starts.tell() == _NPY_HEADER, "numpy pads its header so that the length may change in place"
        if self._syncing is not None:
            self._syncing.result()
        for file in (self._file, self._starts):
            file.flush()
            os.fsync(file.fileno())
        return Split(
            documents=self._documents,
            tokens=self._tokens,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            documents_sha256=file_sha256(self._starts_path),
        )

    def _bring_to_disk(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
        self._file.flush()
        self._syncing, self._unsynced = self._syncer.submit(os.fsync, self._file.fileno()), 0


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _open_split(directory: Path, split: str, *, meta: Meta, verify: bool) -> TokenFile:
    path, starts_path = directory / f"{split}.bin", directory / f"{split}.documents.npy"
    told: Split = getattr(meta, split)
    for file in (path, starts_path):
        if not file.is_file():
            raise DataError(f"{file} is missing: {_redo(directory)}")
    dtype = token_dtype(meta.vocab_size)
    size, expected = path.stat().st_size, told.tokens * dtype.itemsize
    if size != expected:
        raise DataError(f"{path} has {size:,} bytes, but {META} tells {expected:,}: {_redo(directory)}")
    try:
        starts = np.load(starts_path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{starts_path} is damaged ({error}): {_redo(directory)}") from error
    if starts.shape != (told.documents,) or starts.dtype != np.int64:
        raise DataError(
            f"{starts_path} holds {starts.dtype} {starts.shape}, but {META} tells {told.documents:,} documents: "
            + _redo(directory)
        )
    if verify:
        for file, digest in ((path, told.sha256), (starts_path, told.documents_sha256)):
            if file_sha256(file) != digest:
                raise DataError(f"{file} does not have the sha256 that {META} tells: {_redo(directory)}")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    return TokenFile(path=path, tokens=tokens, documents=starts, num_bytes=told.bytes)


def _check_tokenizer(path: Path, *, meta: Meta) -> None:
    if fingerprint(load_tokenizer(path)) != meta.tokenizer_fingerprint:
        raise DataError(f"{path} is not the tokenizer that made the tokens: {_redo(path.parent)}")


def _redo(directory: Path) -> str:
    return f"remove {directory} and prepare the data again, or copy it again from where it is whole"
