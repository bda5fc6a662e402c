"""Files of values: digested on the way to the disk, and read straight into place."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from moetrain.checkpoint import store


def on_storage_of_its_own(view: Tensor) -> Tensor:
    """The same memory, as a tensor that ends where its storage does.

    torch.save writes whole storages, and so torch.distributed.checkpoint makes copies of views into longer ones, all of
    them at once: as much memory again as the state.
    """
    if not view.is_cpu:
        return view
    return torch.from_numpy(view.view(torch.uint8).numpy()).view(view.dtype)


class DigestedFiles(FileSystem):
    """Digests what is written on its way to the disk, so that nothing is read again."""

    def __init__(self) -> None:
        self.digests: list[store.FileDigest] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as file, ThreadPoolExecutor(1, thread_name_prefix="digest") as beside:
            stream = _DigestedStream(file, beside)
            yield stream
        self.digests.append(store.FileDigest(name=Path(path).name, size=stream.size, sha256=stream.sha256.hexdigest()))


class _DigestedStream(io.RawIOBase):
    """An open file that keeps the digest of what goes through it; torch writes front to back and never seeks."""

    def __init__(self, file: Any, beside: ThreadPoolExecutor) -> None:
        super().__init__()
        self._file, self._beside = file, beside
        self.size, self.sha256 = 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        # both leave Python's lock to the training thread; a small piece is not worth the hand-over
        digested = self._beside.submit(self.sha256.update, data) if len(data) > 1 << 18 else self.sha256.update(data)
        try:
            self._file.write(data)
        finally:
            if digested is not None:
                digested.result()
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())


def read_values(file: io.FileIO, target: Tensor, *, archive: tuple[int, int], first: int, dtype: torch.dtype) -> None:
    """Fill a tensor from what torch.save has written, without a copy and without unpickling any of it.

    Args:
        file: open, without a buffer.
        target: 1-D; on the host, contiguous and of the saved dtype it is read into directly.
        archive: where torch.save began in the file, and how many bytes it wrote: a zip archive in which the values lie
            uncompressed and in one piece.
        first: index of the first value to read.
        dtype: of the saved values.

    Raises:
        ValueError: the file or the archive ends before the values do.
    """
    is_in_place = target.is_cpu and target.is_contiguous() and target.dtype == dtype
    values = target if is_in_place else torch.empty(target.shape, dtype=dtype)
    offset, length = archive
    begin = torch._C.PyTorchFileReader(_Window(file, offset, length)).get_record_offset("data/0")
    begin += first * dtype.itemsize
    if begin + values.nbytes > length:
        raise ValueError(f"{file.name} holds {length:,} bytes of a tensor that must end at {begin + values.nbytes:,}")
    file.seek(offset + begin)
    rest = memoryview(values.view(torch.uint8).numpy())
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(f"{file.name} ends in the middle of a tensor")
        rest = rest[count:]
    if values is not target:
        target.copy_(values)


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
