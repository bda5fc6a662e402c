"""What a checkpoint of given settings must hold. No weight is allocated: a model of any size is built in an instant."""

from __future__ import annotations

from typing import Any

import torch

from moetrain.checkpoint.doctor import Expected
from moetrain.config.checks import check
from moetrain.config.freeze import flatten, freeze, to_dict
from moetrain.model.build import build_model


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
        states={name: tuple(state.shape) for name, state in gpt.router_state().items()},
        experts={name: shape[0] for name, shape in parameters.items() if ".experts." in name},
    )
