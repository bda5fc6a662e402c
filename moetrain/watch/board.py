"""RUN_DIR/watch: each rank's file with its whereabouts, written over and over in place. No torch.

Files and not messages: a rank that hangs can still be read about, by anybody, whoever else has stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = "watch"
_BYTES = 1024  # one length for every beat, so that a shorter one covers the one before


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last said of itself."""

    rank: int
    host: str
    pid: int
    beat: int
    """Grows with every beat, as long as the process runs."""
    count: int
    """Marks passed (``watch.progress``): the same number is the same place on every rank."""
    step: int
    place: str
    """Where it is, in words."""
    waits: bool
    """In a collective."""
    own_seconds: float | None = None
    """A usual time of its own work in a step, without waiting; None: not measured yet."""
    device_bytes: int | None = None
    """Memory of its GPU; None: it has none."""


class Board:
    """This rank's file.

    Args:
        run_dir: of the run, on a file system that all ranks see.
    """

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        directory = run_dir / DIRECTORY
        directory.mkdir(exist_ok=True)
        self.rank, self.host, self.pid = rank, socket.gethostname(), os.getpid()
        self._file = os.open(_path(run_dir, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, beat: Beat) -> None:
        """Say where this rank is."""
        os.pwrite(self._file, json.dumps(asdict(beat)).encode()[:_BYTES].ljust(_BYTES), 0)


def read_beats(run_dir: Path, *, world_size: int) -> list[Beat | None]:
    """What each rank last said; None for one that has said nothing."""
    return [_read(_path(run_dir, rank)) for rank in range(world_size)]


def furthest_step(beats: Iterable[Beat | None]) -> int | None:
    """The step that the run was at; None: no rank got as far as to say."""
    return max((each.step for each in beats if each is not None), default=None)


def claim(run_dir: Path) -> bool:
    """Whether this process is the first to ask: the one that speaks for all about this start's end."""
    try:
        os.close(os.open(run_dir / DIRECTORY / "verdict", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        return False
    return True


def clear(run_dir: Path) -> None:
    """Forget an earlier start; while no rank runs."""
    shutil.rmtree(run_dir / DIRECTORY, ignore_errors=True)


def _path(run_dir: Path, rank: int) -> Path:
    return run_dir / DIRECTORY / f"rank_{rank:05d}.json"


def _read(path: Path) -> Beat | None:
    for _ in range(3):  # it may be in the middle of a write
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Beat(**json.loads(path.read_bytes()))
    return None
