"""The tensors of a checkpoint as one process reads them: by global name, in blocks, whatever layout wrote them.

torch.distributed.checkpoint reads a stored interval whole, which for the experts of a large model is more than a login
node has. Here only the index is taken from it; values are read where they lie in the files, a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from moetrain.checkpoint.files import Span, read_spans
from moetrain.checkpoint.state import read_index
from moetrain.errors import CheckpointError

BLOCK = 1 << 22
"""Elements read at once."""


@dataclass(frozen=True)
class Piece:
    """One stored interval of a tensor."""

    offset: int
    """Where it begins in the flattened global tensor, elements."""
    numel: int
    file: str
    position: int
    """Where its record begins in the file, bytes."""
    length: int
    """Of the record, bytes; the values and some 1.3 KB around them."""

    @property
    def end(self) -> int:
        """The element after its last."""
        return self.offset + self.numel


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor, as the index tells of it."""

    numel: int
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    """In the order of their offsets."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.numel * self.dtype.itemsize

    def gaps(self) -> list[tuple[int, int]]:
        """Elements that no interval holds, as (begin, end)."""
        found, reached = [], 0
        for piece in self.pieces:
            if piece.offset > reached:
                found.append((reached, piece.offset))
            reached = max(reached, piece.end)
        if reached < self.numel:
            found.append((reached, self.numel))
        return found

    def overlaps(self) -> list[tuple[int, int]]:
        """Elements that several intervals hold, or that lie past the tensor's end, as (begin, end)."""
        found, reached = [], 0
        for piece in self.pieces:
            if piece.offset < min(reached, piece.end):
                found.append((piece.offset, min(reached, piece.end)))
            reached = max(reached, piece.end)
        if reached > self.numel:
            found.append((self.numel, reached))
        return found


class Stored:
    """The tensors of one checkpoint.

    Attributes:
        tensors: by global name, e.g. ``blocks.0.feed_forward.experts.w_in/exp_avg``.

    Raises:
        CheckpointError: the index cannot be read, or is not one of ours.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = dict(_tensors(directory))

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Elements ``begin`` to ``end`` of the flattened tensor, 1-D, in the dtype they are stored in.

        Raises:
            CheckpointError: a file is missing, cut short or unreadable there, or no interval holds an element.
        """
        tensor = self.tensors[name]
        out = torch.empty(end - begin, dtype=tensor.dtype)
        reached = begin
        for piece in tensor.pieces:
            if piece.offset <= reached < piece.end and reached < end:
                stop = min(end, piece.end)
                self._fill(out[reached - begin : stop - begin], piece, skip=reached - piece.offset)
                reached = stop
        if reached < end:
            raise CheckpointError(f"no interval holds element {reached:,} of {name}")
        return out

    def _fill(self, out: Tensor, piece: Piece, *, skip: int) -> None:
        path = self.directory / piece.file
        try:
            read_spans([Span(path, out, archive=(piece.position, piece.length), first=skip, dtype=out.dtype)])
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read at byte {piece.position:,}: {error}") from None


def blocks(numel: int, *, groups: int = 1) -> Iterator[tuple[int, int]]:
    """(begin, end) of the blocks to read a tensor by.

    Args:
        groups: equal parts that no block may cross: the experts that lead a tensor.
    """
    part = numel // groups
    for start in range(0, numel, part) if part else ():
        yield from ((start + at, start + min(at + BLOCK, part)) for at in range(0, part, BLOCK))


def _tensors(directory: Path) -> Iterator[tuple[str, StoredTensor]]:
    index = read_index(directory)
    records = index.storage_data or {}
    for name, found in sorted(index.state_dict_metadata.items()):
        if not isinstance(found, TensorStorageMetadata) or len(found.size) != 1:
            raise CheckpointError(f"{directory / '.metadata'}: {name} is no flattened tensor")
        pieces = []
        for chunk in found.chunks:
            record = records.get(MetadataIndex(name, chunk.offsets))
            if record is None or record.transform_descriptors:
                raise CheckpointError(f"{directory / '.metadata'}: an interval of {name} lies in no file of ours")
            pieces.append(Piece(offset=chunk.offsets[0], numel=math.prod(chunk.sizes), file=record.relative_path,
                                position=record.offset, length=record.length))  # fmt: skip
        pieces.sort(key=lambda piece: (piece.offset, piece.numel))
        yield name, StoredTensor(numel=found.size[0], dtype=found.properties.dtype, pieces=tuple(pieces))
