"""Files of values: digested on the way to the disk, and read straight into place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

_BLOCK = 8 << 20
"""Bytes of one write."""

_VALUES = b"archive/data/0"
_HEADER = struct.Struct("<4sHHHHHIIIHH")


def on_storage_of_its_own(view: Tensor) -> Tensor:
    """The same memory, as a tensor that ends where its storage does.

    torch.save writes whole storages: of a view into a longer one, all of that.
    """
    if not view.is_cpu:
        return view
    return torch.from_numpy(view.view(torch.uint8).numpy()).view(view.dtype)


@contextlib.contextmanager
def digested_stream(path: Path) -> Iterator[DigestedStream]:
    """A file that is on the disk when it is closed, digested on the way there, so that nothing is read again.

    Raises:
        OSError: it cannot be written.
    """
    stream = DigestedStream(path)
    try:
        yield stream
        stream.finish()
    finally:
        stream.release()


class DigestedStream(io.RawIOBase):
    """A file written front to back in blocks, past the page cache where the file system allows it.

    One thread digests and fills a block while another writes the one before; both leave Python's lock to the training
    thread. Through the page cache the same bytes would be copied once more, and wait until the end to be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.size, self._digest = 0, xxhash.xxh128()
        self._blocks = [mmap.mmap(-1, _BLOCK) for _ in range(3)]
        self._arrays = [np.frombuffer(block, dtype=np.uint8) for block in self._blocks]
        self._busy: list[Future[None] | None] = [None] * len(self._blocks)
        self._current, self._filled = 0, 0
        self._writer = ThreadPoolExecutor(1, "write")
        # last: where there is no memory for the blocks, nobody would close it
        self._file = open_direct(path)

    def write(self, data: Any) -> int:
        rest = np.frombuffer(data, dtype=np.uint8)
        self.size += rest.nbytes
        while rest.nbytes:
            taken = min(rest.nbytes, _BLOCK - self._filled)
            self._digest.update(rest[:taken])
            np.copyto(self._arrays[self._current][self._filled : self._filled + taken], rest[:taken])
            self._filled, rest = self._filled + taken, rest[taken:]
            if self._filled == _BLOCK:
                self._send()
        return len(data)

    def digest(self) -> str:
        """XXH128 of what was written, in hexadecimal digits."""
        return self._digest.hexdigest()

    def finish(self) -> None:
        """Write what is left, and wait until all is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self._filled:
            self._send()
        for block in range(len(self._blocks)):
            self._wait(block)
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)

    def release(self) -> None:
        """Let go of file and threads."""
        self._writer.shutdown(cancel_futures=True)
        os.close(self._file)

    def _send(self) -> None:
        block = memoryview(self._blocks[self._current])
        # direct writes are of whole pages; what is too much is cut off at the end
        whole = -(-self._filled // mmap.PAGESIZE) * mmap.PAGESIZE
        self._busy[self._current] = self._writer.submit(_write_all, self._file, block[:whole])
        self._current, self._filled = (self._current + 1) % len(self._blocks), 0
        self._wait(self._current)

    def _wait(self, block: int) -> None:
        if (busy := self._busy[block]) is not None:
            busy.result()


def open_direct(path: Path) -> int:
    """A new file that is written past the page cache, in whole pages from memory that begins at one; through it where
    the file system cannot.

    Raises:
        OSError: it cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)  # a file system without direct writes


def _write_all(file: int, data: memoryview) -> None:
    try:
        data = data[os.write(file, data) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    if data:
        # a direct write that falls short (a full disk, a limit) leaves the next one at no whole page, or is refused for
        # its size: what is not direct goes on, or tells the cause
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))
    while data:
        data = data[os.write(file, data) :]


@dataclass(frozen=True)
class Span:
    """Values that torch.save has written, and where they go."""

    path: Path
    target: Tensor
    """1-D; on the host, contiguous and of the saved dtype it is read into directly."""
    archive: tuple[int, int]
    """Where torch.save began in the file, and how many bytes it wrote: a zip archive in which the values lie
    uncompressed and in one piece."""
    first: int
    """Index of the first value to read."""
    dtype: torch.dtype
    """Of the saved values."""


def read_spans(spans: Iterable[Span]) -> None:
    """Fill tensors from files, each front to back, without a copy and without unpickling any of them.

    Two files are read at once: what one core can move may be less than what comes from the disk.

    Raises:
        ValueError: a file or an archive ends before its values do.
        OSError: a file cannot be read.
    """
    ordered = sorted(spans, key=lambda span: (span.path, span.archive, span.first))
    of_files = [list(each) for _, each in itertools.groupby(ordered, key=lambda span: span.path)]
    if all(span.target.is_cpu for span in ordered):
        with ThreadPoolExecutor(2, "read") as pool:
            list(pool.map(_read_file, of_files))
    else:  # a thread whose device is not set would open a context on the first GPU
        list(map(_read_file, of_files))


def _read_file(spans: list[Span]) -> None:
    with spans[0].path.open("rb", buffering=0) as file:
        for span in spans:
            _read(file, span)


def _read(file: io.FileIO, span: Span) -> None:
    target, (offset, length) = span.target, span.archive
    is_in_place = target.is_cpu and target.is_contiguous() and target.dtype == span.dtype
    values = target if is_in_place else torch.empty(target.shape, dtype=span.dtype)
    begin = _begin(file, offset, length) + span.first * span.dtype.itemsize
    if (end := begin + values.nbytes) > length:
        raise ValueError(f"{span.path} holds {length:,} bytes of a tensor that must end at {end:,}")
    file.seek(offset + begin)
    rest = memoryview(values.view(torch.uint8).numpy())
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(f"{span.path} ends in the middle of a tensor")
        rest = rest[count:]
    if values is not target:
        target.copy_(values)


def _begin(file: io.FileIO, offset: int, length: int) -> int:
    """Where the values begin in an archive."""
    # the directory of a zip file lies at its end: to look there first would make the kernel read ahead in vain, so
    # the values are sought by the header before them (PKWARE's APPNOTE 4.3.7), which torch writes in the first bytes
    file.seek(offset)
    head = file.read(min(1024, length))
    at = head.find(_VALUES) - _HEADER.size
    if at >= 0:
        signature, _, _, method, *_, name_size, extra_size = _HEADER.unpack_from(head, at)
        if (signature, method, name_size) == (b"PK\x03\x04", 0, len(_VALUES)):
            return at + _HEADER.size + name_size + extra_size
    return int(torch._C.PyTorchFileReader(_Window(file, offset, length)).get_record_offset("data/0"))


class _Window(io.RawIOBase):
    """Part of a file, read as if it were all of one."""

    def __init__(self, file: io.FileIO, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = min(max(0, base + offset), self._length)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: self._length - self._at]) or 0
        self._at += count
        return count

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
