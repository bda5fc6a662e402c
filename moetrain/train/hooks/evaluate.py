"""Held-out loss after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moetrain.metrics.live import LiveView
from moetrain.train.evaluate import Evaluation
from moetrain.train.hooks.log import Clock, Record
from moetrain.train.loop import StepResult, TrainState


class EvaluateHook:
    """Held-out loss every few steps; the end of the run is evaluated by the worker, on all held-out text."""

    def __init__(
        self,
        *,
        every_steps: int | None,
        steps: int,
        evaluate: Callable[[], Evaluation],
        record: Record,
        bar: LiveView,
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
