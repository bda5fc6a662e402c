"""What happens after a step: numbers out, evaluation, saving."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.saver import Outcome, Saver
from moetrain.checkpoint.state import Fragment
from moetrain.checkpoint.store import Manifest
from moetrain.errors import CheckpointError
from moetrain.metrics.console import WorkBar
from moetrain.metrics.load import LoadMeter, LoadReport
from moetrain.metrics.speed import Speed
from moetrain.model.objective import Losses
from moetrain.train.evaluate import Evaluation
from moetrain.train.loop import StepResult, TrainState
from moetrain.watch.progress import Progress

Record = Callable[[dict[str, Any]], None]
"""Takes one line of metrics; does nothing on every rank but the first."""


class Clock:
    """Time spent on training steps alone.

    Args:
        progress: told what happens in the pauses.
    """

    def __init__(self, progress: Progress) -> None:
        self._since, self._progress = time.monotonic(), progress

    def lap(self) -> float:
        """Seconds since the last lap, without the pauses."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        return seconds

    @contextlib.contextmanager
    def pause(self, task: str) -> Iterator[None]:
        """What happens inside is not training."""
        begun = time.monotonic()
        with self._progress.during(task):
            yield
        self._since += time.monotonic() - begun


def load_fields(load: LoadReport) -> dict[str, Any]:
    """The expert load as fields of a line of metrics."""
    return {
        "balance_loss": sum(load.balance_loss) / len(load.balance_loss),
        "z_loss": sum(load.z_loss) / len(load.z_loss),
        "load": load.share,
        "max_over_mean": load.max_over_mean,
        "cv": load.cv,
        "entropy": load.entropy,
        "dropped_share": load.dropped_share,
        "dead_experts": load.dead,
        "balance_loss_by_layer": load.balance_loss,
        "z_loss_by_layer": load.z_loss,
    }


class LogHook:
    """A line of metrics every few steps, at the end, and before every save (``flush``).

    Losses stay on the device between lines.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        steps: int,
        speed: Speed,
        device: torch.device,
        meter: LoadMeter | None,
        group: dist.ProcessGroup,
        record: Record,
        bar: WorkBar,
        clock: Clock,
    ) -> None:
        self._every, self._steps, self._clock = every_steps, steps, clock
        self._speed, self._meter, self._group = speed, meter, group
        self._record, self._bar, self._device = record, bar, device
        self._losses: list[Tensor] = []
        self._result: StepResult | None = None
        self._note = ""
        self._tokens_then = 0

    def start(self, state: TrainState) -> None:
        """Begin the clock, after everything is built and loaded."""
        self._clock.lap()
        self._tokens_then = state.tokens

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self._result = result
        self._losses.append(_mean_loss(result.micro_batches, device=self._device))
        if self._meter is not None and not result.skipped:
            for losses in result.micro_batches:
                for layer, load in enumerate(losses.load):
                    self._meter.add(layer, load.count_E, dropped=load.dropped, entropy_sum=load.entropy,
                                    tokens=result.tokens_per_micro_batch, balance=load.balance,
                                    z=load.z)  # fmt: skip
        if state.step % self._every == 0 or state.step == self._steps:
            self.flush(state)
        self._bar.advance_to(state.step, note=self._note)

    def go_back(self, state: TrainState) -> None:
        """Forget the steps since the last line: the run has gone back. Every rank calls it."""
        self._losses.clear()
        if self._meter is not None:
            self._meter.read(self._group)
        self.start(state)

    def flush(self, state: TrainState) -> None:
        """Write the steps since the last line, if there are any."""
        if self._losses and self._result is not None:
            self._write(state, self._result)

    def _write(self, state: TrainState, result: StepResult) -> None:
        losses = torch.stack(self._losses)
        dist.all_reduce(losses, group=self._group)
        step_losses = (losses / dist.get_world_size(self._group)).tolist()
        finite = [loss for loss in step_losses if math.isfinite(loss)]
        self._losses.clear()
        speed = self._speed.update(state.tokens - self._tokens_then, self._clock.lap())
        self._tokens_then = state.tokens
        line = {
            "step": state.step,
            "tokens": state.tokens,
            # of the steps that have one: a step that was left out or whose loss is no number has none
            "loss": sum(finite) / len(finite) if finite else float("nan"),
            "step_losses": step_losses,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": speed.tokens_per_second,
            "flops_per_second": speed.flops_per_second,
            "mfu": speed.mfu,
        }
        note = f"loss {line['loss']:.3f}  {speed.tokens_per_second:,.0f} tok/s"
        if self._meter is not None:
            load = self._meter.read(self._group, steps=len(step_losses))
            line |= load_fields(load)
            note += f"  load {max(load.max_over_mean):.2f}x"
            if dead := sum(map(len, load.dead)):
                note += f"  {dead} dead experts"
        self._record(line)
        self._note = note


def _mean_loss(micro_batches: Sequence[Losses], *, device: torch.device) -> Tensor:
    if not micro_batches:
        return torch.full((), float("nan"), device=device)
    return torch.stack([losses.language for losses in micro_batches]).mean()


class EvaluateHook:
    """Held-out loss every few steps; the end of the run is evaluated by the worker, on all held-out text."""

    def __init__(
        self,
        *,
        every_steps: int | None,
        steps: int,
        evaluate: Callable[[], Evaluation],
        record: Record,
        bar: WorkBar,
        clock: Clock,
    ) -> None:
        self._every, self._steps, self._evaluate, self._clock = every_steps, steps, evaluate, clock
        self._record, self._bar = record, bar
        self._newest: tuple[int, float] | None = None

    def loss_at(self, step: int) -> float | None:
        """The held-out loss found at this very step, if there was an evaluation."""
        return self._newest[1] if self._newest is not None and self._newest[0] == step else None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self._every is None or state.step % self._every or state.step == self._steps:
            return
        with self._clock.pause("evaluating"):
            found = self._evaluate()
        self._newest = (state.step, found.loss)
        self._record(evaluation_fields(found, state=state))
        self._bar.say(
            f"step {state.step:>6,}   held-out loss {found.loss:.4f}   perplexity {found.perplexity:,.1f}   "
            f"bits per byte {found.bits_per_byte:.4f}"
            + "".join(f"   {name} {loss:.4f}" for name, loss in found.by_source.items())
        )


def evaluation_fields(found: Evaluation, *, state: TrainState) -> dict[str, Any]:
    """An evaluation as a line of metrics."""
    line: dict[str, Any] = {
        "step": state.step,
        "tokens": state.tokens,
        "held_out_loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "held_out_tokens": found.tokens,
    }
    if found.by_source:
        line["held_out_loss_by_source"] = found.by_source
    if found.load is not None:
        line["held_out_load"] = found.load.share
        line["held_out_max_over_mean"] = found.load.max_over_mean
        line["held_out_dead_experts"] = found.load.dead
    return line


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
        self._begun_step = -1
        self._failure: CheckpointError | None = None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self._go_on:
            self._tell(self._saver.poll())
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

    def finish(self, state: TrainState) -> None:
        """Save where the run stops, and wait for it; there is no save to come that could make up for this one.

        Raises:
            CheckpointError: on every rank; it failed.
        """
        if state.step < self._steps:
            self.save(state)
        self._go_on = False
        self._tell(self._saver.wait())
        if self._failure is not None:
            raise self._failure

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
        if self._every_minutes is None:
            return False
        # clocks differ between ranks: the first one decides for all
        due = torch.tensor([int(time.monotonic() - self._last >= 60 * self._every_minutes)])
        dist.broadcast(due, src=0, group=self._control)
        return bool(due.item())
