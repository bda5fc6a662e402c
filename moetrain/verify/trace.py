"""What a run leaves to be compared, whichever layout it had."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.moe.layer import MoELayer, MoEOutput


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One optimizer step. Means over ranks and micro-batches."""

    language: float
    """Language loss, nats."""
    aux: dict[str, float]
    """``blocks.3.feed_forward balance`` and the like -> the router's loss, unweighted."""
    norms: list[float]
    """Gradient norm before clipping, as each rank told it."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Tensors of all ranks put together.

    Attributes:
        tensors: whole, flat, float32, by global name; NaN where no rank holds a part.
        torn: names of which two ranks hold different copies.
    """

    tensors: dict[str, Tensor]
    torn: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A run of a few steps.

    Attributes:
        steps: one after the other.
        gradient: ``PARAMETER`` -> its gradient in the first step, before clipping.
        after: step -> ``PARAMETER/fp32``, ``/exp_avg``, ``/exp_avg_sq`` and ``NAME/state``. Step 0 is the start (with
            ``/fp32`` alone), then come the first and the last.
    """

    steps: list[StepTrace]
    gradient: Whole
    after: dict[int, Whole]


class AuxLosses:
    """Listens to every router's losses, also those that the objective only adds up.

    A block that is recomputed in the backward pass tells the same losses twice, which leaves their mean as it is.
    """

    def __init__(self, gpt: nn.Module) -> None:
        self._seen: dict[str, list[Tensor]] = {}
        self._hooks = []
        for name, module in gpt.named_modules():
            if isinstance(module, MoELayer):
                self._hooks.append(module.register_forward_hook(self._listener(name)))

    def __enter__(self) -> AuxLosses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> dict[str, float]:
        """The mean of each since the last call."""
        means = {name: torch.stack(losses).mean().item() for name, losses in self._seen.items()}
        self._seen.clear()
        return means

    def _listener(self, layer: str) -> Any:
        def listen(module: nn.Module, inputs: tuple[Any, ...], output: MoEOutput) -> None:
            for name, loss in output.losses.items():
                self._seen.setdefault(f"{layer} {name}", []).append(loss.detach().float())

        return listen
