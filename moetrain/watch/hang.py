"""The watchdog of a rank: a thread that notices when nobody gets anywhere, says who is behind, and ends the rank.

Every few seconds it writes where its rank is (``board``). When its own rank has passed no mark for long, it reads what
all the others wrote, twice: as long as any of them moves, it waits on. Then every rank leaves its stacks in its log,
the first to ask writes down whose fault it is, and all of them exit with HUNG. Nothing is sent between ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moetrain.parallel.lifeline import HUNG
from moetrain.watch.board import Beat, Board, claim, read_beats
from moetrain.watch.progress import TRAINING, Progress


@dataclass(frozen=True)
class Hang:
    """Whose fault a hang is."""

    rank: int | None
    """The culprit, or the first of them; None: no single rank's."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long without a mark is too long, in seconds; 0: never."""

    training: float
    otherwise: float
    """Up to the end of the first step, and while saving or evaluating."""


class Watchdog:
    """Watches this rank, and with the others' all of them.

    Args:
        run_dir: of the run.
        progress: of this rank.
        on_hang: called on one rank with the verdict, before all of them end.
        log: where the stacks go; a real file.
        each_beat: called at every beat; what it returns goes onto the board.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        progress: Progress,
        patience: Patience,
        on_hang: Callable[[int, Hang], None],
        log: TextIO,
        each_beat: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._run_dir, self._world_size, self._progress = run_dir, world_size, progress
        self._patience, self._on_hang, self._log, self._each_beat = patience, on_hang, log, each_beat
        self._board = Board(run_dir, rank=rank)
        watched = [each for each in (patience.training, patience.otherwise) if each]
        self._pause = min(5.0, max(0.1, min(watched, default=100.0) / 20))
        self._beats = 0
        self._over = threading.Event()
        self._first_step: int | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """The work is done."""
        self._over.set()
        self._thread.join()
        self._beat()  # where it ended, for whoever asks whether a fault came at the same step again
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        count, since = self._progress.count, time.monotonic()
        while not self._over.wait(self._pause):
            self._beat()
            if self._progress.count != count:
                count, since = self._progress.count, time.monotonic()
            limit = self._limit()
            if limit and time.monotonic() - since > limit:
                if self._nobody_moves():
                    self._end(seconds=time.monotonic() - since)
                since = time.monotonic()  # somebody moves: the wait begins anew

    def _limit(self) -> float:
        if self._first_step is None and self._progress.task == TRAINING:
            self._first_step = self._progress.step
        is_first = self._first_step is None or self._progress.step <= self._first_step
        is_usual = self._progress.task == TRAINING and not is_first
        return self._patience.training if is_usual else self._patience.otherwise

    def _beat(self) -> None:
        self._beats += 1
        progress = self._progress
        with contextlib.suppress(OSError):  # a full disk is no reason to stop watching
            self._board.write(
                Beat(rank=self._board.rank, host=self._board.host, pid=self._board.pid, beat=self._beats,
                     count=progress.count, step=progress.step, place=progress.place(), waits=bool(progress.inside),
                     **self._each_beat())
            )  # fmt: skip
        if self._patience.training:
            # written by a thread that needs no Python: it also shows one that never lets the others run
            faulthandler.dump_traceback_later(self._patience.training + 10 * self._pause, file=self._log)

    def _read(self) -> list[Beat | None]:
        return read_beats(self._run_dir, world_size=self._world_size)

    def _nobody_moves(self) -> bool:
        """Over a few beats; also False when this process itself had been stopped, and goes on now."""
        before = self._read()
        for _ in range(3):
            if self._over.wait(self._pause):
                return False
            self._beat()
        after = self._read()
        self._before, self._after = before, after
        return [_count(each) for each in before] == [_count(each) for each in after]

    def _end(self, *, seconds: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        pause = 6.0
        # a full disk is no reason to hang on
        with contextlib.suppress(OSError):
            self._log.write(f"\nno progress for {seconds:.0f} s; the stacks of this rank:\n")
            self._log.flush()
            faulthandler.dump_traceback(file=self._log)
        with contextlib.suppress(OSError):
            if claim(self._run_dir):
                pause = 3.0
                found = verdict(self._before, self._after, host=self._board.host)
                self._on_hang(self._progress.step, Hang(found.rank, f"no progress for {seconds:.0f} s: {found.text}"))
        time.sleep(pause * self._pause)  # for the others to leave their stacks, and for the one that speaks to finish
        os._exit(HUNG)


def verdict(before: Sequence[Beat | None], after: Sequence[Beat | None], *, host: str) -> Hang:
    """Who is behind.

    Args:
        before: what every rank wrote.
        after: the same a little later; a rank that has not written since does not run.
        host: the reader's; of processes on it, it is told whether they are stopped.
    """
    missing = [rank for rank, each in enumerate(after) if each is None]
    there = [each for each in after if each is not None]
    silent = [each for old, each in zip(before, after, strict=True) if each and old and each.beat == old.beat]
    least = min((each.count for each in there), default=0)
    behind = silent or [each for each in there if each.count == least]
    if missing:
        first, text = missing[0], f"{_ranks(missing)} never began"
        behind = []
    elif silent or len(behind) < len(there):
        first = behind[0].rank
        text = "; ".join(_where(each, is_silent=bool(silent), host=host) for each in behind[:4])
        text += f"; so are {len(behind) - 4} more" if len(behind) > 4 else ""
    else:
        return Hang(None, f"all ranks are as far, in {there[0].place} at step {there[0].step:,}: no rank is behind, "
                             "look at the network between them")  # fmt: skip
    waiting = _by_place([each for each in there if each not in behind])
    return Hang(
        first,
        "; ".join([text, *(f"{_ranks(who)} wait{'s' * (len(who) == 1)} in {place}" for place, who in waiting[:3])]),
    )


def _where(beat: Beat, *, is_silent: bool, host: str) -> str:
    if not is_silent:
        return f"rank {beat.rank} is behind, in {beat.place} at step {beat.step:,}"
    stopped = beat.host == host and _state(beat.pid) == "T"
    why = (
        "its process is stopped (SIGSTOP)" if stopped else f"no sign of life from it, process {beat.pid} on {beat.host}"
    )
    return f"rank {beat.rank} is behind: {why}, last seen in {beat.place} at step {beat.step:,}"


def _by_place(beats: Sequence[Beat]) -> list[tuple[str, list[int]]]:
    places = defaultdict(list)
    for each in beats:
        places[each.place].append(each.rank)
    return sorted(places.items(), key=lambda item: -len(item[1]))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _count(beat: Beat | None) -> int | None:
    return None if beat is None else beat.count


def _state(pid: int) -> str:
    """The state of a process of this host (proc(5)): T when it is stopped; empty when that cannot be seen."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
