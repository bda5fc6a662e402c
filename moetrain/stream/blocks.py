"""Blocks: the tokens of a stream as files, written in order while training reads them.

    training tokens   t0 t1 t2 t3 t4 t5 t6 ...         of one document after the other; S = sequence_length, here 2,
    block 0           t0 t1 t2 t3 t4                   and two sequences in a block
    block 1                       t4 t5 t6 t7 t8       begins on the last token of the one before, as sequences do

RUN_DIR/stream/
    opening/                 token files of the beginning of the text, tokenizer, meta.json (see opening.py)
    block_000000.bin         ids, little-endian uint16 or uint32, and a crc32 of them
    position                 how far the text is read: a line of JSON, then the ids that wait for their block
    wanted                   how many blocks training wants; the only file that it writes
    end.json                 the text is at its end: what is in it
    error.json               why there will be no more blocks
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from moetrain.config.schema import RunConfig
from moetrain.data.build import OPENING
from moetrain.data.corpus import TOKENIZER, read_meta, token_dtype
from moetrain.errors import DataError

ABOUT = "stream.json"
"""The file in the opening that says what the stream is made of."""

_CRC = np.dtype("<u4")
_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Shape:
    """How a stream is cut up. A pure function of the settings, so that every start and every rank cuts alike."""

    sequence_length: int
    sequences: int
    """In a block, but for the last one."""
    window: int
    """Blocks in a window, whose sequences are shuffled together; the first windows have 1, 2, 4, … of them, so that
    training need not wait for a whole one."""

    @staticmethod
    def of(*, sequence_length: int, block_tokens: int, window: int) -> Shape:
        """Blocks of about so many tokens, one sequence at least."""
        return Shape(sequence_length, max(1, block_tokens // sequence_length), window)

    @property
    def tokens(self) -> int:
        """From the beginning of a block to that of the next."""
        return self.sequences * self.sequence_length

    def first_block(self, window: int) -> int:
        """Of a window."""
        growing = (self.window - 1).bit_length()
        return (1 << min(window, growing)) - 1 + max(0, window - growing) * self.window

    def window_of(self, sequence: int) -> int:
        """The window that a sequence lies in."""
        block, growing = sequence // self.sequences, (self.window - 1).bit_length()
        if block < (1 << growing) - 1:
            return (block + 1).bit_length() - 1
        return growing + (block - (1 << growing) + 1) // self.window


@dataclass(frozen=True)
class Position:
    """How far the text is read."""

    blocks: int = 0
    """Written."""
    source: int = 0
    """The input where to read on."""
    row: int = 0
    """Documents of it that were read."""
    documents: int = 0
    """Whose tokens are in the blocks or wait for the next one."""
    bytes: int = 0
    """Of UTF-8 text, of the same."""
    held_out: int = 0
    """Documents that were passed over, as the hash of their text holds them out."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> documents."""


@dataclass(frozen=True)
class End:
    """What is in a text that was read to its end."""

    sequences: int
    tokens: int
    documents: int
    bytes: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class Fault:
    """Why there will be no more blocks."""

    kind: str
    """data: the user can mend it; lost: the process was killed; crash: a fault of moetrain's own."""
    message: str


