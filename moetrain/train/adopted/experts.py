"""What DeepSpeed must be told of a model: which weights are experts, and how fast each learns.

It finds expert weights by the class of the module that holds them and by marks on the parameters; both are put on here,
from outside, so that the layers know nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel.groups import Groups


def import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # On CPU the engine would compile a shared-memory collective at its first start (a minute, under a lock that a
    # killed process leaves behind for ever). gloo serves as well here; tests/train/test_engine.py holds that this
    # private switch still works.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, as its engine does at its start whatever the optimizer is.

    The module asks for compiled functions, for which torch would import its whole compiler: a third of the time that
    a rank takes to start. No run here uses Muon. tests/train/test_engine.py holds that the compiler stays away.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        # where a later DeepSpeed keeps it elsewhere, only the time is lost
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def group_name(expert_parallel: int) -> str:
    """What DeepSpeed calls the groups of ranks that share the experts."""
    return f"ep_size_{expert_parallel}"


def adopt_experts(gpt: nn.Module, *, expert_parallel: int) -> None:
    """Let DeepSpeed see the expert weights, and only them, as experts.

    Its engine looks for instances of one of its own two MoE classes to decide which gradients to average over which
    ranks, and for marks on the parameters. A module with the marks alone crashes it at ZeRO 0 to 2 and trains wrongly,
    without a word, at ZeRO 3. So the class of our experts module becomes a subclass of both: its forward stays ours,
    its parameters keep their names, and the layer above does not change.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    own_group = group_name(expert_parallel)

    class AdoptedExperts(Experts, AutoEPMoELayer):
        def set_deepspeed_parallelism(
            self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
        ) -> None:
            if own_group not in groups._get_expert_parallel_group_dict():
                groups._create_expert_and_data_parallel(expert_parallel)

    for module in gpt.modules():
        if isinstance(module, MoELayer):
            for parameter in module.router.parameters():
                parameter.ds_zero_placement_family = "replicated"
        if type(module) is Experts:
            module.__class__ = AdoptedExperts
            module.num_experts = len(module.global_ids) * expert_parallel
            module.num_local_experts = len(module.global_ids)
            module.ep_size = expert_parallel
            for parameter in module.parameters():
                parameter.allreduce = False
                parameter.group_name = own_group
                parameter.ds_zero_placement_family = "autoep_expert"
                parameter.ds_zero_partition_group_name = own_group


def is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter: at ZeRO 3 it is itself empty between its uses."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def part_of(name: str) -> str:
    """router, experts or dense, by the global name of a parameter."""
    return next((part for part in ("router", "experts") if f".{part}." in name), "dense")


def freeze(gpt: nn.Module, rates: Mapping[str, float]) -> None:
    """Gradients of 0 rather than none: the engine waits for every gradient, and a checkpoint holds every weight."""
    for name, parameter in gpt.named_parameters():
        if rates.get(part_of(name), 1.0) == 0:
            parameter.register_hook(torch.zeros_like)


def parameter_groups(
    gpt: nn.Module, *, weight_decay: float, rates: Mapping[str, float] | None = None, **adamw: Any
) -> list[dict[str, Any]]:
    """Decayed matrices, undecayed vectors and positions, and the experts by themselves, as DeepSpeed wants them; each
    cut further where parts of the model have rates of their own."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    sorted_out: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in gpt.named_parameters():
        is_decayed = len(shape_of(parameter)) > 1 and not name.startswith("positions.")
        rate = (rates or {}).get(part_of(name), 1.0)
        sorted_out.setdefault((is_decayed, rate), []).append(parameter)
    groups = [
        # the names must differ, and are those of old where there is one rate alone
        {"params": parameters, "name": ("decayed" if is_decayed else "not_decayed") + ("" if rate == 1 else f" {rate}"),
         "weight_decay": weight_decay if is_decayed and rate else 0.0, "rate": rate, **adamw}
        for (is_decayed, rate), parameters in sorted(sorted_out.items(), reverse=True, key=lambda each: each[0])
    ]  # fmt: skip
    split: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]


def check_groups(gpt: nn.Module, ours: Groups) -> None:
    """DeepSpeed averages gradients over its groups, our dispatch sends tokens over ours: the ranks must agree."""
    from deepspeed.utils import groups

    if not any(isinstance(module, Experts) for module in gpt.modules()):
        return
    name = group_name(ours.topology.expert_parallel)
    for group, expected in (
        (groups._get_expert_parallel_group(name), ours.topology.expert_groups),
        (groups._get_expert_data_parallel_group(name), ours.topology.expert_data_groups),
    ):
        ranks = dist.get_process_group_ranks(group)
        assert ranks in expected, f"DeepSpeed has ranks {ranks}, we have {expected}"
        assert ours.topology.rank in ranks
