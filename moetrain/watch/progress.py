"""Where a rank is in its work: a few fields that the training thread sets and others read. No torch.

``count`` grows with every mark. All ranks pass the same marks in the same order, so the rank with the lowest count is
the one behind, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

STARTING = "starting"
TRAINING = "training"


class Progress:
    """Where this rank is. One thread writes; a reader may see a mark half set, which the next look mends.

    Args:
        stamp: a moment on the clock that work is measured with (``watch.rank``).
    """

    __slots__ = ("count", "inside", "layer", "phase", "stamp", "stamps", "step", "task")

    def __init__(self, stamp: Callable[[], Any] = time.perf_counter) -> None:
        self.step = 0
        self.count = 0
        self.task = STARTING
        self.phase = ""
        self.layer: int | None = None
        self.inside = ""
        self.stamp = stamp
        self.stamps: list[Any] | None = None
        """Beginning and end of each collective, while a measurement is on; None: there is none."""

    def at(self, phase: str, layer: int | None = None) -> None:
        """A new part of the work begins."""
        self.phase, self.layer = phase, layer
        self.count += 1

    def enter(self, collective: str) -> None:
        """About to wait for other ranks."""
        if self.stamps is not None:
            self.stamps.append(self.stamp())
        self.inside = collective
        self.count += 1

    def leave(self) -> None:
        """The collective of ``enter`` is over, or on its way on the device."""
        self.inside = ""
        if self.stamps is not None:
            self.stamps.append(self.stamp())

    @contextlib.contextmanager
    def during(self, task: str) -> Iterator[None]:
        """Something that may take long: what happens inside is not training."""
        before, self.task = self.task, task
        self.count += 1
        yield
        self.task = before
        self.count += 1

    def place(self) -> str:
        """In words: ``the all-to-all of layer 3 (forward)``, ``the optimizer step``."""
        of_layer = "" if self.layer is None else f" of layer {self.layer}"
        where = f"{self.inside}{of_layer} ({self.phase})" if self.inside else f"{self.phase}{of_layer}"
        return where if self.task == TRAINING else f"{self.task}: {where}" if where else self.task
