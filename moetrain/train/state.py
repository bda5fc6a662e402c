"""What a rank has built, what of it a checkpoint says, and how it is filled from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint import resume, store
from moetrain.checkpoint import state as checkpoint_state
from moetrain.checkpoint.certificate import Certificate
from moetrain.config.freeze import to_dict
from moetrain.config.schema import RunConfig
from moetrain.data.build import Corpus
from moetrain.data.loader import Batches, Rows
from moetrain.data.packing import Packing
from moetrain.parallel.groups import Groups
from moetrain.train.engine import Engine
from moetrain.train.evaluate import certify, probe_batches
from moetrain.train.loop import TrainState, step_seed
from moetrain.train.setup import MemoryGauge, Sizes
from moetrain.watch.guard import Guard
from moetrain.watch.progress import Progress
from moetrain.watch.rollback import LeftOut, updates_of


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What this rank has built, for the functions below."""

    run: RunConfig
    run_dir: Path
    groups: Groups
    sizes: Sizes
    corpus: Corpus
    batches: Batches
    packing: Packing
    engine: Engine
    gauge: MemoryGauge
    progress: Progress
    left_out: LeftOut

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.groups.topology.rank == 0


def restore(parts: Parts) -> tuple[TrainState, resume.Found | None, str]:
    """Fill the engine from the newest whole checkpoint, else from ``init.weights``; every rank takes the same.

    Returns:
        How far the run is, the checkpoint to go on from, and where the weights come from.
    """
    found = find(parts, accept=parts.left_out.allows)
    if found is None and parts.run.init.weights is not None:
        source = resume.take_weights(
            Path(parts.run.init.weights), parts.engine.fragments(), run=parts.run, group=parts.groups.control,
            tokenizer=parts.corpus.digests()["tokenizer"],
        )  # fmt: skip
        parts.engine.loaded(updates=0)
        return TrainState(), None, str(source)
    if found is None:
        return TrainState(), None, ""
    directory, manifest = found
    parts.left_out.join(manifest.watch.get("left_out", {}))
    checkpoint_state.load(directory, parts.engine.fragments(), group=parts.groups.control)
    parts.engine.loaded(updates=updates_of(manifest))
    now = certificate(parts, step=manifest.step)
    resume.hold_certificate(found, now, group=parts.groups.control, trust=parts.run.resume.trust, warn=_warn)
    return TrainState(step=manifest.step, tokens=manifest.tokens, updates=updates_of(manifest)), found, str(directory)


def find(parts: Parts, *, accept: Callable[[store.Manifest], bool]) -> resume.Found | None:
    root, data = parts.run_dir / "checkpoints", parts.corpus.digests()
    return resume.find(root, run=parts.run, data=data, group=parts.groups.control, warn=_warn, accept=accept)


def _warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def manifest_of(parts: Parts, state: TrainState, guard: Guard, *, held_out_loss: float | None) -> store.Manifest:
    topology = parts.groups.topology
    return store.Manifest(
        step=state.step,
        tokens=state.tokens,
        seed=parts.run.seed,
        world_size=topology.world_size,
        expert_parallel=topology.expert_parallel,
        run=to_dict(parts.run),
        data=parts.corpus.digests(),
        files=[],
        held_out_loss=held_out_loss,
        certificate=certificate(parts, step=state.step),
        updates=state.updates,
        watch={"guard": guard.state(), "left_out": parts.left_out.content()},
    )


def certificate(parts: Parts, *, step: int) -> Certificate:
    run = parts.run
    if run.data.stream:
        # every rank waits for the text here, not for the first one in a collective, whose patience has an end
        _own_rows(parts, step)
    return certify(
        parts.engine.gpt,
        probe_batches(parts.corpus.held_out().values(), sequence_length=parts.sizes.sequence_length),
        packing=parts.packing,
        # the first rank vouches for the whole global batch; the others need not read it
        next_batch=parts.batches.fingerprint(step) if parts.is_first else "",
        next_seed=step_seed(run.seed, step, rank=0),
        device=parts.groups.device,
        layout={
            "world_size": parts.groups.topology.world_size,
            "expert_parallel": run.parallel.expert_parallel,
            "zero_stage": run.parallel.zero_stage,
            "dtype": run.model.dtype,
        },
    )


def _own_rows(parts: Parts, step: int) -> Rows:
    topology = parts.groups.topology
    return parts.batches.rank_slice(
        step, rank=topology.rank, world_size=topology.world_size, micro_batch=parts.sizes.micro_batch
    )
