"""What a person sees of a running run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

PLAIN_EVERY = 0.1
"""Share of the work between two plain lines, where no bar can be drawn."""


class WorkBar:
    """A progress bar for one long piece of work.

    Args:
        label: what is done, in a word or two.
        total: how many units of work there are in all; None while nobody knows.
        done: how many were done before, by a run that is now resumed.
        unit: name of a unit, for plain lines.
        shown: False makes it draw nothing: every rank but the first.
        stderr: draw there, where stdout is the result.
        console: where to draw instead.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int | None,
        unit: str,
        done: int = 0,
        shown: bool = True,
        stderr: bool = False,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=stderr)
        self._label, self._total, self._unit, self._done, self._shown = label, total, unit, done, shown
        self._next_plain = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            _amount(total),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            # rank 0's stderr is a log; the bar must not turn what libraries write there onto the screen
            redirect_stderr=False,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> WorkBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def renderable(self) -> RenderableType:
        """The bar, for a larger view that draws it; it is not entered then."""
        return self._bar.get_renderable()

    def advance_to(self, done: int, *, note: str | None = None) -> None:
        """Say how much is done now, and what to show beside the bar."""
        self._done = done
        if note is not None:
            self._bar.update(self._task, note=note)
        self._bar.update(self._task, completed=done, total=self._total)
        share = done / self._total if self._total else 0.0
        if self._shown and not self._console.is_terminal and share >= self._next_plain:
            self._next_plain = min(1.0, share + PLAIN_EVERY) if share < 1 else 2.0
            of = f"/{self._total:,}" if self._total else ""
            self._console.print(f"{self._label} {done:,}{of} {self._unit} {note or ''}".rstrip(), highlight=False)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._shown:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _amount(total: int | None) -> ProgressColumn:
    whole = Column(no_wrap=True)
    if total is None:
        return TextColumn("{task.completed:,}", table_column=whole)
    if total >= 100_000:
        return TextColumn("{task.percentage:>3.0f}%", table_column=whole)
    return MofNCompleteColumn(table_column=whole)


class StageBars:
    """A bar for each stage of a piece of work, called with (stage, done, total)."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._stage: str | None = None
        self._bar: WorkBar | None = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage or self._bar is None:
            self._close()
            self._stage, self._bar = stage, WorkBar(f"{self._label}: {stage}", total=total, unit="")
            self._bar.__enter__()
        self._bar.advance_to(done)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            print(line)
        else:
            self._bar.say(line)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
