"""Requests to stop, agreed on by all ranks."""

from __future__ import annotations

import signal
import types

import torch
import torch.distributed as dist


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 on any rank stops all of them after the same step.

    Args:
        control: all ranks, on a backend that moves host memory.
    """

    def __init__(self, control: dist.ProcessGroup) -> None:
        self._control = control
        self._asked = False
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._remember)

    def __call__(self) -> bool:
        """Whether to stop now. Every rank must ask after every step."""
        flag = torch.tensor([int(self._asked)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flag.item())

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True
