"""The host's memory."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Names of mallopt(3) in glibc."""


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors instead of giving it back to the system.

    A training step asks for the same large blocks again and again; glibc would map each anew, and the kernel would
    clear every page of it (docs/performance.md has what that costs). Memory is then held at its peak.

    Returns:
        Whether the C library could be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # no glibc
        return False
    wanted = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, (1 << 31) - 1), (_TOP_PAD, 1 << 26))
    return all(mallopt(name, value) for name, value in wanted)


def resident_bytes(*, peak: bool = False) -> int | None:
    """Memory of this process that is in RAM (proc(5), VmRSS), or the most that ever was (VmHWM); None: not Linux."""
    status = Path("/proc/self/status")
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return None if found is None else 1024 * int(found[1])
