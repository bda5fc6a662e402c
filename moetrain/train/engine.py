"""DeepSpeed behind a few methods. The only place of the training path that imports it.

DeepSpeed finds expert weights by the class of the module that holds them and by marks on the parameters; both are put
on here, from outside, so that the layers know nothing of it (``adopt_experts``). Its configuration is
``config.deepspeed``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.checkpoint.state import Fragment
from moetrain.model.gpt import Block
from moetrain.model.objective import Losses, MicroBatch, Objective
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.parallel.groups import Groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """Forward, backward and optimizer step of one rank.

    Args:
        objective: the model with its loss, on this rank's device.
        groups: this rank's process groups.
        config: from ``config.deepspeed.deepspeed_config``.
        optimizer: keyword arguments of AdamW: lr, betas, eps, weight_decay.
        clip: largest global gradient norm; 0: none.
        rates: of ``router``, ``experts`` and ``dense``, the learning rate as a share of ``step``'s; 0 freezes a part:
            its gradients are 0, for the norm too. None: all 1.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        groups: Groups,
        config: dict[str, Any],
        optimizer: dict[str, Any],
        clip: float,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        self._groups, self._clip = groups, clip
        self._stage: int = config["zero_optimization"]["stage"]
        self.gpt = objective.gpt
        self._wants_counts = self.gpt.wants_counts
        self._count_LE: Tensor | None = None
        self._names = {parameter: name for name, parameter in self.gpt.named_parameters()}
        adopt_experts(self.gpt, expert_parallel=groups.topology.expert_parallel)
        if self._stage == 3:
            _leave_out_of_hooks(self.gpt)
        rates = dict(rates or {})
        _freeze(self.gpt, rates)
        adamw = torch.optim.AdamW(_parameter_groups(self.gpt, rates=rates, **optimizer), fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=_Root(objective), optimizer=adamw, config=config, dist_init_required=False
        )
        self._adamw = adamw
        self._entered = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        self._depth = len(self._entered)
        _check_groups(self.gpt, groups)
        if self._stage == 3:
            _keep_routers_whole(self.gpt)
        _start_moments(adamw, self._flats())

    def forward_backward(self, batch: MicroBatch, *, keep: Callable[[Losses], bool] | None = None) -> Losses:
        """One micro-batch; gradients are added up until ``step``.

        Args:
            keep: asked between the two passes whether the step is to be made at all; the same answer on every rank.
                None: it is.
        """
        losses: Losses
        total, losses = self._engine(batch)
        # a gradient that is no number is what ``step`` does not make on any rank. A loss that is none need not have one
        # by itself, for its value is no part of its gradient
        is_sound = torch.isfinite(total.detach())
        if keep is not None and not keep(losses):
            is_sound = torch.zeros_like(is_sound)
        total = total * torch.where(is_sound, 1.0, float("nan"))
        if self._wants_counts:
            count_LE = torch.stack([load.chosen_E for load in losses.load])
            self._count_LE = count_LE if self._count_LE is None else self._count_LE + count_LE
        self._engine.backward(total)
        # a recomputation stops as soon as it has what it needs, and leaves modules without the hook that takes them off
        del self._entered[self._depth :]
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; the optimizer steps at the boundary alone
        return losses

    def step(self, lr: float) -> float:
        """Clip and step after the last micro-batch.

        Where the norm is no finite number, nothing is changed: no weight, no moment, no count of steps, nothing that
        routers keep.

        Returns:
            The global gradient norm before clipping, each expert counted once; the same on every rank.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["rate"]
        norm = self._clip_ourselves() if self._stage == 0 else None
        self._engine.step()
        if norm is None:
            # the engine has made the step or left it, by this very number
            norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm) and self._stage in (1, 2):
            # DeepSpeed 0.19 keeps the gradients of a step that it did not make, where the optimizer is offloaded in
            # bf16, and would add the next ones to them: no step would ever be made again
            averaged = getattr(self._engine.optimizer, "averaged_gradients", {})
            averaged.update(dict.fromkeys(averaged))
        if self._count_LE is not None:
            if math.isfinite(norm):
                dist.all_reduce(self._count_LE, group=self._groups.world)
                self.gpt.after_step(self._count_LE)
            self._count_LE = None
        return norm

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of master weights and moments, as views (see ``checkpoint.state``)."""
        for parameter, flat, start, offset, numel in self._shares():
            name, numel_here = self._names[parameter], _numel(parameter)
            ranks = self._groups.topology.expert_parallel if _is_expert(parameter) else 1
            base = self._groups.topology.expert_rank * numel_here if ranks > 1 else 0
            state = self._adamw.state[flat]
            for kind, tensor in (("fp32", flat.data), *((moment, state[moment]) for moment in MOMENTS)):
                view = tensor.view(-1).narrow(0, start, numel)
                yield Fragment(f"{name}/{kind}", view, base + offset, numel_here * ranks)

        for name, state in self.gpt.moe_state().items():
            yield Fragment(f"{name}/state", state.view(-1), 0, state.numel())

    def loaded(self, *, updates: int) -> None:
        """Take over what a load has put into the views of ``fragments``.

        Args:
            updates: optimizer steps that were made, which AdamW corrects its moments by.
        """
        for state in self._adamw.state.values():
            state["step"] = torch.tensor(float(updates), device=state["exp_avg"].device)
        if self._stage == 3:
            _spread_masters(self._engine.optimizer)
        elif self._stage > 0:
            self._engine.optimizer.update_lp_params()

    def _flats(self) -> list[Tensor]:
        """What AdamW steps on: this rank's share of the master weights, one tensor for each group of parameters."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return list(self._names)
        if self._stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if hasattr(optimizer, "bit16_groups"):
            return list(optimizer.single_partition_of_fp32_groups)
        return list(optimizer.fp32_groups_flat_partition)

    def _shares(self) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
        """(parameter, flat master tensor, start in it, offset in the parameter, elements) of this rank."""
        if self._stage == 0:
            for parameter in self._names:
                yield parameter, parameter, 0, 0, parameter.numel()
            return
        if self._stage == 3:
            yield from _even_shares(self._engine.optimizer)
            return
        optimizer = self._engine.optimizer
        groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
        for parameters, flat in zip(groups, self._flats(), strict=True):
            for parameter in parameters:
                share = parameter._hp_mapping
                if share is not None:
                    high, low = share.hp_fragment_address, share.lp_fragment_address
                    yield parameter, flat, high.start, low.start, low.numel

    @torch.no_grad()
    def _clip_ourselves(self) -> float:
        grads = [parameter.grad for parameter in self._names if not _is_expert(parameter)]
        squared = torch.stack([grad.float().square().sum() for grad in grads if grad is not None]).sum()
        experts = [parameter for parameter in self._names if _is_expert(parameter)]
        if experts:
            own = torch.stack([p.grad.float().square().sum() for p in experts if p.grad is not None]).sum()
            if self._groups.expert is not None:
                dist.all_reduce(own, group=self._groups.expert)
            squared = squared + own
        norm = float(squared.sqrt())
        if not math.isfinite(norm):
            for parameter in self._names:
                parameter.grad = None  # AdamW passes over what has none
            return norm
        if self._clip and norm > self._clip:
            for parameter in self._names:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._clip / (norm + 1e-6))  # as torch and DeepSpeed do
        return norm


class _Root(nn.Module):
    """The objective with its total as a tensor by itself.

    DeepSpeed hangs what it does at the start of a backward pass on the tensors of the answer: without one, offloaded
    gradients of accumulated micro-batches are lost at ZeRO 3.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Losses]:
        losses: Losses = self.objective(batch)
        return losses.total, losses


