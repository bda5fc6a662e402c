"""ZeRO 3: a model that is cut over the ranks as it is built, and what DeepSpeed needs to train ours."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.model.gpt import Block
from moetrain.moe.layer import MoELayer
from moetrain.train.adopted.experts import adopt_experts, group_name, import_deepspeed, is_expert


@torch.no_grad()
def cut(part: nn.Module, *, expert_parallel: int, config: dict[str, Any], device: torch.device) -> None:
    """Leave this rank its share of the weights of a part of a model, which has its first values, and free the rest.

    Done part by part while a model is built, no rank ever holds more than a part of it and its shares. DeepSpeed cuts
    what is still whole when the engine is made.

    Args:
        part: on any device; its weights move to ``device``, in the dtype that the model computes with.
        config: as the engine's.
    """
    deepspeed = import_deepspeed()
    from deepspeed.utils import groups

    # else ``Init`` takes the ranks for one, as it reads the settings first
    deepspeed.init_distributed(deepspeed.get_accelerator().communication_backend_name(), verbose=False,
                               dist_init_required=False)  # fmt: skip
    adopt_experts(part, expert_parallel=expert_parallel)
    name, has_experts = group_name(expert_parallel), any(map(is_expert, part.parameters()))
    if has_experts and name not in groups._get_expert_data_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    for parameter in part.parameters():
        parameter.data = parameter.data.to(device, dtype)
        if is_expert(parameter):
            parameter.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)
    deepspeed.zero.Init(module=part, config_dict_or_path=deepcopy(config), dtype=dtype)


def even_shares(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
    """The shares of ZeRO 3: each parameter is cut evenly over its ranks, the last of them padded."""
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            offset = dist.get_rank(parameter.ds_process_group) * size
            numel = min(size, parameter.ds_numel - offset)
            if numel > 0:
                yield parameter, flat, start, offset, numel
            start += size


def spread_masters(optimizer: Any) -> None:
    """ZeRO 3: bring what was loaded into the master weights to the weights that the model computes with."""
    optimizer.checkpoint_event_prologue()
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
        optimizer._unflatten_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


class _NoHook:
    """In the place of the function by which DeepSpeed learns that a module's backward is over."""

    @staticmethod
    def apply(tensor: Tensor) -> Tensor:
        return tensor


def leave_out_of_hooks(gpt: nn.Module) -> None:
    """ZeRO 3, before ``initialize``: modules whose answer is no tensor get no backward hooks.

    DeepSpeed brackets the backward of a module with one hook on the tensors of its answer, which gathers its weights,
    and one on its arguments, which lets them go. It does not find the tensors in our results (``Routing``,
    ``MoEOutput``, ``BlockOutput``), and then asserts that the second is never without the first. These modules have no
    weights of their own, save the routers (``keep_routers_whole``).
    """
    for module in gpt.modules():
        if isinstance(module, MoELayer):
            module.post_bwd_fn = module.router.post_bwd_fn = _NoHook
        elif isinstance(module, Block):
            module.post_bwd_fn = _NoHook


def keep_routers_whole(gpt: nn.Module) -> None:
    """ZeRO 3, after ``initialize``: the routers' weights, which are small, are let go at the optimizer step alone.

    Without hooks nothing would gather them again for the backward pass.
    """
    for module in gpt.modules():
        if isinstance(module, MoELayer):
            for parameter in module.router.parameters():
                parameter.is_external_param = True
