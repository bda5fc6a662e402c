"""One rank's work: ``python -m moetrain.train.worker RUN_DIR``. The only place that builds everything."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.parallel.lifeline import die_with_parent, end_as_rank

if __name__ == "__main__":
    # before torch is imported, which takes seconds: a launcher that dies meanwhile must not leave this rank behind
    die_with_parent()

import torch

from moetrain.checkpoint import resume, store
from moetrain.checkpoint import state as checkpoint_state
from moetrain.checkpoint.remote import Remote
from moetrain.checkpoint.saver import Saver
from moetrain.config.freeze import read_run, to_dict
from moetrain.config.schema import RunConfig
from moetrain.data.build import make_batches, open_corpus
from moetrain.data.loader import Ahead, Source
from moetrain.errors import MoetrainError
from moetrain.metrics.live import LiveView
from moetrain.metrics.log import MetricsLog, WandbLog, open_wandb
from moetrain.model.objective import MicroBatch
from moetrain.parallel import groups as process_groups
from moetrain.parallel.lifeline import STOPPED
from moetrain.plan.flops import expert_share
from moetrain.plan.published import expect
from moetrain.stream.feed import streamed
from moetrain.train.evaluate import Evaluator
from moetrain.train.hooks.evaluate import EvaluateHook, evaluation_fields
from moetrain.train.hooks.log import Clock, LogHook
from moetrain.train.hooks.plan import PlanCheck
from moetrain.train.hooks.save import SaveHook
from moetrain.train.loop import Plan, StopRequest, TrainState, train
from moetrain.train.setup import MemoryGauge, Sizes, build_engine, make_meter, make_schedule, make_speed, micro_batches
from moetrain.train.state import Parts, find, manifest_of, restore
from moetrain.watch.guard import Guard
from moetrain.watch.incidents import Incidents, Tell, silence
from moetrain.watch.progress import TRAINING, Progress
from moetrain.watch.rank import OwnTime, watched
from moetrain.watch.rollback import GoBack, LeftOut, updates_of


def run_rank(run_dir: Path) -> bool:
    """Train, or finish the training, of the run in ``run_dir``.

    Returns:
        Whether the run is at its end; False: it stopped because it was asked to.
    """
    begun = time.monotonic()
    run = read_run(run_dir)
    # before the groups are: a rank that reads from the stream has then met the one that has begun it
    with streamed(run, run_dir, is_first=os.environ.get("RANK", "0") == "0") as sequences:
        return _run_rank(run, run_dir, streamed=sequences, begun=begun)


def _run_rank(run: RunConfig, run_dir: Path, *, streamed: Source | None, begun: float) -> bool:
    progress = Progress()
    groups = process_groups.start(
        expert_parallel=run.parallel.expert_parallel or 1,
        timeout_seconds=run.launch.timeout_seconds,
        two_level=run.parallel.two_level_all_to_all,
        watcher=progress,
    )
    gauge = MemoryGauge(groups.device)
    stop = StopRequest()
    limit = run.launch.stop_after_minutes
    if limit is not None:
        stop.also(lambda: time.monotonic() - begun > 60 * limit)
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
        progress=progress,
        left_out=resume.from_first(lambda: LeftOut.read(run_dir), group=groups.control),
    )
    with watched(engine.gpt, run.watch, timeout_seconds=run.launch.timeout_seconds, run_dir=run_dir, groups=groups,
                 progress=progress) as own_time:  # fmt: skip
        return _run(parts, stop=stop, own_time=own_time)


@dataclass(frozen=True)
class Numbers:
    """Where the metrics go; nowhere on every rank but the first."""

    log: MetricsLog | None = None
    wandb: WandbLog | None = None

    def record(self, line: dict[str, Any]) -> None:
        """Write one line."""
        for each in (self.log, self.wandb):
            if each is not None:
                each.write(line)

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps; what is on Weights & Biases is drawn over."""
        if self.log is not None:
            self.log.go_back(step)