def adopt_experts(gpt: nn.Module, *, expert_parallel: int) -> None:
    """Let DeepSpeed see the expert weights, and only them, as experts.

    Its engine looks for instances of one of its own two MoE classes to decide which gradients to average over which
    ranks, and for marks on the parameters. A module with the marks alone crashes it at ZeRO 0 to 2 and trains wrongly,
    without a word, at ZeRO 3. So the class of our experts module becomes a subclass of both: its forward stays ours,
    its parameters keep their names, and the layer above does not change.
    """
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups

    group_name = f"ep_size_{expert_parallel}"

    class AdoptedExperts(Experts, AutoEPMoELayer):
        def set_deepspeed_parallelism(
            self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
        ) -> None:
            if group_name not in groups._get_expert_parallel_group_dict():
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
                parameter.group_name = group_name
                parameter.ds_zero_placement_family = "autoep_expert"
                parameter.ds_zero_partition_group_name = group_name


def _is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def part_of(name: str) -> str:
    """router, experts or dense, by the global name of a parameter."""
    return next((part for part in ("router", "experts") if f".{part}." in name), "dense")


def _freeze(gpt: nn.Module, rates: Mapping[str, float]) -> None:
    """Gradients of 0 rather than none: the engine waits for every gradient, and a checkpoint holds every weight."""
    for name, parameter in gpt.named_parameters():
        if rates.get(part_of(name), 1.0) == 0:
            parameter.register_hook(torch.zeros_like)


