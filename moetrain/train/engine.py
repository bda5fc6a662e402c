"""DeepSpeed behind a few methods. ``config.deepspeed`` has its settings, ``adopted`` tells it about the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.checkpoint.state import Fragment
from moetrain.model.objective import Losses, MicroBatch, Objective
from moetrain.parallel.groups import Groups
from moetrain.train.adopted.experts import (
    adopt_experts,
    check_groups,
    freeze,
    import_deepspeed,
    is_expert,
    parameter_groups,
    shape_of,
)
from moetrain.train.adopted.stage3 import even_shares, keep_routers_whole, leave_out_of_hooks, spread_masters

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine:
    """Forward, backward and optimizer step of one rank.

    Args:
        objective: the model with its loss, on this rank's device; at ZeRO 3 it may be cut already (``stage3.cut``).
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
        deepspeed = import_deepspeed()
        self._groups, self._clip = groups, clip
        self._stage: int = config["zero_optimization"]["stage"]
        self.gpt = objective.gpt
        self._wants_counts = self.gpt.wants_counts
        self._count_LE: Tensor | None = None
        self._names = {parameter: name for name, parameter in self.gpt.named_parameters()}
        adopt_experts(self.gpt, expert_parallel=groups.topology.expert_parallel)
        if self._stage == 3:
            leave_out_of_hooks(self.gpt)
        rates = dict(rates or {})
        freeze(self.gpt, rates)
        adamw = torch.optim.AdamW(parameter_groups(self.gpt, rates=rates, **optimizer), fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=_Root(objective), optimizer=adamw, config=config, dist_init_required=False
        )
        self._adamw = adamw
        self._entered = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK
        self._depth = len(self._entered)
        check_groups(self.gpt, groups)
        if self._stage == 3:
            keep_routers_whole(self.gpt)
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
            name, numel_here = self._names[parameter], shape_of(parameter).numel()
            ranks = self._groups.topology.expert_parallel if is_expert(parameter) else 1
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
            spread_masters(self._engine.optimizer)
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
            yield from even_shares(self._engine.optimizer)
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
        grads = [parameter.grad for parameter in self._names if not is_expert(parameter)]
        squared = torch.stack([grad.float().square().sum() for grad in grads if grad is not None]).sum()
        experts = [parameter for parameter in self._names if is_expert(parameter)]
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


def _start_moments(adamw: torch.optim.AdamW, flats: list[Tensor]) -> None:
    """Give all that is stepped on its Adam state before the first step, so that a load has somewhere to put it."""
    for flat in flats:
        state = adamw.state[flat]
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(flat.data))
        state.setdefault("step", torch.zeros((), device=flat.device))
