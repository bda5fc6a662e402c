"""What a checkpoint of given settings must hold. No weight is allocated: a model of any size is built in an instant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moetrain.config.checks import check
from moetrain.config.freeze import flatten, freeze, to_dict
from moetrain.model.build import build_model


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a checkpoint of a model must hold, by global name without the ending."""

    parameters: dict[str, tuple[int, ...]]
    states: dict[str, tuple[int, ...]]
    """What routers keep beside their parameters."""
    experts: dict[str, int]
    """Those of the parameters that hold the experts of a block -> how many experts lead them."""

    def tensors(self, kinds: Iterable[str]) -> dict[str, int]:
        """Full name -> elements, with the given kinds of each parameter."""
        found = {f"{name}/{kind}": math.prod(shape) for name, shape in self.parameters.items() for kind in kinds}
        return found | {f"{name}/state": math.prod(shape) for name, shape in self.states.items()}

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(map(math.prod, self.parameters.values()))


def expected_tensors(settings: dict[str, Any]) -> Expected:
    """Names and shapes of a model's parameters and of the state of its routers.

    Args:
        settings: of the run, as in the manifest of a checkpoint.

    Raises:
        ConfigError: they are not those of a run.
    """
    run = freeze(settings)
    check(run, flatten(to_dict(run)))
    with torch.device("meta"):
        gpt = build_model(run.model, expert_V=torch.zeros(run.model.vocab_size, dtype=torch.int64))
    parameters = {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()}
    return Expected(
        parameters=parameters,
        states={name: tuple(state.shape) for name, state in gpt.moe_state().items()},
        experts={name: shape[0] for name, shape in parameters.items() if ".experts." in name},
    )