def _run(parts: Parts, *, stop: StopRequest, own_time: OwnTime | None) -> bool:
    run, run_dir, sizes = parts.run, parts.run_dir, parts.sizes
    if parts.is_first:
        # this rank's stderr is a log file; what our own modules warn of is for the person at the terminal
        logging.getLogger("moetrain").addHandler(logging.StreamHandler(sys.stdout))
    state, found, source = restore(parts)
    numbers = Numbers()
    if parts.is_first:
        numbers = Numbers(
            MetricsLog(run_dir, resume_step=state.step),
            open_wandb(run_dir, mode=run.log.wandb, project=run.log.wandb_project, name=str(run.name),
                       config=to_dict(run)),
        )  # fmt: skip
    evaluator = _evaluator(parts)
    if state.step < sizes.steps:
        with _view(parts, done=state.step) as bar:
            if source:
                bar.say(f"{'resumed' if state.step else 'weights'} from {source} at step {state.step:,}")
            _train(parts, state, found, evaluator=evaluator, stop=stop, own_time=own_time, numbers=numbers, bar=bar)
    finished = state.step >= sizes.steps
    if finished:
        with parts.progress.during("evaluating"):
            numbers.record(evaluation_fields(evaluator.all_of_it(), state=state) | {"final": True})
    if numbers.wandb is not None:
        numbers.wandb.close()
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
    parts: Parts,
    state: TrainState,
    found: resume.Found | None,
    *,
    evaluator: Evaluator,
    stop: StopRequest,
    own_time: OwnTime | None,
    numbers: Numbers,
    bar: LiveView,
) -> None:
    run, groups, sizes, progress = parts.run, parts.groups, parts.sizes, parts.progress
    clock = Clock(progress)
    log = _log_hook(parts, numbers, bar=bar, clock=clock)
    evaluation = EvaluateHook(
        every_steps=run.evaluate.every_steps,
        steps=sizes.steps,
        evaluate=evaluator.some_of_it,
        record=numbers.record,
        bar=bar,
        clock=clock,
    )
    tell = Incidents(parts.run_dir, say=bar.say).add if parts.is_first else silence
    guard = Guard(run.watch, group=groups.control, asked=stop, left_out=parts.left_out, progress=progress, tell=tell,
                  device=groups.device)  # fmt: skip
    guard.restore(found[1].watch.get("guard", {}) if found else {})
    save = _save_hook(parts, guard, flush=log.flush, loss_at=evaluation.loss_at, stop=stop, bar=bar, clock=clock)
    plan = Plan(
        steps=sizes.steps,
        schedule=make_schedule(run, sizes=sizes),
        batch=_batch_reader(parts, own_time),
        tokens_per_step=sizes.tokens_per_step,
        seed=run.seed,
        hooks=(log, evaluation, save),
        watch=guard,
        go_back=_go_back(parts, guard, save=save, log=log, numbers=numbers, tell=tell),
        progress=progress,
    )
    log.start(state)
    progress.task = TRAINING
    try:
        train(parts.engine, plan=plan, state=state, rank=groups.topology.rank)
    except MoetrainError:
        # all ranks have it, and the checkpoint that is being written is the one to go on from
        save.settle()
        raise
    with progress.during("saving"):
        save.finish(state)
    if state.step < sizes.steps:
        bar.say(f"saved at step {state.step:,}")


def _log_hook(parts: Parts, numbers: Numbers, *, bar: LiveView, clock: Clock) -> LogHook:
    run, groups, sizes = parts.run, parts.groups, parts.sizes
    check = _plan_check(parts, say=bar.say) if parts.is_first else None

    def take(line: dict[str, Any]) -> None:
        numbers.record(line)
        if check is not None:
            check.take(line)

    return LogHook(
        every_steps=run.log.every_steps,
        steps=sizes.steps,
        speed=make_speed(run, groups=groups, sizes=sizes),
        peak_memory=parts.gauge.peak,
        device=groups.device,
        meter=make_meter(run, groups.device, dead_after=run.log.dead_after_steps),
        group=groups.world,
        record=take,
        bar=bar,
        clock=clock,
    )


def _plan_check(parts: Parts, *, say: Callable[[str], None]) -> PlanCheck:
    device = parts.groups.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    expected = expect(parts.run, device=device.type, device_name=name)
    return PlanCheck(expected, run_dir=parts.run_dir, step_tokens=parts.sizes.tokens_per_step, say=say)


def _go_back(parts: Parts, guard: Guard, *, save: SaveHook, log: LogHook, numbers: Numbers, tell: Tell) -> GoBack:
    def load(directory: Path, manifest: store.Manifest) -> None:
        checkpoint_state.load(directory, parts.engine.fragments(), group=parts.groups.control)
        parts.engine.loaded(updates=updates_of(manifest))
        guard.restore(manifest.watch.get("guard", {}))

    def forget(state: TrainState) -> None:
        save.go_back()
        numbers.go_back(state.step)
        log.go_back(state)

    remote = parts.run.checkpoint.remote
    return GoBack(
        parts.run_dir,
        progress=parts.progress,
        is_first=parts.is_first,
        left_out=parts.left_out,
        settle=save.wait,
        find=lambda accept: find(parts, accept=accept),
        load=load,
        forget=forget,
        remote=None if remote is None else Remote(remote),
        tell=tell,
    )


def _save_hook(
    parts: Parts,
    guard: Guard,
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
        manifest=lambda now: manifest_of(parts, now, guard, held_out_loss=loss_at(now.step)),
        go_on=given.on_failure == "go_on",
        warn=bar.say,
        control=parts.groups.control,
        clock=clock,
    )


def _batch_reader(parts: Parts, own_time: OwnTime | None) -> Callable[[int], Sequence[MicroBatch]]:
    def read(step: int) -> Sequence[MicroBatch]:
        return micro_batches(
            parts.batches,
            step,
            packing=parts.packing,
            topology=parts.groups.topology,
            micro_batch=parts.sizes.micro_batch,
            device=parts.groups.device,
        )

    ahead = Ahead(read, steps=parts.sizes.steps)
    return ahead if own_time is None else lambda step: own_time.read_batch(step, ahead)


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
    """Run a rank; returns the exit code: 0 finished, 75 stopped on request."""
    finished = run_rank(run_dir)
    process_groups.stop()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    end_as_rank(main, Path(sys.argv[1]))
