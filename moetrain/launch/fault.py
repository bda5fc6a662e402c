"""Which rank was it? One error out of the many that one rank's death sets off.

A worker that fails by an exception writes RUN_DIR/log/rank_00001.error.json before it exits:
    {"rank": 1, "type": "ValueError", "message": "…", "user": false, "time": 1700000000.0}
``user`` is true for a fault the user can mend (a MoetrainError), ``time`` is in Unix seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain import errors
from moetrain.errors import ConfigError, LaunchError, LostError, MoetrainError
from moetrain.parallel.lifeline import STOPPED, error_path

LAST_LINES = 15
"""Lines of a log shown when a rank left no error file."""

# A rank killed by a signal is noticed up to one poll late, while the others' "connection closed" follows within
# milliseconds. An error file older than this, as seen from that moment, cannot be such a consequence.
_HEAD_START_SECONDS = 0.5

# of gloo, NCCL and CUDA, which raise nothing more special than a RuntimeError
_BROKEN = re.compile(
    r"connection (closed|reset|refused)|timed out|timeout|broken pipe|NCCL error|ECC error|unspecified launch failure",
    re.IGNORECASE,
)

_HINTS = {
    signal.SIGKILL: "often out of memory: lower batch.micro_batch or batch.sequence_length, or see the kernel's log",
    signal.SIGBUS: "often a full /dev/shm or disk",
}


class NodeLost(LostError):
    """Nodes of a run are gone: the machine, its network, or what ran there; the others have ended the run.

    Args:
        message: for the user.
        hosts: their names, as the hostfile or SLURM has them.
    """

    def __init__(self, message: str, *, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one worker ended."""

    rank: int
    code: int
    """Exit code; -N: killed by signal N."""
    by_us: bool
    """Whether the launcher sent the signal that ended it."""
    seen: float
    """When the launcher noticed, in Unix seconds."""
    log: Path
    log_start: int
    """Bytes in the log before this start; what is older belongs to another one."""
    ahead: float = 0.0
    """Seconds by which the clock of its machine is ahead of the first machine's."""

    @property
    def badly(self) -> bool:
        """Whether it failed: neither done, nor stopped on request, nor ended by the launcher."""
        return self.code not in (0, STOPPED) and not self.by_us


@dataclass(frozen=True, kw_only=True)
class _Report:
    rank: int
    type: str
    message: str
    user: bool
    time: float


def remove_old_errors(log_dir: Path) -> None:
    """Remove the error files of an earlier start."""
    for path in log_dir.glob("rank_*.error.json"):
        path.unlink(missing_ok=True)


def find_fault(ended: Sequence[Ended], *, log_dir: Path) -> MoetrainError:
    """The one error that brought the run down, ready to be raised.

    The cause is the rank killed by a signal that the launcher did not send, or else the one with the earliest error
    file, or else the first seen to end badly. Ranks that ended by the launcher's own signal are never it, unless they
    wrote an error file.

    Args:
        ended: every worker of the run; at least one of them ended badly, and not by the launcher's signal.
        log_dir: RUN_DIR/log.

    Returns:
        The user's own fault as it was raised in the worker, or a LaunchError about that one rank.
    """
    reports = {rank: report for rank in sorted(e.rank for e in ended) if (report := _read(log_dir, rank=rank))}
    cause = _cause(ended, reports)
    report = reports.get(cause.rank)
    if report is None:
        kind = LostError if cause.code < 0 else LaunchError
        return kind(f"rank {cause.rank} ended with {_ending(cause)}; its log {cause.log} {_last_lines(cause)}")
    if report.user:
        return _as_raised(report)
    kind = LostError if _is_of_the_connection(report) else LaunchError
    return kind(
        f"rank {cause.rank} failed with {report.type}: {report.message}\n"
        f"It ended with {_ending(cause)}; the traceback is in {cause.log}"
    )


def _is_of_the_connection(report: _Report) -> bool:
    """Whether it is about another rank, the network or a device, and not about what this rank was doing."""
    if report.type in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return (
        report.type in ("RuntimeError", "DistError", "AcceleratorError") and _BROKEN.search(report.message) is not None
    )


def _cause(ended: Sequence[Ended], reports: dict[int, _Report]) -> Ended:
    by_rank = {e.rank: e for e in ended}

    def seen(one: Ended) -> float:
        return one.seen - one.ahead

    def told(report: _Report) -> float:
        return report.time - by_rank[report.rank].ahead

    killed = sorted((e for e in ended if e.code < 0 and not e.by_us), key=seen)
    first = min(reports.values(), key=told, default=None)
    if killed and (first is None or told(first) > seen(killed[0]) - _HEAD_START_SECONDS):
        return killed[0]
    if first is not None:
        return by_rank[first.rank]
    return min((e for e in ended if e.badly), key=seen)


def _read(log_dir: Path, *, rank: int) -> _Report | None:
    # A worker that died while writing leaves half a file, or a wrong one: then its log speaks for it.
    try:
        entry = json.loads(error_path(log_dir, rank=rank).read_text(encoding="utf-8"))
        return _Report(
            rank=rank,
            type=str(entry["type"]),
            message=str(entry["message"]),
            user=entry["user"] is True,
            time=float(entry["time"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_raised(report: _Report) -> MoetrainError:
    kind = getattr(errors, report.type, LaunchError)
    if kind is ConfigError:
        # It takes its problems one by one and writes the heading and the dashes itself.
        return ConfigError(report.message.removeprefix("config is not usable:\n  - ").split("\n  - "))
    if isinstance(kind, type) and issubclass(kind, MoetrainError):
        return kind(report.message)
    return LaunchError(report.message)


def _ending(ended: Ended) -> str:
    if ended.code >= 0:
        return f"exit code {ended.code}"
    try:
        number = signal.Signals(-ended.code)
    except ValueError:
        return f"signal {-ended.code}"
    if ended.by_us:
        return f"our {number.name}, sent to every rank"
    return f"{number.name} ({_HINTS[number]})" if number in _HINTS else number.name


def _last_lines(ended: Ended) -> str:
    try:
        with ended.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(ended.log_start, size - 16_384))
            lines = file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "\n    ".join(["ends with:", *lines]) if lines else "is empty"
