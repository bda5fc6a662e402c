"""RUN_DIR/incidents.jsonl: what went wrong in a run and what was done about it, a line each. No torch."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from moetrain.errors import DataError

INCIDENTS = "incidents.jsonl"


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One line."""

    time: float
    """Unix seconds."""
    step: int | None
    """Finished steps when it happened; None: not known."""
    kind: str
    """restart, smaller, gave_up, hang, slow_rank, slow_rank_over, not_finite, spike, spike_over or roll_back."""
    rank: int | None
    """Whose it is; None: of all, or not known."""
    what: str
    """What happened."""
    done: str
    """What was done about it."""


class Tell(Protocol):
    """Writes an incident down: ``Incidents.add``, or ``silence`` on every rank but the first."""

    def __call__(self, kind: str, *, step: int | None, rank: int | None, what: str, done: str) -> None: ...


def silence(kind: str, *, step: int | None, rank: int | None, what: str, done: str) -> None:
    """For the ranks that come to the same answer as the one that tells."""


class Incidents:
    """Appends to the incidents of a run; any process of the run may.

    Args:
        run_dir: it exists.
        say: shows a line to the user.
    """

    def __init__(self, run_dir: Path, *, say: Callable[[str], None]) -> None:
        self._path, self._say = run_dir / INCIDENTS, say

    def add(self, kind: str, *, step: int | None, rank: int | None, what: str, done: str) -> None:
        """Write one down, and say it."""
        incident = Incident(time=time.time(), step=step, kind=kind, rank=rank, what=what, done=done)
        line = (json.dumps(asdict(incident)) + "\n").encode()
        # one write at the end of the file: lines of processes that write at once do not mix
        handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            is_torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # by a disk that was full
            os.write(handle, b"\n" * is_torn + line)
        finally:
            os.close(handle)
        at = "" if step is None else f" at step {step:,}"
        self._say(f"incident{at}: {what}; {done}")


def read_incidents(run_dir: Path) -> list[Incident]:
    """The incidents of a run, oldest first; none where there is no file. A line that was cut short is left out.

    Raises:
        DataError: a line is whole, and not one of ours.
    """
    path = run_dir / INCIDENTS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        try:
            found.append(Incident(**entry))
        except TypeError as error:
            raise DataError(f"{path}, line {number}, is no incident ({error}): mend or remove the line") from error
    return found


def summary(incidents: list[Incident]) -> str:
    """How many there are of each kind, e.g. ``3 (2 not_finite, 1 roll_back)``."""
    kinds = Counter(each.kind for each in incidents)
    parts = ", ".join(f"{many} {kind.replace('_', ' ')}" for kind, many in kinds.most_common())
    return f"{len(incidents)} ({parts})" if incidents else "none"
