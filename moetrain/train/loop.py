"""The training loop: micro-batches, step, hooks. It builds nothing."""

from __future__ import annotations

import math
import signal
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moetrain.model.objective import Losses, MicroBatch
from moetrain.parallel.seeds import derive_seed
from moetrain.train.schedule import Schedule
from moetrain.watch.guard import LEFT_OUT, NOT_FINITE, SPIKE, Verdict
from moetrain.watch.progress import Progress
from moetrain.watch.rollback import RollBack


@dataclass
class TrainState:
    """How far the run is."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Tokens seen, over all ranks."""
    updates: int = 0
    """Steps of the optimizer; fewer than ``step`` where some were skipped or left out."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank."""

    micro_batches: list[Losses]
    tokens_per_micro_batch: int
    grad_norm: float
    lr: float
    skipped: str = ""
    """Why the step changed nothing (``watch.guard``); empty: it did. One that was left out has no micro-batches."""


class Trainable(Protocol):
    """What the loop needs of an engine."""

    def forward_backward(self, batch: MicroBatch, *, keep: Callable[[Losses], bool] | None = None) -> Losses: ...

    def step(self, lr: float) -> float: ...


class Watch(Protocol):
    """What the loop needs of a guard (``watch.guard``)."""

    @property
    def asks_before_backward(self) -> bool: ...

    def leaves_out(self, step: int) -> bool: ...

    def keeps(self, step: int, losses: Sequence[Tensor]) -> bool: ...

    def note(self, losses: Sequence[Tensor]) -> None: ...

    def after_step(self, step: int, *, grad_norm: float, skipped: str) -> Verdict: ...


class Hook(Protocol):
    """Something to do after a step; it decides itself whether it is due."""

    def after_step(self, state: TrainState, result: StepResult) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What does not change during the run.

    Attributes:
        steps: length of the run.
        schedule: the learning rate.
        batch: step -> this rank's micro-batches.
        tokens_per_step: over all ranks.
        seed: with the step and the rank, the state of the random generators.
        hooks: in the order they run.
        watch: judges each step before the hooks run; every rank gets the same answer.
        go_back: bring engine and state back to a checkpoint; False: there is none that would do.
        progress: where this rank is.
    """

    steps: int
    schedule: Schedule
    batch: Callable[[int], Sequence[MicroBatch]]
    tokens_per_step: int
    seed: int
    hooks: Sequence[Hook]
    watch: Watch
    go_back: Callable[[TrainState, RollBack], bool] = lambda state, wanted: False
    progress: Progress = field(default_factory=Progress)


def step_seed(seed: int, step: int, *, rank: int) -> int:
    """What the random generators of a rank are seeded with before a step."""
    return derive_seed(seed, step, rank)


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 on any rank, or another reason there, stops all of them after the same step."""

    def __init__(self) -> None:
        self._asked = False
        self._reasons: list[Callable[[], bool]] = []
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._remember)

    def also(self, reason: Callable[[], bool]) -> None:
        """Stop when this is true on any rank, too."""
        self._reasons.append(reason)

    def __call__(self) -> bool:
        """Whether this rank was asked; ``watch.guard`` tells the others."""
        return self._asked or any(reason() for reason in self._reasons)

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True


def train(engine: Trainable, *, plan: Plan, state: TrainState, rank: int) -> None:
    """Go on from ``state`` to the end of the plan, or until asked to stop."""
    while state.step < plan.steps:
        plan.progress.step = state.step
        if plan.watch.leaves_out(state.step):
            nothing = float("nan")
            result = StepResult([], 0, grad_norm=nothing, lr=plan.schedule.at(state.step), skipped=LEFT_OUT)
        else:
            result = _step(engine, plan=plan, state=state, rank=rank)
            state.tokens += plan.tokens_per_step
        state.step += 1
        state.updates += not result.skipped
        verdict = plan.watch.after_step(state.step, grad_norm=result.grad_norm, skipped=result.skipped)
        if verdict.roll_back is not None and plan.go_back(state, verdict.roll_back):
            continue
        plan.progress.at("what comes after a step")
        for hook in plan.hooks:
            hook.after_step(state, result)
        if verdict.stop:
            return


def _step(engine: Trainable, *, plan: Plan, state: TrainState, rank: int) -> StepResult:
    # generators are a pure function of the step: a resumed run needs no saved state to draw the same numbers
    torch.manual_seed(step_seed(plan.seed, state.step, rank=rank))
    plan.progress.at("reading the batch")
    micro_batches = plan.batch(state.step)
    losses: list[Losses] = []
    skipped = ""

    def keep(last: Losses) -> bool:
        nonlocal skipped
        if not plan.watch.keeps(state.step, [each.language for each in (*losses, last)]):
            skipped = SPIKE
        return not skipped

    for number, micro_batch in enumerate(micro_batches, start=1):
        asks = plan.watch.asks_before_backward and number == len(micro_batches)
        losses.append(engine.forward_backward(micro_batch, keep=keep if asks else None))
    plan.watch.note([each.language for each in losses])
    plan.progress.at("the optimizer step")
    lr = plan.schedule.at(state.step)
    grad_norm = engine.step(lr)
    if not skipped and not math.isfinite(grad_norm):
        skipped = NOT_FINITE
    tokens = micro_batches[0].token_BS.numel()
    return StepResult(losses, tokens, grad_norm=grad_norm, lr=lr, skipped=skipped)
