"""Ranks that are persistently slower than the others, from what each has said of its own work. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moetrain.parallel.progress import Progress
from moetrain.watch.board import Beat, read_beats
from moetrain.watch.incidents import Incidents

_BEATS_BETWEEN_LOOKS = 6


@dataclass(frozen=True)
class Change:
    """A rank became slow, or is so no more."""

    rank: int
    is_slow: bool
    text: str


class Stragglers:
    """Who is slow; looked at again and again by one rank.

    Args:
        ratio: a rank is slow from this many times the median of the others on, and until it is half-way back.
    """

    def __init__(self, *, ratio: float) -> None:
        self._ratio = ratio
        self._slow: set[int] = set()

    def look(self, beats: Sequence[Beat | None]) -> list[Change]:
        """What has changed since the last look."""
        own = {each.rank: each.own_seconds for each in beats if each is not None and each.own_seconds is not None}
        if len(own) < max(2, len(beats)):
            return []
        changes = []
        for rank, seconds in own.items():
            others = median(time for other, time in own.items() if other != rank)
            was = rank in self._slow
            is_slow = seconds > others * (self._ratio if not was else (1 + self._ratio) / 2)
            if is_slow != was:
                self._slow ^= {rank}
                host = next(each.host for each in beats if each is not None and each.rank == rank)
                changes.append(Change(rank, is_slow, _told(rank, host, seconds, others)))
        return changes


class Report:
    """What a rank adds to each of its beats; on the rank that looks, slow ones become incidents.

    Args:
        usual: seconds of this rank's own work in a step; None: not measured yet.
        device_bytes: memory of its GPU.
        looks: whether this rank looks at all of them.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        ranks: int,
        ratio: float,
        progress: Progress,
        incidents: Incidents,
        usual: Callable[[], float | None],
        device_bytes: int | None,
        looks: bool,
    ) -> None:
        self._run_dir, self._ranks, self._progress, self._incidents = run_dir, ranks, progress, incidents
        self._usual, self._device_bytes = usual, device_bytes
        self._stragglers = Stragglers(ratio=ratio) if looks else None
        self._beats = 0

    def __call__(self) -> dict[str, Any]:
        """Fields of a ``Beat``."""
        self._beats += 1
        # reading all the files at every beat would be a load on the file system of a large run
        if self._stragglers is not None and self._beats % _BEATS_BETWEEN_LOOKS == 0:
            for change in self._stragglers.look(read_beats(self._run_dir, world_size=self._ranks)):
                kind, done = ("slow_rank", "nothing: look at its GPU, its host and its disk")
                if not change.is_slow:
                    kind, done = "slow_rank_over", "nothing"
                self._incidents.add(kind, step=self._progress.step, rank=change.rank, what=change.text, done=done)
        return {"own_seconds": self._usual(), "device_bytes": self._device_bytes}


def _told(rank: int, host: str, seconds: float, others: float) -> str:
    return (
        f"rank {rank} on {host} takes {1000 * seconds:,.1f} ms for its own work in a step, the others "
        f"{1000 * others:,.1f} ms ({seconds / others:.2f} times)"
    )
