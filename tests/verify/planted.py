"""A rank of a verification with faults in its training path: ``python -m planted DIR``.

PLANTED_FAULTS names one for each layout, in their order; ``none`` leaves a layout whole. Only the tests start this. The
plain loop that layouts are held against keeps its own, whole functions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from moetrain.config.schema import RunConfig
from moetrain.model.objective import Objective
from moetrain.moe.experts import Experts
from moetrain.parallel.lifeline import end_as_rank
from moetrain.train import setup
from moetrain.train.engine import Engine
from moetrain.verify import rank
from moetrain.verify.reference import AuxLosses

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def none(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """No fault: what was planted before must be gone."""


def expert_gradient_times_expert_parallel(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """Summed over the ranks that hold other experts, as if they held the same."""
    factor = run.parallel.expert_parallel
    _on_gradients(patch, lambda name: ".experts." in name, lambda grad: grad * factor)


def router_gradient_of_one_rank(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """The routers' gradients of every rank but the first are lost."""
    _on_gradients(patch, lambda name: ".router." in name, lambda grad: grad * (RANK == 0))


def aux_loss_averaged_twice(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """Over the ranks by the loss, and once more with the gradients; its value, as logged, is right."""

    class Twice(Objective):
        def __init__(self, gpt: Any, *, loss_weights: dict[str, float]) -> None:
            super().__init__(gpt, loss_weights={name: weight / RANKS for name, weight in loss_weights.items()})

    patch.setattr(setup, "Objective", Twice)


def logged_aux_loss_averaged_twice(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """The value alone."""

    class Twice(AuxLosses):
        def take(self) -> dict[str, float]:
            return {name: loss / RANKS for name, loss in super().take().items()}

    patch.setattr(rank, "AuxLosses", Twice)


def norm_without_remote_experts(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """Each rank counts the dense gradients and its own experts; it clips by that, too."""
    whole = Engine._clip_ourselves

    def faulty(self: Engine) -> float:
        groups = self._groups
        self._groups = replace(groups, expert=None)
        norm = whole(self)
        self._groups = groups
        return norm

    patch.setattr(Engine, "_clip_ourselves", faulty)


def initialisation_by_local_index(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """Every rank draws its experts as if they were the first ones."""
    whole = setup.initialize

    def faulty(gpt: Any, **settings: Any) -> None:
        experts = [module for module in gpt.modules() if isinstance(module, Experts)]
        own = [module.global_ids for module in experts]
        for module in experts:
            module.global_ids = range(len(module.global_ids))
        whole(gpt, **settings)
        for module, ids in zip(experts, own, strict=True):
            module.global_ids = ids

    patch.setattr(setup, "initialize", faulty)


def initialisation_by_world_size(patch: pytest.MonkeyPatch, run: RunConfig) -> None:
    """The same on every rank, and another on another number of them."""
    whole = setup.initialize
    patch.setattr(setup, "initialize", lambda gpt, *, init_std, seed: whole(gpt, init_std=init_std, seed=seed + RANKS))


def _on_gradients(patch: pytest.MonkeyPatch, chosen: Callable[[str], bool], change: Callable[[Tensor], Tensor]) -> None:
    whole = setup.build_model

    def faulty(*settings: Any, **more: Any) -> nn.Module:
        gpt = whole(*settings, **more)
        for name, parameter in gpt.named_parameters():
            if chosen(name):
                parameter.register_hook(change)
        return gpt

    patch.setattr(setup, "build_model", faulty)


def plant(faults: list[str]) -> None:
    """Let each layout train with its own fault."""
    train = rank._train

    def faulty(run: RunConfig, **parts: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            globals()[faults.pop(0)](patch, run)
            return train(run, **parts)

    rank._train = faulty


if __name__ == "__main__":
    plant(os.environ["PLANTED_FAULTS"].split(","))
    end_as_rank(rank.main, Path(sys.argv[1]))
