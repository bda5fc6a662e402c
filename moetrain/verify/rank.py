"""One rank of a verification: ``python -m moetrain.verify.rank DIR``.

Each layout goes through the engine and the loop that training has; rank 0 then holds it against one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moetrain.parallel.lifeline import die_with_parent, end_as_rank

if __name__ == "__main__":
    # before torch is imported, which takes seconds: a launcher that dies meanwhile must not leave this rank behind
    die_with_parent()

import logging
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint.state import Fragment
from moetrain.config.checks import steps_in_run
from moetrain.config.schema import RunConfig
from moetrain.data.loader import Batches, Sequences
from moetrain.model.objective import MicroBatch
from moetrain.parallel import groups as process_groups
from moetrain.parallel.groups import Groups
from moetrain.parallel.seeds import derive_seed
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine
from moetrain.train.loop import Plan, StepResult, TrainState, train
from moetrain.train.schedule import Schedule
from moetrain.train.setup import Sizes, build_engine, micro_batches
from moetrain.verify.compare import Reference, compare
from moetrain.verify.reference import AuxLosses, StepTrace, Trace, Whole, build, packing_of, train_plainly
from moetrain.verify.shrink import TOKENS, Split, lay_out, split_of
from moetrain.verify.spec import add_result, read_spec
from moetrain.watch.guard import Unwatched

SAME_COPY = 1e-5
"""Relative difference between two ranks' copies of a number that is still rounding."""


def run_rank(directory: Path) -> None:
    """Every layout in turn: starting processes costs more than a few steps of a small model."""
    spec = read_spec(directory)
    for layout in spec.layouts:
        assert layout.ranks == int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=spec.run.launch.timeout_seconds)
    first = process_groups.start(expert_parallel=1, timeout_seconds=timeout.total_seconds())
    data = _Data.of(spec.run)
    references: dict[tuple[str, Split], Reference] = {}
    for layout in spec.layouts:
        run = lay_out(spec.run, layout)
        topology = Topology(world_size=layout.ranks, rank=first.topology.rank, expert_parallel=layout.expert_parallel)
        groups = process_groups.make(topology, device=first.device, timeout=timeout)
        found = _train(run, groups=groups, data=data)
        if found is not None:
            key = layout.dtype, split_of(run, layout)
            if key not in references:
                references[key] = _reference(run, split=key[1], data=data)
            add_result(directory, compare(found, references[key], layout=layout))


@dataclass(frozen=True, kw_only=True)
class _Data:
    """Random tokens instead of text; what the model should learn is no matter here."""

    batches: Batches
    frequency_V: Tensor

    @staticmethod
    def of(run: RunConfig) -> _Data:
        vocab, length = run.model.vocab_size, run.sequence_length
        # the square makes some tokens common: an even load would hide what skew brings to light
        draws = np.random.default_rng(derive_seed(run.seed, "verify")).random(TOKENS) ** 2
        tokens = (draws * vocab).astype(np.uint16)
        return _Data(
            batches=Batches(
                [Sequences(tokens, sequence_length=length, seed=run.seed)], global_batch=run.batch.global_batch
            ),
            frequency_V=torch.from_numpy(np.bincount(tokens, minlength=vocab)),
        )


def _reference(run: RunConfig, *, split: Split, data: _Data) -> Reference:
    plain = build(run, frequency_V=data.frequency_V)
    trace = train_plainly(plain, run, batches=data.batches, split=split, steps=_steps(run))
    return Reference.of(trace, gpt=plain.gpt)


def _train(run: RunConfig, *, groups: Groups, data: _Data) -> Trace | None:
    """The run through the engine, its traces brought together on rank 0; None on the others."""
    sizes = Sizes.of(run, world_size=groups.topology.world_size)
    engine = build_engine(run, groups=groups, sizes=sizes, frequency=lambda: data.frequency_V)

    def batch(step: int) -> list[MicroBatch]:
        return micro_batches(data.batches, step, packing=packing_of(run), topology=groups.topology,
                             micro_batch=sizes.micro_batch, device=groups.device)  # fmt: skip

    plan = Plan(
        steps=_steps(run),
        schedule=Schedule(kind="constant", peak=run.optim.lr, steps=_steps(run), warmup=0, decay=0, min_ratio=1.0),
        batch=batch,
        tokens_per_step=sizes.tokens_per_step,
        seed=run.seed,
        hooks=(),
        watch=Unwatched(),
    )
    with AuxLosses(engine.gpt) as aux:
        recorder = _Recorder(engine, aux=aux, groups=groups, run=run)
        train(engine, plan=replace(plan, hooks=(recorder,)), state=TrainState(), rank=groups.topology.rank)
    steps = _gather_steps(recorder.steps, groups)
    if recorder.gradient is None:
        return None
    return Trace(steps=steps, gradient=recorder.gradient, after=recorder.after)


