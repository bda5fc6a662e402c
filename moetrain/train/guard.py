"""Requests to stop, agreed on by all ranks."""

from __future__ import annotations

import signal
import types
from collections.abc import Callable

import torch
import torch.distributed as dist


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
