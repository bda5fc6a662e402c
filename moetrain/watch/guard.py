"""What becomes of a step whose loss or gradient is not what it should be. All ranks come to the same answer.

    not finite   the engine has left weights and moments alone; too many in a row: back to a checkpoint
    spike        off, warn, skip (known before the last backward pass of the step) or rollback

A step that was skipped or left out keeps its number: the batch and the learning rate at step s stay functions of s.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.schema import WatchConfig
from moetrain.errors import TrainingError
from moetrain.watch.incidents import Tell
from moetrain.watch.progress import Progress
from moetrain.watch.rollback import LeftOut, RollBack

NOT_FINITE, SPIKE, LEFT_OUT = "not finite", "spike", "left out"
"""Why a step changed nothing."""

_PER_DEVIATION = 1.4826  # median absolute deviation to standard deviation, of a normal distribution
_LEAST_DEVIATION = 0.005  # of the median: a loss that hardly moves must not make a spike of nothing


@dataclass(frozen=True)
class Verdict:
    """What to do after a step; the same on every rank."""

    stop: bool = False
    roll_back: RollBack | None = None


class Guard:
    """Judges every step.

    Args:
        group: all ranks, on a backend that moves host memory; one small all-reduce for each step.
        asked: whether this rank was asked to stop.
        left_out: the batches that are left out.
        device: of the losses.
    """

    def __init__(
        self,
        settings: WatchConfig,
        *,
        group: dist.ProcessGroup,
        asked: Callable[[], bool],
        left_out: LeftOut,
        progress: Progress,
        tell: Tell,
        device: torch.device,
    ) -> None:
        self._settings, self._group, self._asked, self._left_out = settings, group, asked, left_out
        self._progress, self._tell = progress, tell
        self._usual: deque[float] = deque(maxlen=settings.spike_window)
        self._in_a_row, self._first_bad, self._high = 0, 0, 0
        self._loss_on_host = torch.zeros((), dtype=torch.float32, pin_memory=device.type == "cuda")

    @property
    def asks_before_backward(self) -> bool:
        """Whether ``keeps`` must be asked before the last backward pass of a step."""
        return self._settings.spike == "skip"

    def leaves_out(self, step: int) -> bool:
        """Whether the batch of this step is left out."""
        return step in self._left_out

    def keeps(self, step: int, losses: Sequence[Tensor]) -> bool:
        """Whether the gradient of this step is to be used. Every rank asks; waits for the device.

        Args:
            losses: of this rank's micro-batches.
        """
        self.note(losses)
        if losses[0].is_cuda:
            torch.cuda.synchronize(losses[0].device)
        loss, _ = self._over_ranks(float(self._loss_on_host))
        above = self._deviations(loss)
        if above is None or not math.isfinite(loss):
            return True
        self._tell("spike", step=step, rank=None, what=self._spike_text(loss, above), done="the step is skipped")
        return False

    def note(self, losses: Sequence[Tensor]) -> None:
        """Take the losses of this rank's micro-batches, before the optimizer's step, which waits for the device."""
        self._loss_on_host.copy_(torch.stack(list(losses)).float().mean(), non_blocking=True)

    def after_step(self, step: int, *, grad_norm: float, skipped: str) -> Verdict:
        """Every rank calls it after every step, with the number of steps that are finished now.

        Args:
            grad_norm: not finite: the engine has skipped the step.
            skipped: why nothing was changed, or empty.

        Raises:
            TrainingError: on every rank; the run has gone back often enough.
        """
        loss, stop = self._over_ranks(float(self._loss_on_host))
        roll_back = None
        if skipped == NOT_FINITE:
            roll_back = self._not_finite(step - 1, loss=loss, grad_norm=grad_norm)
        elif skipped == SPIKE:
            self._count_high()
        elif not skipped:
            self._in_a_row = 0
            roll_back = self._judge(step - 1, loss)
        if roll_back is not None:
            self._hold(step, roll_back.what)
        return Verdict(stop=stop, roll_back=roll_back)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self._usual), "in_a_row": self._in_a_row, "first_bad": self._first_bad,
                "high": self._high}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint; an empty one begins anew."""
        self._usual.clear()
        self._usual.extend(state.get("losses", []))
        self._in_a_row, self._first_bad = state.get("in_a_row", 0), state.get("first_bad", 0)
        self._high = state.get("high", 0)

    def _hold(self, step: int, what: str) -> None:
        try:
            self._left_out.hold(at=step, most=self._settings.max_rollbacks, what=what)
        except TrainingError:
            self._tell("gave_up", step=step, rank=None, what=what, done="the run stops, having gone back often enough")
            raise

    def _over_ranks(self, loss: float) -> tuple[float, bool]:
        """The mean loss, and whether any rank was asked to stop."""
        both = torch.tensor([loss, float(self._asked())], dtype=torch.float64)
        self._progress.at("the agreement on the step")
        self._progress.enter("the all-reduce of the loss")
        dist.all_reduce(both, group=self._group)
        self._progress.leave()
        total, asked = both.tolist()
        return total / dist.get_world_size(self._group), asked > 0

    def _not_finite(self, batch: int, *, loss: float, grad_norm: float) -> RollBack | None:
        most = self._settings.max_skips
        self._in_a_row += 1
        if self._in_a_row == 1:
            self._first_bad = batch
        what = f"the loss is {loss:.4g} and the gradient norm {grad_norm:.4g}"
        self._tell("not_finite", step=batch, rank=None, what=what,
                   done=f"the step is skipped ({self._in_a_row} of {most} in a row)")  # fmt: skip
        if self._in_a_row < most:
            return None
        first = max(0, self._first_bad - self._settings.leave_out_before)
        what = f"loss or gradient were no finite numbers in {most} steps in a row"
        return RollBack(first, batch, what, must=True)

    def _judge(self, batch: int, loss: float) -> RollBack | None:
        policy = self._settings.spike
        above = self._deviations(loss) if policy != "off" else None
        if above is None:
            if self._high and policy == "warn":
                self._tell("spike_over", step=batch, rank=None, what=f"the loss is {loss:.4g} again", done="nothing")
            self._high = 0
            self._usual.append(loss)
            return None
        what = self._spike_text(loss, above)
        is_new = self._high == 0
        self._count_high()
        if is_new and policy == "rollback":
            return RollBack(max(0, batch - self._settings.leave_out_before), batch, what, must=False)
        if is_new:
            self._tell("spike", step=batch, rank=None, what=what, done="nothing, as watch.spike=warn says")
        return None

    def _count_high(self) -> None:
        self._high += 1
        if self._high >= self._settings.spike_window:
            self._usual.clear()  # this is what is usual now
            self._high = 0

    def _deviations(self, loss: float) -> float | None:
        """How far the loss is above the usual, in standard deviations, where that makes it a spike."""
        if self._settings.spike == "off" or 2 * len(self._usual) < self._settings.spike_window:
            return None
        middle = median(self._usual)
        spread = _PER_DEVIATION * median(abs(each - middle) for each in self._usual)
        above = (loss - middle) / max(spread, _LEAST_DEVIATION * abs(middle))
        return above if above > self._settings.spike_deviations else None

    def _spike_text(self, loss: float, above: float) -> str:
        return (
            f"the loss is {loss:.4g}, {above:.1f} deviations above {median(self._usual):.4g}, the median of "
            f"{len(self._usual)} steps"
        )


class Unwatched:
    """In the place of a ``Guard`` for a short run that nobody resumes: the first number that is not finite ends it."""

    asks_before_backward = False

    def leaves_out(self, step: int) -> bool:
        """No batch is."""
        return False

    def keeps(self, step: int, losses: Sequence[Tensor]) -> bool:
        """Every gradient is used."""
        return True

    def note(self, losses: Sequence[Tensor]) -> None:
        """Nobody asks for the losses later."""

    def after_step(self, step: int, *, grad_norm: float, skipped: str) -> Verdict:
        """Go on.

        Raises:
            TrainingError: the step was skipped.
        """
        if skipped:
            raise TrainingError(f"the gradient norm is {grad_norm} at step {step - 1}: lower optim.lr")
        return Verdict()
