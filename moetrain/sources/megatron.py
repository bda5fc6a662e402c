"""Token files of Megatron-LM (``PREFIX.bin`` and ``PREFIX.idx``), read as they are.

    .idx   "MMIDIDX\\0\\0", uint64 1, uint8 kind of number, uint64 sequences, uint64 entries of the document index,
           int32 length of each sequence, int64 place of each in the .bin in bytes,
           int64 document index: the sequences where documents begin, and the end of the last
    .bin   the ids of one sequence after the other

Little-endian. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (_IndexReader).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = len(_MAGIC) + 8 + 1 + 8 + 8
_KINDS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are fractions


def bin_of(index: Path) -> Path:
    """The file with the ids, for the one that tells where they lie."""
    return index.with_suffix(".bin")


def documents(index: Path) -> Iterator[npt.NDArray[np.int64]]:
    """The ids of each document, in order.

    Raises:
        DataError: a file is missing, damaged, or holds no token ids.
    """
    path = bin_of(index)
    if not path.is_file():
        raise DataError(f"{index} needs {path.name} beside it, which is not there: copy both")
    kind, lengths, places, starts = _read_index(index)
    size = path.stat().st_size
    if len(lengths) and int((places + lengths.astype(np.int64) * kind.itemsize).max()) > size:
        raise DataError(f"{path} has {size:,} bytes, fewer than {index.name} tells of: it is cut short, copy it again")
    tokens = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)
    for first, last in itertools.pairwise(starts.tolist()):
        pieces = [
            tokens[place : place + length * kind.itemsize].view(kind)
            for place, length in zip(places[first:last].tolist(), lengths[first:last].tolist(), strict=True)
        ]
        yield np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)


def _read_index(
    index: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    with open(index, "rb") as file:
        header = file.read(_HEADER)
    if not header.startswith(_MAGIC) or len(header) < _HEADER:
        raise DataError(
            f"{index} is no index of Megatron's (it does not begin with MMIDIDX): leave it out of data.text"
        )
    version = int.from_bytes(header[9:17], "little")
    kind = _KINDS.get(header[17])
    if version != 1 or kind is None:
        raise DataError(
            f"{index} has version {version} and numbers of kind {header[17]}: only ids of version 1 are read"
        )
    sequences, entries = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    needed = _HEADER + 12 * sequences + 8 * entries
    size = index.stat().st_size
    if size < needed or entries < 1:
        raise DataError(f"{index} has {size:,} bytes, but tells of {needed:,}: it is cut short, copy it again")
    raw = np.memmap(index, dtype=np.uint8, mode="r")
    ends = np.cumsum([_HEADER, 4 * sequences, 8 * sequences, 8 * entries])
    lengths, places, starts = (raw[start:end] for start, end in itertools.pairwise(ends.tolist()))
    found = np.dtype(kind), lengths.view("<i4"), places.view("<i8"), starts.view("<i8")
    if int(found[3][-1]) > sequences or (np.diff(found[3]) < 0).any():
        raise DataError(f"{index} is damaged: its documents do not fit its sequences, copy it again")
    return found