class Blocks:
    """The files of a stream. Every one appears at once, whole.

    Args:
        run_dir: of the run.
        shape: how the tokens are cut up.
        dtype: of the ids.
    """

    def __init__(self, run_dir: Path, *, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.directory, self.shape, self.dtype = (run_dir / OPENING).parent, shape, dtype
        self._whole: set[int] = set()

    def path(self, number: int) -> Path:
        """Of a block."""
        return self.directory / f"block_{number:06d}.bin"

    def is_full(self, number: int) -> bool:
        """Whether a block is there, and not the shorter last one."""
        return self.has(number, sequences=self.shape.sequences)

    def has(self, number: int, *, sequences: int) -> bool:
        """Whether a block of so many sequences is there."""
        size = (sequences * self.shape.sequence_length + 1) * self.dtype.itemsize + _CRC.itemsize
        try:
            return self.path(number).stat().st_size == size
        except FileNotFoundError:
            return False

    def write(self, number: int, tokens: npt.NDArray[Any]) -> None:
        """A block: some sequences and the first token of the next one."""
        assert len(tokens) > 1
        assert (len(tokens) - 1) % self.shape.sequence_length == 0, len(tokens)
        data = tokens.astype(self.dtype, copy=False).tobytes()
        _replace(self.path(number), data + np.array([zlib.crc32(data)], dtype=_CRC).tobytes())

    def read(self, sequence: int) -> npt.NDArray[Any]:
        """[S+1]: a sequence of the stream.

        Raises:
            DataError: its block was removed or is damaged.
        """
        number, place = divmod(sequence, self.shape.sequences)
        if number not in self._whole:
            self._check(number)
            self._whole.add(number)
        length = self.shape.sequence_length
        # opened anew each time: a run may have more blocks than a process may have open files, or maps
        found = np.fromfile(
            self.path(number), dtype=self.dtype, count=length + 1, offset=place * length * self.dtype.itemsize
        )
        assert len(found) == length + 1, (sequence, len(found))
        return found

    def write_position(self, position: Position, waiting: npt.NDArray[Any]) -> None:
        """Where to go on after a restart, and the tokens that are in no block yet."""
        data = waiting.astype(self.dtype, copy=False).tobytes()
        about = asdict(position) | {"crc": zlib.crc32(data)}
        _replace(self.directory / "position", json.dumps(about).encode() + b"\n" + data)

    def read_position(self) -> tuple[Position, npt.NDArray[Any]]:
        """What ``write_position`` wrote last; the beginning where nothing is, or not all blocks before it are."""
        nothing = Position(), np.zeros(0, dtype=self.dtype)
        try:
            head, _, data = (self.directory / "position").read_bytes().partition(b"\n")
            values = json.loads(head)
            crc = values.pop("crc")
            position = Position(**values)
        except (OSError, ValueError, TypeError, KeyError):
            return nothing
        is_whole = zlib.crc32(data) == crc and all(map(self.is_full, range(position.blocks)))
        return (position, np.frombuffer(data, dtype=self.dtype)) if is_whole else nothing

    def want(self, blocks: int) -> None:
        """Ask for so many blocks, counted from the first."""
        _replace(self.directory / "wanted", str(blocks).encode(), sync=False)

    def wanted(self) -> int:
        """How many are asked for; none, while nobody has asked."""
        try:
            return int((self.directory / "wanted").read_bytes())
        except FileNotFoundError:
            return 0

    def write_end(self, end: End) -> None:
        """The last block is there."""
        _replace(self.directory / "end.json", json.dumps(asdict(end)).encode())

    def end(self) -> End | None:
        """What ``write_end`` wrote; None: the text goes on."""
        return _read_json(self.directory / "end.json", End)

    def write_fault(self, fault: Fault) -> None:
        """There will be no more blocks."""
        _replace(self.directory / "error.json", json.dumps(asdict(fault)).encode(), sync=False)

    def fault(self) -> Fault | None:
        """What ``write_fault`` wrote."""
        return _read_json(self.directory / "error.json", Fault)

    def forget_fault(self) -> None:
        """Before a new try."""
        (self.directory / "error.json").unlink(missing_ok=True)

    def _check(self, number: int) -> None:
        path = self.path(number)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}): the same command makes what is missing anew") from error
        data, crc = content[: -_CRC.itemsize], content[-_CRC.itemsize :]
        if len(data) < self.dtype.itemsize or zlib.crc32(data) != int.from_bytes(crc, "little"):
            raise DataError(
                f"{path} was damaged since it was written: remove it, and the same command makes it anew from the text"
            )


@dataclass(frozen=True)
class Stream:
    """A stream whose opening is there."""

    blocks: Blocks
    tokenizer: Path
    cut: int
    """Documents with a place below it are held out."""
    sizes: list[int]
    """Bytes of each input when it began."""


def open_again(run: RunConfig, run_dir: Path) -> Stream:
    """The stream of a run, without a look at its text.

    Raises:
        DataError: its opening is missing or damaged.
    """
    directory = run_dir / OPENING
    try:
        about = json.loads((directory / ABOUT).read_bytes())
        cut, sizes = int(about["cut"]), [int(size) for size in about["sizes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory / ABOUT} is damaged ({error}): remove {directory.parent}") from error
    shape = Shape.of(
        sequence_length=run.sequence_length,
        block_tokens=run.data.stream_block,
        window=run.data.stream_window,
    )
    blocks = Blocks(run_dir, shape=shape, dtype=token_dtype(read_meta(directory).vocab_size))
    return Stream(blocks, tokenizer=directory / TOKENIZER, cut=cut, sizes=sizes)


def _replace(path: Path, content: bytes, *, sync: bool = True) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    with open(beside, "wb") as file:
        file.write(content)
        if sync:  # a position must not reach the disk before the blocks that it counts
            file.flush()
            os.fsync(file.fileno())
    os.replace(beside, path)


def _read_json(path: Path, kind: Callable[..., _Kind]) -> _Kind | None:
    try:
        return kind(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove {path.parent}, and the stream begins anew") from error
