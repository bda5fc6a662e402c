"""One process, torch alone: a plain loop with ``clip_grad_norm_`` and AdamW. No DeepSpeed, no groups, no engine.

It leaves a ``Trace``, and so does a run on any layout (``rank``), to be held against it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moetrain.config.routers import loss_weights
from moetrain.config.schema import OptimConfig, RunConfig
from moetrain.data.loader import Batches
from moetrain.data.packing import Packing
from moetrain.model.build import build_model, expert_table, initialize
from moetrain.model.gpt import GPT
from moetrain.model.objective import MicroBatch, Objective
from moetrain.moe.layer import MoELayer, MoEOutput
from moetrain.parallel.seeds import derive_seed
from moetrain.verify.shrink import Split


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


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A model and what trains it.

    Attributes:
        gpt: every expert of it, in the run's dtype.
        masters: float32 copy of each parameter, by its name; gradients are added up here, in float32.
    """

    gpt: GPT
    objective: Objective
    masters: dict[str, nn.Parameter]
    adamw: torch.optim.AdamW


def build(run: RunConfig, *, frequency_V: Tensor) -> Plain:
    """The model of a run in one process.

    Args:
        frequency_V: how often each token id occurs.
    """
    gpt = build_model(run.model, expert_V=expert_table(run.model, seed=run.seed, frequency=lambda: frequency_V))
    initialize(gpt, init_std=run.model.init_std, seed=run.seed)
    if run.model.dtype == "bf16":
        gpt.bfloat16()
    masters = {name: nn.Parameter(weight.detach().float().clone()) for name, weight in gpt.named_parameters()}
    objective = Objective(gpt, loss_weights=loss_weights(run.model.moe) if run.model.moe else {})
    return Plain(gpt=gpt, objective=objective, masters=masters, adamw=_adamw(masters, optim=run.optim))


def train_plainly(plain: Plain, run: RunConfig, *, batches: Batches, split: Split, steps: int) -> Trace:
    """The first steps of a run, without any of the machinery that layouts need.

    Args:
        batches: the global batch of each step.
        split: into how many passes a batch is divided.
    """
    masters = plain.masters
    after = {0: Whole(tensors={f"{name}/fp32": master.detach().clone().flatten() for name, master in masters.items()})}
    traces, gradient = [], {}
    with AuxLosses(plain.gpt) as aux:
        for step in range(steps):
            seeds = [derive_seed(run.seed, step, rank) for rank in range(split.ranks)]
            language = _add_up_gradients(
                plain, batches.at(step).tokens, packing=packing_of(run), split=split, seeds=seeds
            )
            if step == 0:
                gradient = {name: _gradient(master).clone().flatten() for name, master in masters.items()}
            norm = nn.utils.clip_grad_norm_(masters.values(), run.optim.clip or float("inf")).item()
            plain.adamw.step()
            plain.adamw.zero_grad()
            with torch.no_grad():
                for name, weight in plain.gpt.named_parameters():
                    weight.copy_(masters[name])
            traces.append(StepTrace(language=language, aux=aux.take(), norms=[norm]))
            if step + 1 in (1, steps):
                after[step + 1] = _snapshot(plain)
    return Trace(steps=traces, gradient=Whole(tensors=gradient), after=after)


def packing_of(run: RunConfig) -> Packing:
    """What documents see of each other; the random text has one wherever its commonest token is."""
    data = run.data
    return Packing(end_of_text=0, mask_documents=data.mask_documents, reset_positions=data.reset_positions)


def _add_up_gradients(
    plain: Plain, rows: npt.NDArray[np.int64], *, packing: Packing, split: Split, seeds: list[int]
) -> float:
    """Forward and backward of a global batch; returns the mean language loss."""
    passes = split.accumulation * split.ranks
    # row i belongs to micro-batch i // (ranks x M), and there to rank i // M % ranks (``Batches.rank_slice``)
    micro_batches = rows.reshape(split.accumulation, split.ranks, -1, rows.shape[1])
    language, counts = 0.0, []
    for rank, seed in enumerate(seeds):
        torch.manual_seed(seed)
        for micro in micro_batches[:, rank]:
            losses = plain.objective(_given(micro, packing=packing))
            (losses.total / passes).backward()
            language += losses.language.item() / passes
            if losses.load:
                counts.append(torch.stack([load.chosen_E for load in losses.load]))
            for name, weight in plain.gpt.named_parameters():
                if weight.grad is not None and plain.masters[name].requires_grad:
                    plain.masters[name].grad = _gradient(plain.masters[name]) + weight.grad.float()
                weight.grad = None
    if counts:
        plain.gpt.after_step(torch.stack(counts).sum(0))
    return language


def _given(rows: npt.NDArray[np.int64], *, packing: Packing) -> MicroBatch:
    documents, positions = packing.documents(rows[:, :-1]), packing.positions(rows[:, :-1])
    whole = torch.from_numpy(rows)
    return MicroBatch(
        token_BS=whole[:, :-1].contiguous(),
        target_BS=whole[:, 1:].contiguous(),
        document_BS=None if documents is None else torch.from_numpy(documents),
        position_BS=None if positions is None else torch.from_numpy(positions),
    )


def _gradient(master: nn.Parameter) -> Tensor:
    return torch.zeros_like(master) if master.grad is None else master.grad


def _adamw(masters: dict[str, nn.Parameter], *, optim: OptimConfig) -> torch.optim.AdamW:
    """Matrices decay, and nothing else: neither norms nor biases nor embeddings of positions. A frozen weight is given
    no gradient, so that AdamW passes over it."""
    groups = []
    for name, master in masters.items():
        rate = _rate(name, optim=optim)
        master.requires_grad_(rate > 0)
        decays = master.dim() > 1 and not name.startswith("positions.")
        groups.append({"params": [master], "lr": rate, "weight_decay": optim.weight_decay if decays else 0.0})
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=False)


def _rate(name: str, *, optim: OptimConfig) -> float:
    part = "router" if ".router." in name else "experts" if ".experts." in name else "dense"
    ratio = {"router": optim.router_lr_ratio, "experts": optim.experts_lr_ratio, "dense": 1.0}[part]
    return 0.0 if part in optim.freeze else optim.lr * ratio


def _snapshot(plain: Plain) -> Whole:
    tensors = {f"{name}/state": tensor.clone().flatten() for name, tensor in plain.gpt.moe_state().items()}
    for name, master in plain.masters.items():
        tensors[f"{name}/fp32"] = master.detach().clone().flatten()
        state = plain.adamw.state[master]
        for moment in ("exp_avg", "exp_avg_sq"):
            # a weight without a gradient has no state: its moments are 0
            tensors[f"{name}/{moment}"] = (state[moment].clone() if state else torch.zeros_like(master)).flatten()
    return Whole(tensors={name: tensor.detach() for name, tensor in tensors.items()})
