"""The learning rate: a pure function of the step. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then one of four ways down.

    Attributes:
        kind: cosine, linear, wsd (constant, then linear decay; Hu et al. 2024, arXiv:2404.06395) or constant.
        peak: learning rate after the warm-up.
        steps: length of the run.
        warmup: steps of warm-up.
        decay: steps of decay at the end; used by wsd.
        min_ratio: learning rate of the last step, as a share of the peak.
    """

    kind: str
    peak: float
    steps: int
    warmup: int
    decay: int
    min_ratio: float

    def at(self, step: int) -> float:
        """Learning rate of the step that follows ``step`` finished ones."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        start = max(self.warmup, self.steps - self.decay) if self.kind == "wsd" else self.warmup
        if self.kind == "constant" or step < start:
            return self.peak
        # the last step of the run, steps - 1, gets the lowest rate; a run of one step learns at the peak
        span = self.steps - 1 - start
        done = min(1.0, (step - start) / span) if span > 0 else float(step > 0)
        share = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * share)