def _parameter_groups(
    gpt: nn.Module, *, weight_decay: float, rates: Mapping[str, float] | None = None, **adamw: Any
) -> list[dict[str, Any]]:
    """Decayed matrices, undecayed vectors and positions, and the experts by themselves, as DeepSpeed wants them; each
    cut further where parts of the model have rates of their own."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    sorted_out: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in gpt.named_parameters():
        is_decayed = parameter.dim() > 1 and not name.startswith("positions.")
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


def _start_moments(adamw: torch.optim.AdamW, flats: list[Tensor]) -> None:
    """Give all that is stepped on its Adam state before the first step, so that a load has somewhere to put it."""
    for flat in flats:
        state = adamw.state[flat]
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(flat.data))
        state.setdefault("step", torch.zeros((), device=flat.device))


def _numel(parameter: nn.Parameter) -> int:
    # at ZeRO 3 the parameter itself is empty between its uses
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _even_shares(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
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


def _spread_masters(optimizer: Any) -> None:
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


def _leave_out_of_hooks(gpt: nn.Module) -> None:
    """ZeRO 3, before ``initialize``: modules whose answer is no tensor get no backward hooks.

    DeepSpeed brackets the backward of a module with one hook on the tensors of its answer, which gathers its weights,
    and one on its arguments, which lets them go. It does not find the tensors in our results (``Routing``,
    ``MoEOutput``, ``BlockOutput``), and then asserts that the second is never without the first. These modules have no
    weights of their own, save the routers (``_keep_routers_whole``).
    """
    for module in gpt.modules():
        if isinstance(module, MoELayer):
            module.post_bwd_fn = module.router.post_bwd_fn = _NoHook
        elif isinstance(module, Block):
            module.post_bwd_fn = _NoHook


def _keep_routers_whole(gpt: nn.Module) -> None:
    """ZeRO 3, after ``initialize``: the routers' weights, which are small, are let go at the optimizer step alone.

    Without hooks nothing would gather them again for the backward pass.
    """
    for module in gpt.modules():
        if isinstance(module, MoELayer):
            for parameter in module.router.parameters():
                parameter.is_external_param = True


def _check_groups(gpt: nn.Module, ours: Groups) -> None:
    """DeepSpeed averages gradients over its groups, our dispatch sends tokens over ours: the ranks must agree."""
    from deepspeed.utils import groups

    if not any(isinstance(module, Experts) for module in gpt.modules()):
        return
    name = f"ep_size_{ours.topology.expert_parallel}"
    for group, expected in (
        (groups._get_expert_parallel_group(name), ours.topology.expert_groups),
        (groups._get_expert_data_parallel_group(name), ours.topology.expert_data_groups),
    ):
        ranks = dist.get_process_group_ranks(group)
        assert ranks in expected, f"DeepSpeed has ranks {ranks}, we have {expected}"
        assert ours.topology.rank in ranks


def _import_deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # On CPU the engine would compile a shared-memory collective at its first start (a minute, under a lock that a
    # killed process leaves behind for ever). gloo serves as well here; tests/train/test_engine.py holds that this
    # private switch still works.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
