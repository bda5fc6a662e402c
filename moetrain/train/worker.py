"""One rank's work: ``python -m moetrain.train.worker RUN_DIR``. The only place that builds everything."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.parallel.lifeline import die_with_parent, write_error

if __name__ == "__main__":
    # before torch is imported, which takes seconds: a launcher that dies meanwhile must not leave this rank behind
    die_with_parent()

import torch

from moetrain.checkpoint import resume, store
from moetrain.checkpoint import state as checkpoint_state
from moetrain.checkpoint.certificate import Certificate
from moetrain.checkpoint.remote import Remote
from moetrain.checkpoint.saver import Saver
from moetrain.config.freeze import read_run, to_dict
from moetrain.config.schema import RunConfig
from moetrain.data.build import Corpus, make_batches, open_corpus
from moetrain.data.loader import Ahead, Batches, Rows, Source
from moetrain.data.packing import Packing
from moetrain.errors import MoetrainError
from moetrain.metrics.live import LiveView
from moetrain.metrics.log import MetricsLog, WandbLog, open_wandb
from moetrain.model.objective import MicroBatch
from moetrain.parallel import groups as process_groups
from moetrain.parallel.groups import Groups
from moetrain.parallel.lifeline import STOPPED
from moetrain.plan.flops import expert_share
from moetrain.plan.published import expect
from moetrain.stream.feed import streamed
from moetrain.train.engine import Engine
from moetrain.train.evaluate import Evaluator, certify, probe_batches
from moetrain.train.hooks import Clock, EvaluateHook, LogHook, PlanCheck, Record, SaveHook, evaluation_fields
from moetrain.train.loop import Plan, StopRequest, TrainState, step_seed, train
from moetrain.train.setup import MemoryGauge, Sizes, build_engine, make_meter, make_schedule, make_speed, micro_batches


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

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.groups.topology.rank == 0


def run_rank(run_dir: Path) -> bool:
    """Train, or finish the training, of the run in ``run_dir``.

    Returns:
        Whether the run is at its end; False: it stopped because it was asked to.
    """
    run = read_run(run_dir)
    # before the groups are: a rank that reads from the stream has then met the one that has begun it
    with streamed(run, run_dir, is_first=os.environ.get("RANK", "0") == "0") as sequences:
        return _run_rank(run, run_dir, streamed=sequences)


def _run_rank(run: RunConfig, run_dir: Path, *, streamed: Source | None) -> bool:
    groups = process_groups.start(
        expert_parallel=run.parallel.expert_parallel or 1,
        timeout_seconds=run.launch.timeout_seconds,
        two_level=run.parallel.two_level_all_to_all,
    )
    gauge = MemoryGauge(groups.device)
    stop = StopRequest(groups.control)
    sizes = Sizes.of(run, world_size=groups.topology.world_size)
    corpus = open_corpus(run, run_dir)
    engine = build_engine(
        run,
        groups=groups,
        sizes=sizes,
        frequency=lambda: torch.from_numpy(corpus.frequencies(run.model.vocab_size)),
    )
    parts = Parts(
        run=run,
        run_dir=run_dir,
        groups=groups,
        sizes=sizes,
        corpus=corpus,
        batches=make_batches(run, corpus, streamed=streamed),
        packing=corpus.packing(run.data),
        engine=engine,
        gauge=gauge,
    )
    if parts.is_first:
        # this rank's stderr is a log file; what our own modules warn of is for the person at the terminal
        logging.getLogger("moetrain").addHandler(logging.StreamHandler(sys.stdout))
    state, resumed_from = _restore(parts)
    log = MetricsLog(run_dir, resume_step=state.step) if parts.is_first else None
    wandb = _wandb(parts) if parts.is_first else None

    def record(line: dict[str, Any]) -> None:
        for each in (log, wandb):
            if each is not None:
                each.write(line)

    evaluator = _evaluator(parts)
    if state.step < sizes.steps:
        with _view(parts, done=state.step) as bar:
            if resumed_from:
                bar.say(f"{'resumed' if state.step else 'weights'} from {resumed_from} at step {state.step:,}")
            _train(parts, state, evaluator=evaluator, stop=stop, record=record, bar=bar)
    finished = state.step >= sizes.steps
    if finished:
        record(evaluation_fields(evaluator.all_of_it(), state=state) | {"final": True})
    if wandb is not None:
        wandb.close()
    return finished


def _view(parts: Parts, *, done: int) -> LiveView:
    run, sizes = parts.run, parts.sizes
    return LiveView(
        total=sizes.steps,
        done=done,
        shown=parts.is_first,
        expert_parallel=parts.groups.topology.expert_parallel,
        expert_share=expert_share(run.model, sequence_length=sizes.sequence_length),
        tokens_per_step=sizes.tokens_per_step,
    )


def _train(
    parts: Parts, state: TrainState, *, evaluator: Evaluator, stop: StopRequest, record: Record, bar: LiveView
) -> None:
    run, groups, sizes = parts.run, parts.groups, parts.sizes
    clock = Clock()
    check = _plan_check(parts, say=bar.say) if parts.is_first else None

    def take(line: dict[str, Any]) -> None:
        record(line)
        if check is not None:
            check.take(line)

    log = LogHook(
        every_steps=run.log.every_steps,
        steps=sizes.steps,
        speed=make_speed(run, groups=groups, sizes=sizes),
        peak_memory=parts.gauge.peak,
        meter=make_meter(run, groups.device, dead_after=run.log.dead_after_steps),
        group=groups.world,
        record=take,
        bar=bar,
        clock=clock,
    )
    evaluation = EvaluateHook(
        every_steps=run.evaluate.every_steps,
        steps=sizes.steps,
        evaluate=evaluator.some_of_it,
        record=record,
        bar=bar,
        clock=clock,
    )
    save = _save_hook(parts, flush=log.flush, loss_at=evaluation.loss_at, stop=stop, bar=bar, clock=clock)
    plan = Plan(
        steps=sizes.steps,
        schedule=make_schedule(run, sizes=sizes),
        batch=_batch_reader(parts),
        tokens_per_step=sizes.tokens_per_step,
        seed=run.seed,
        hooks=(log, evaluation, save),
        stop=stop,
    )
    log.start(state)
    try:
        train(parts.engine, plan=plan, state=state, rank=groups.topology.rank)
    except MoetrainError:
        # all ranks have it, and the checkpoint that is being written is the one to go on from
        save.settle()
        raise
    if state.step < sizes.steps:
        save.save(state)
    save.finish()
    if state.step < sizes.steps:
        bar.say(f"saved at step {state.step:,}")


def _wandb(parts: Parts) -> WandbLog | None:
    run = parts.run
    return open_wandb(
        parts.run_dir, mode=run.log.wandb, project=run.log.wandb_project, name=str(run.name), config=to_dict(run)
    )


def _plan_check(parts: Parts, *, say: Callable[[str], None]) -> PlanCheck:
    device = parts.groups.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    expected = expect(parts.run, device=device.type, device_name=name)
    return PlanCheck(expected, run_dir=parts.run_dir, step_tokens=parts.sizes.tokens_per_step, say=say)


def _save_hook(
    parts: Parts,
    *,
    flush: Callable[[TrainState], None],
    loss_at: Callable[[int], float | None],
    stop: StopRequest,
    bar: LiveView,
    clock: Clock,
) -> SaveHook:
    given = parts.run.checkpoint
    saver = Saver(
        parts.run_dir / "checkpoints",
        group=parts.groups.writer,
        retention=store.Retention.of(given),
        asynchronous=given.asynchronous,
        remote=None if given.remote is None else Remote(given.remote),
    )
    if given.on_failure == "stop":
        stop.also(saver.has_failed)
    return SaveHook(
        every_steps=given.every_steps,
        every_minutes=given.every_minutes,
        steps=parts.sizes.steps,
        flush=flush,
        saver=saver,
        fragments=parts.engine.fragments,
        manifest=lambda now: _manifest(parts, now, held_out_loss=loss_at(now.step)),
        go_on=given.on_failure == "go_on",
        warn=bar.say,
        control=parts.groups.control,
        clock=clock,
    )


def _restore(parts: Parts) -> tuple[TrainState, str]:
    """Fill the engine from the newest whole checkpoint, if there is one; every rank takes the same one."""

    def warn(message: str) -> None:
        print(f"warning: {message}", flush=True)

    run, control = parts.run, parts.groups.control
    root = parts.run_dir / "checkpoints"
    found = resume.find(root, run=run, data=parts.corpus.digests(), group=control, warn=warn)
    if found is None and run.init.weights is not None:
        source = resume.take_weights(Path(run.init.weights), parts.engine.fragments(), run=run, group=control,
                                     tokenizer=parts.corpus.digests()["tokenizer"])  # fmt: skip
        parts.engine.loaded(step=0)
        return TrainState(), str(source)
    if found is None:
        return TrainState(), ""
    directory, manifest = found
    checkpoint_state.load(directory, parts.engine.fragments(), group=control)
    parts.engine.loaded(step=manifest.step)
    now = _certificate(parts, step=manifest.step)
    resume.hold_certificate(found, now, group=control, trust=run.resume.trust, warn=warn)
    return TrainState(step=manifest.step, tokens=manifest.tokens), str(directory)


def _manifest(parts: Parts, state: TrainState, *, held_out_loss: float | None) -> store.Manifest:
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
        certificate=_certificate(parts, step=state.step),
    )


def _certificate(parts: Parts, *, step: int) -> Certificate:
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


def _batch_reader(parts: Parts) -> Callable[[int], Sequence[MicroBatch]]:
    def read(step: int) -> Sequence[MicroBatch]:
        return micro_batches(
            parts.batches,
            step,
            packing=parts.packing,
            topology=parts.groups.topology,
            micro_batch=parts.sizes.micro_batch,
            device=parts.groups.device,
        )

    return Ahead(read, steps=parts.sizes.steps)


def _evaluator(parts: Parts) -> Evaluator:
    return Evaluator(
        parts.engine.gpt,
        parts.corpus.held_out(),
        sequence_length=parts.sizes.sequence_length,
        micro_batch=parts.sizes.micro_batch,
        packing=parts.packing,
        max_sequences=parts.run.evaluate.max_sequences,
        meter=make_meter(parts.run, parts.groups.device),
        groups=parts.groups,
    )


def main(run_dir: Path) -> int:
    """Run a rank and leave its error, if there is one, where the launcher looks for it.

    Returns:
        The exit code: 0 finished, 75 stopped on request, 2 a fault the user can mend, 1 any other.
    """
    try:
        finished = run_rank(run_dir)
    except BaseException as error:  # some of torch.distributed's are no Exception
        write_error(run_dir / "log", rank=int(os.environ.get("RANK", "0")), error=error,
                    user=isinstance(error, MoetrainError))  # fmt: skip
        traceback.print_exc()
        return 2 if isinstance(error, MoetrainError) else 1
    process_groups.stop()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # not sys.exit: after a failure, the threads of a process group that waits for a dead rank would keep us alive
    os._exit(code)
