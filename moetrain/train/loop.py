"""The training loop: micro-batches, step, hooks. It builds nothing."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from moetrain.model.objective import Losses, MicroBatch
from moetrain.parallel.seeds import derive_seed
from moetrain.train.schedule import Schedule


@dataclass
class TrainState:
    """How far the run is."""

    step: int = 0
    """Finished optimizer steps."""
    tokens: int = 0
    """Tokens seen, over all ranks."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave on this rank."""

    micro_batches: list[Losses]
    tokens_per_micro_batch: int
    grad_norm: float
    lr: float


class Trainable(Protocol):
    """What the loop needs of an engine."""

    def forward_backward(self, batch: MicroBatch) -> Losses: ...

    def step(self, lr: float) -> float: ...


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
        stop: whether to end after this step; every rank gets the same answer.
    """

    steps: int
    schedule: Schedule
    batch: Callable[[int], Sequence[MicroBatch]]
    tokens_per_step: int
    seed: int
    hooks: Sequence[Hook]
    stop: Callable[[], bool]


def step_seed(seed: int, step: int, *, rank: int) -> int:
    """What the random generators of a rank are seeded with before a step."""
    return derive_seed(seed, step, rank)


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 on any rank, or another reason there, stops all of them after the same step.

    Args:
        control: all ranks, on a backend that moves host memory.
    """

    def __init__(self, control: dist.ProcessGroup) -> None:
        self._control = control
        self._asked = False
        self._reasons: list[Callable[[], bool]] = []
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._remember)

    def also(self, reason: Callable[[], bool]) -> None:
        """Stop when this is true on any rank, too."""
        self._reasons.append(reason)

    def __call__(self) -> bool:
        """Whether to stop now. Every rank must ask after every step."""
        flag = torch.tensor([int(self._asked or any(reason() for reason in self._reasons))])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flag.item())

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True


def train(engine: Trainable, *, plan: Plan, state: TrainState, rank: int) -> None:
    """Go on from ``state`` to the end of the plan, or until asked to stop."""
    while state.step < plan.steps:
        # generators are a pure function of the step: a resumed run needs no saved state to draw the same numbers
        torch.manual_seed(step_seed(plan.seed, state.step, rank=rank))
        micro_batches = plan.batch(state.step)
        losses = [engine.forward_backward(micro_batch) for micro_batch in micro_batches]
        lr = plan.schedule.at(state.step)
        grad_norm = engine.step(lr)
        state.step += 1
        state.tokens += plan.tokens_per_step
        result = StepResult(
            micro_batches=losses, tokens_per_micro_batch=micro_batches[0].token_BS.numel(), grad_norm=grad_norm, lr=lr
        )
        for hook in plan.hooks:
            hook.after_step(state, result)
        if plan.stop():
            return
