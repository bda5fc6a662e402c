"""A layout: how a model and its batch lie over the devices; and which layouts ``train`` runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moetrain.config.checks import CHOICES
from moetrain.config.schema import ParallelConfig

RECOMPUTE = ("none", "selective", "full")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Expert parallel x data parallel x ZeRO x recompute x micro-batch x accumulation x optimizer offload."""

    gpus: int
    """Devices, all of them data-parallel for what is not an expert."""
    expert_parallel: int = 1
    """Devices that share one set of experts, neighbours first."""
    zero_stage: int = 1
    """0 spreads nothing over the data-parallel devices, 1 the optimizer, 2 gradients too, 3 weights too."""
    recompute: str = "none"
    """Activations worked out anew in the backward pass: none; selective, all but what the experts got and answered;
    full, all inside a block."""
    micro_batch: int = 1
    """Sequences of one forward pass on one device."""
    accumulation: int = 1
    """Micro-batches of a step."""
    offload_optimizer: bool = False
    """Whether masters and moments live in the host's memory and AdamW runs there."""

    @property
    def expert_data(self) -> int:
        """Devices that hold the same experts."""
        return self.gpus // self.expert_parallel

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.gpus * self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Offer:
    """What ``train`` runs in this version: the plan proposes nothing else."""

    zero_stages: tuple[int, ...]
    recompute: tuple[str, ...]
    offload_optimizer: tuple[bool, ...]

    def takes(self, layout: Layout) -> bool:
        """Whether the layout is one that ``train`` runs."""
        return (
            layout.zero_stage in self.zero_stages
            and layout.recompute in self.recompute
            and layout.offload_optimizer in self.offload_optimizer
        )


def offered(dtype: str) -> Offer:
    """Read off the settings: a choice that ``config.checks`` comes to allow is offered without a word here."""
    settings = {field.name for field in dataclasses.fields(ParallelConfig)}
    stages = tuple(stage for stage in ZERO_STAGES if stage in CHOICES["parallel.zero_stage"])
    return Offer(
        # stage 0 takes a wrong first step in bf16, which config.checks refuses
        zero_stages=stages if dtype == "fp32" else tuple(stage for stage in stages if stage > 0),
        recompute=tuple(each for each in RECOMPUTE if each in CHOICES.get("parallel.recompute", ("none",))),
        offload_optimizer=(False, True) if "offload_optimizer" in settings else (False,),
    )


def everything() -> Offer:
    """All that the plan can work out, whether ``train`` runs it or not."""
    return Offer(zero_stages=ZERO_STAGES, recompute=RECOMPUTE, offload_optimizer=(False, True))
