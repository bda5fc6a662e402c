"""Numbers out after a step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.metrics.live import LiveView
from moetrain.metrics.load import LoadMeter, LoadReport
from moetrain.metrics.speed import Speed
from moetrain.model.objective import Losses
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
        peak_memory: Callable[[], int | None],
        device: torch.device,
        meter: LoadMeter | None,
        group: dist.ProcessGroup,
        record: Record,
        bar: LiveView,
        clock: Clock,
    ) -> None:
        self._every, self._steps, self._clock = every_steps, steps, clock
        self._speed, self._meter, self._group, self._peak_memory = speed, meter, group, peak_memory
        self._record, self._bar, self._device = record, bar, device
        self._losses: list[Tensor] = []
        self._made = 0  # of these steps, those that changed something
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
        self._made += not result.skipped
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
            self._meter.read(self._group, steps=0)
        self._made = 0
        self._bar.go_back(state.step)
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
            "peak_memory_gb": self._fullest(losses.device),
        }
        note = f"loss {line['loss']:.3f}  {speed.tokens_per_second:,.0f} tok/s"
        if self._meter is not None:
            # a step that was skipped or left out says nothing of an expert that no token has chosen
            load = self._meter.read(self._group, steps=self._made)
            line |= load_fields(load)
            note += f"  load {max(load.max_over_mean):.2f}x"
            if dead := sum(map(len, load.dead)):
                note += f"  {dead} dead experts"
        self._made = 0
        self._record(line)
        self._bar.show(line)
        self._note = note

    def _fullest(self, device: torch.device) -> float | None:
        """Peak memory of the rank that needs most, in GB."""
        peak = torch.tensor([float(self._peak_memory() or 0)], dtype=torch.float64, device=device)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self._group)
        return peak.item() / 1e9 or None


def _mean_loss(micro_batches: Sequence[Losses], *, device: torch.device) -> Tensor:
    if not micro_batches:
        return torch.full((), float("nan"), device=device)
    return torch.stack([losses.language for losses in micro_batches]).mean()