class _Recorder:
    """A hook of the training loop that keeps what the steps gave, and on rank 0 the tensors of all ranks."""

    def __init__(self, engine: Engine, *, aux: AuxLosses, groups: Groups, run: RunConfig) -> None:
        self._engine, self._aux, self._groups, self._run = engine, aux, groups, run
        self.steps: list[StepTrace] = []
        self.gradient: Whole | None = None
        self.after: dict[int, Whole] = {}
        self._keep(0, [part for part in self._own() if part.name.endswith("/fp32")])

    def after_step(self, state: TrainState, result: StepResult) -> None:
        language = torch.stack([losses.language for losses in result.micro_batches]).mean().item()
        self.steps.append(StepTrace(language=language, aux=self._aux.take(), norms=[result.grad_norm]))
        if state.step == 1:
            self.gradient = _gather(self._gradient(result.grad_norm), self._groups)
        if state.step in (1, _steps(self._run)):
            self._keep(state.step, self._own())

    def _own(self) -> list[Fragment]:
        return [replace(each, view=each.view.detach().cpu().float().clone()) for each in self._engine.fragments()]

    def _keep(self, step: int, parts: list[Fragment]) -> None:
        whole = _gather(parts, self._groups)
        if whole is not None:
            self.after[step] = whole

    def _gradient(self, norm: float) -> list[Fragment]:
        """The first moment after one step is (1 - beta1) x the clipped gradient, on every layout and stage."""
        # what the rank clipped by is undone by the norm it told, so that a wrong norm shows as that and nothing else
        clip = self._run.optim.clip
        factor = (max(1.0, (norm + 1e-6) / clip) if clip else 1.0) / (1 - self._run.optim.beta1)
        return [
            replace(part, name=part.name.removesuffix("/exp_avg"), view=part.view * factor)
            for part in self._own()
            if part.name.endswith("/exp_avg")
        ]


def _gather(own: list[Fragment], groups: Groups) -> Whole | None:
    """Every tensor put together from the ranks' intervals, on rank 0; None on the others."""
    of_ranks: list[list[Fragment]] | None = None
    if groups.topology.rank == 0:
        of_ranks = [[] for _ in range(groups.topology.world_size)]
    dist.gather_object(own, of_ranks, dst=0, group=groups.control)
    if of_ranks is None:
        return None
    whole = Whole(tensors={})
    for part in (part for of_rank in of_ranks for part in of_rank):
        tensor = whole.tensors.setdefault(part.name, torch.full((part.global_numel,), float("nan")))
        here = tensor[part.offset : part.offset + part.view.numel()]
        both = ~here.isnan()
        if not torch.allclose(here[both], part.view[both], rtol=SAME_COPY, atol=0.0):
            whole.torn.add(part.name)
        here.copy_(part.view)
    return whole


def _gather_steps(steps: list[StepTrace], groups: Groups) -> list[StepTrace]:
    """Losses averaged over the ranks, and the norm that each told."""
    of_ranks: list[list[StepTrace]] = [[] for _ in range(groups.topology.world_size)]
    dist.all_gather_object(of_ranks, steps, group=groups.control)
    return [
        StepTrace(
            language=float(np.mean([each.language for each in same])),
            aux={name: float(np.mean([each.aux[name] for each in same])) for name in same[0].aux},
            norms=[each.norms[0] for each in same],
        )
        for same in zip(*of_ranks, strict=True)
    ]


def _steps(run: RunConfig) -> int:
    return steps_in_run(run.schedule, tokens_per_step=1)


def main(directory: Path) -> int:
    """Run a rank; returns the exit code."""
    logging.disable(logging.WARNING)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what DeepSpeed prints goes to the log, not across the bar
    torch.set_num_threads(1)  # tensors are small: more threads only wait for each other
    run_rank(directory)
    dist.barrier()  # a rank that leaves early would break the collectives of those behind it
    return 0


if __name__ == "__main__":
    end_as_rank(main, Path(sys.argv[1]))
