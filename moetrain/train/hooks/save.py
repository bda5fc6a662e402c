"""A checkpoint after a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from moetrain.checkpoint.saver import Outcome, Saver
from moetrain.checkpoint.state import Fragment
from moetrain.checkpoint.store import Manifest
from moetrain.errors import CheckpointError
from moetrain.train.hooks.log import Clock
from moetrain.train.loop import StepResult, TrainState


class SaveHook:
    """A checkpoint every few steps or minutes, and at the end.

    Args:
        flush: writes the pending line of metrics. A line never spans a checkpoint, so that the losses of an
            interrupted and resumed run, put one after the other, are those of an unbroken one.
        saver: waited for before the next save begins, and by ``finish``.
        fragments: what to save; asked for at every save.
        manifest: what the checkpoint says of itself.
        go_on: when a save fails, warn, train on and try again at the next one; else the failure ends the run.
        warn: shows a line to the user; does nothing on every rank but the first.
    """

    def __init__(
        self,
        *,
        every_steps: int | None,
        every_minutes: float | None,
        steps: int,
        flush: Callable[[TrainState], None],
        saver: Saver,
        fragments: Callable[[], Iterable[Fragment]],
        manifest: Callable[[TrainState], Manifest],
        go_on: bool,
        warn: Callable[[str], None],
        control: dist.ProcessGroup,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._every_steps, self._every_minutes, self._steps = every_steps, every_minutes, steps
        self._flush, self._control, self._go_on, self._warn = flush, control, go_on, warn
        self._saver, self._fragments, self._manifest = saver, fragments, manifest
        self._last = time.monotonic()
        self._made = self._ask_after = 0  # steps since the last save
        self._begun_step = -1
        self._failure: CheckpointError | None = None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self._go_on:
            self._tell(self._saver.poll())
        self._made += 1
        by_steps = self._every_steps is not None and state.step % self._every_steps == 0
        if by_steps or state.step == self._steps or self._is_time():
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Begin a save, unless that of this step has begun already.

        Raises:
            CheckpointError: on every rank, when a failure ends the run: of the save before or, where it is known
                already, of this one.
        """
        if self._begun_step == state.step:
            return
        self._flush(state)
        with self._clock.pause("saving"):
            self._tell(self._saver.wait())
            self._saver.begin(self._fragments(), manifest=self._manifest(state))
            if not self._saver.asynchronous:
                self._tell(self._saver.wait())
        self._begun_step, self._last = state.step, time.monotonic()
        self._made = self._ask_after = 0

    def finish(self, state: TrainState) -> None:
        """Save where the run stops, and wait for it; there is no save to come that could make up for this one.

        Raises:
            CheckpointError: on every rank; it failed.
        """
        if state.step < self._steps:
            self.save(state)
        self._go_on = False
        self.wait()
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Let the save in flight end.

        Raises:
            CheckpointError: on every rank; it failed, and a failure ends the run.
        """
        self._tell(self._saver.wait())

    def go_back(self) -> None:
        """The run has gone back: steps that were saved come again."""
        self._begun_step = -1

    def settle(self) -> None:
        """Let the save in flight end, whatever becomes of it: something worse is on its way to the user."""
        self._saver.wait()

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        for warning in outcome.warnings:
            self._warn(f"warning: {warning}")
        self._failure = outcome.failure
        if self._failure is not None:
            if not self._go_on:
                raise self._failure
            self._warn(
                f"warning: step {outcome.step:,} is not saved; training goes on, as checkpoint.on_failure says, and "
                f"the next save is tried: {self._failure}"
            )

    def _is_time(self) -> bool:
        """Every rank asks after the same steps; the more time is left, the fewer of them."""
        if self._every_minutes is None or self._made < self._ask_after:
            return False
        # clocks differ between ranks: the first one decides for all, and when to ask again: half of the way from here,
        # as steps may become slower
        waited = time.monotonic() - self._last
        left = 60 * self._every_minutes - waited
        half = left * self._made / (2 * max(waited, 1e-9))
        answer = torch.tensor([int(left <= 0), self._made + max(1, int(half))])
        dist.broadcast(answer, src=0, group=self._control)
        is_due, self._ask_after = answer.tolist()
        return bool(is_due)
