"""Values on their way to the disk and back."""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
import resource
import threading
import time
from pathlib import Path

import pytest
import torch
import xxhash

from moetrain.checkpoint.files import Span, digested_stream, on_storage_of_its_own, read_spans

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def values(dtype: torch.dtype, size: int = 1000) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_interval_is_read_from_the_middle_of_a_file(tmp_path, dtype):
    path, whole = tmp_path / "values", values(dtype)
    with path.open("wb") as file:
        file.write(b"x" * 777)
        torch.save(whole, file)
        length = file.tell() - 777
        file.write(b"y" * 100)
    for first, count in ((0, 1000), (0, 1), (999, 1), (333, 333), (5, 0)):
        for target_dtype in (dtype, torch.float64):
            target = torch.zeros(count + 2, dtype=target_dtype)
            read_spans([Span(path, target[1:-1], archive=(777, length), first=first, dtype=dtype)])
            assert torch.equal(target[1:-1], whole[first : first + count].to(target_dtype))
            assert target[0] == target[-1] == 0


def test_values_that_begin_where_torch_does_not_put_them_today_are_found(tmp_path):
    whole = torch.arange(100)
    torch.save({"long" * 1000: whole}, tmp_path / "values")
    target, length = torch.zeros(99, dtype=torch.int64), (tmp_path / "values").stat().st_size
    read_spans([Span(tmp_path / "values", target, archive=(0, length), first=1, dtype=torch.int64)])
    assert torch.equal(target, whole[1:])


@pytest.mark.parametrize(("first", "cut", "message"), [(900, 0, "must end at"), (0, 1000, None)])
def test_values_that_are_not_all_there_are_told(tmp_path, first, cut, message):
    path = tmp_path / "values"
    torch.save(values(torch.float32), path)
    length = path.stat().st_size
    path.write_bytes(path.read_bytes()[: length - cut])
    with pytest.raises((ValueError, RuntimeError), match=message):
        read_spans([Span(path, torch.zeros(1000), archive=(0, length), first=first, dtype=torch.float32)])


@pytest.mark.parametrize("size", [1, 3_000_000], ids=["small", "large"])
def test_the_digest_is_that_of_the_file(tmp_path, size):
    path = tmp_path / "values"
    with digested_stream(path) as stream:
        torch.save(values(torch.float32, size), stream)
        stream.write(b"the end")
    content = path.read_bytes()
    assert content.endswith(b"the end")
    assert (stream.size, stream.digest()) == (len(content), xxhash.xxh128(content).hexdigest())


def test_a_write_that_fails_is_told_when_the_file_ends():
    with pytest.raises(OSError, match="No space left"), digested_stream(Path("/dev/full")) as stream:
        stream.write(b"x" * 1_000_000)


def test_a_file_cut_short_in_the_middle_of_a_page_tells_the_cause_and_lets_go(tmp_path):
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, hard))  # as a disk that is full there
    content = b"x" * 30_000_000
    try:
        with pytest.raises(OSError, match="File too large"), digested_stream(tmp_path / "x") as s:
            s.write(content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "x").stat().st_size == 20_000_000
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == (descriptors, threads)


def test_without_memory_for_the_blocks_no_file_stays_open(tmp_path, monkeypatch):
    room = iter([mmap.mmap(-1, mmap.PAGESIZE)])

    def little(*_: int) -> mmap.mmap:
        for block in room:
            return block
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("moetrain.checkpoint.files.mmap.mmap", little)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Cannot allocate"), digested_stream(tmp_path / "x"):
        pass
    assert os.listdir("/proc/self/fd") == descriptors


def test_no_block_is_filled_anew_before_a_slow_disk_has_it(tmp_path, monkeypatch):
    write = os.write

    def slow(file: int, data: memoryview) -> int:
        time.sleep(0.05)
        return write(file, data)

    monkeypatch.setattr("moetrain.checkpoint.files.os.write", slow)
    content = os.urandom(40_000_000)
    with digested_stream(tmp_path / "x") as stream:
        stream.write(content)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("most", [0, 1_000_000, 4096], ids=["refuses", "falls short", "falls short at a page"])
def test_direct_writes_that_a_file_system_refuses_or_cuts_short_are_gone_on_with(tmp_path, monkeypatch, most):
    """No file system here does so after it has taken the flag, so the call is held to the rules of open(2)."""
    write = os.write

    def strict(file: int, data: memoryview) -> int:
        is_direct = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
        place = os.lseek(file, 0, os.SEEK_CUR)
        if is_direct and (most == 0 or len(data) % 4096 or place % 4096):
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(file, data[: most or None])

    monkeypatch.setattr("moetrain.checkpoint.files.os.write", strict)
    content = os.urandom(9_000_001)
    with digested_stream(tmp_path / "x") as stream:
        stream.write(content)
    assert (tmp_path / "x").read_bytes() == content
    assert stream.digest() == xxhash.xxh128(content).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_on_a_storage_of_its_own_is_the_same_memory_and_saved_alone(dtype):
    flat = values(dtype)
    view = flat.narrow(0, 100, 50)
    own = on_storage_of_its_own(view)
    assert own.data_ptr() == view.data_ptr()
    assert own.dtype == dtype
    assert own.untyped_storage().nbytes() == 50 * dtype.itemsize
    flat[100] = 7
    assert own[0] == 7
    buffer = io.BytesIO()
    torch.save(own, buffer)
    assert len(buffer.getvalue()) < 50 * dtype.itemsize + 2000
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), view)
