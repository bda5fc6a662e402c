"""The verbs around a run: train, config."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.options import Options, corpus_of, opening_of, settings
from moetrain.cli.results.model import write
from moetrain.cli.running.preflight import before_training
from moetrain.errors import CheckpointError, ConfigError
from moetrain.parallel.lifeline import STOPPED

if TYPE_CHECKING:
    from moetrain.checkpoint.remote import Remote
    from moetrain.config.schema import RunConfig
    from moetrain.report.screen import Baselines

HELP = {
    "train": """usage: moetrain train [key=value …] [--config-dir DIR] [--dry-run]

Trains the run that the settings describe, in RUN_DIR (runs/NAME). The same command again goes on from the newest
whole checkpoint, also after a crash and on another number of processes; a finished run shows its result.

  --dry-run           check the settings and say what would run
  --config-dir DIR    presets of your own, laid out like moetrain's: DIR/model/mine.yaml, DIR/experiment/mine.yaml

exit codes: 0 finished (or queued), 2 something to mend (said in one message), 75 stopped on request and saved

examples:
  moetrain train
  moetrain train name=long schedule.steps=2000 optim.lr=6e-4
  moetrain train model/moe=none                           the dense model of the same active size
  moetrain train launch=slurm launch.nodes=2 --dry-run    print the script of a job on a SLURM cluster
  moetrain train 'data.text=[books/*.txt,notes.jsonl]' name=books
  moetrain train data.stream=true data.text=notes.jsonl name=quick    text is tokenized while it trains
""",
    "config": """usage: moetrain config [key=value …] [--config-dir DIR]

Prints the settings a run would have, as YAML; beside each value, the file that set it, `command line`, `default`, or
`worked out` from other settings.

examples:
  moetrain config
  moetrain config model=glam_64b_64e parallel.zero_stage=2
""",
}
_HANDED_OVER = ("slurm", "kubernetes")
"""Launchers that start nothing here."""


def train(words: Sequence[str]) -> int:
    """The verb `train`."""
    options = Options.read(words, flags=("--dry-run",))
    run, composed = settings(options)
    from moetrain.config.schema import SampleConfig
    from moetrain.report import screen

    note = screen.tiny_settings_text(composed.sources, model=composed.choices["model"])
    about = "\n".join(filter(None, (screen.plan_text(run), note)))

    run_dir = Path(str(run.run_dir))
    remote = _remote(run)
    if "--dry-run" in options.flags:
        _compare_with_earlier(run, run_dir)
        from moetrain.launch.start import handed_over

        print(f"{about}\na dry run: nothing was started")
        if text := handed_over(run_dir, run.launch):
            print(f"\n{text}", end="")
        return 0
    from moetrain.launch.cluster.slurm import refuse_queued
    from moetrain.launch.lock import RunLock
    from moetrain.launch.nodes.spec import no_requests
    from moetrain.launch.start import start

    with RunLock(run_dir):
        refuse_queued(run_dir)
        no_requests(run_dir)
        finished = screen.is_finished(run, run_dir)
        if remote is not None and not finished:
            remote.probe()
        run = prepare_run(run, run_dir)
        if finished:
            print(f"{run_dir} is finished; here is what it reached. For another run, set name=… or schedule.steps=…\n")
        else:
            print(about, flush=True)
            _fetch_newest(remote, run, run_dir)
            if run.launch.kind in _HANDED_OVER:
                print(f"{start(run_dir, run.launch).queued}\nsee moetrain status, logs and cancel {run_dir}")
                return 0
            if keep_running(run, run_dir):
                print("stopped on request; the same command goes on from the newest checkpoint")
                _catch_up(remote, run, run_dir)
                return STOPPED
        screen.draw(run_dir)
        opening = _opening(run)
        sample = ""
        if screen.is_small(run):
            _, pieces = write(SampleConfig(run_dir=str(run_dir), prompt=[opening]))
            sample = "".join(piece.text for piece in pieces)
        screen.last_screen(run, run_dir=run_dir, baselines=_baselines(run), opening=opening, sample=sample)
        _catch_up(remote, run, run_dir)
    return 0


def config(words: Sequence[str]) -> int:
    """The verb `config`."""
    run, composed = settings(Options.read(words))
    from moetrain.report.screen import config_text

    print(config_text(run, composed=composed.settings, sources=composed.sources))
    return 0


def keep_running(run: RunConfig, run_dir: Path, *, in_job: bool = False) -> bool:
    """See whether the nodes are fit, start the processes, again where that is worth it, and wait for them.

    Hold the ``RunLock``.

    Args:
        in_job: we are the SLURM job that the run asks for.

    Returns:
        Whether it was stopped on request.

    Raises:
        LaunchError: a node is not fit. MoetrainError: the fault that ended the run.
    """
    from moetrain.launch.local import Outcome
    from moetrain.launch.record import recorded

    with recorded(run_dir) as record:
        try:
            before_training(run, run_dir, in_job=in_job)
        except KeyboardInterrupt:  # asked to stop meanwhile: there is nothing to save
            return record(Outcome(stopped=True)).stopped
        return record(Outcome(stopped=_supervised(run, run_dir, in_job=in_job))).stopped


def _supervised(run: RunConfig, run_dir: Path, *, in_job: bool) -> bool:
    from moetrain.config.freeze import write_run
    from moetrain.errors import MoetrainError
    from moetrain.launch.fault import NodeLost
    from moetrain.launch.start import start
    from moetrain.launch.supervise import Ended, device_bytes, on_fewer, supervise, without

    lost_hosts: set[str] = set()

    def once(run: RunConfig) -> Ended:
        write_run(run, run_dir)
        try:
            return Ended(stopped=start(run_dir, run.launch, in_job=in_job).stopped)
        except MoetrainError as error:
            gone = error.hosts if isinstance(error, NodeLost) else ()
            lost_hosts.update(gone)
            return Ended(fault=error, lost=len(gone) * (run.launch.processes or 1))

    def shrink(run: RunConfig, lost: int) -> RunConfig | None:
        processes = run.launch.world_size
        memory = device_bytes(run_dir, processes=processes)
        if run.launch.kind == "hostfile" and lost < processes:
            run = replace(run, launch=without(run.launch, lost_hosts))
        return on_fewer(run, processes=processes - lost, device_bytes=memory)

    return supervise(run, run_dir=run_dir, start=once, shrink=shrink, say=lambda line: print(line, flush=True))


def _compare_with_earlier(run: RunConfig, run_dir: Path) -> None:
    """Refuse settings that an earlier start in ``run_dir`` does not allow, and tell of those that changed."""
    from moetrain.config.freeze import RUN_FILE, read_run
    from moetrain.config.identity import differences, is_fixed

    if not (run_dir / RUN_FILE).is_file():
        return
    changed = {name: tuple(map(_in_words, values)) for name, values in differences(read_run(run_dir), run).items()}
    fixed = [name for name in changed if is_fixed(name)]
    if fixed:
        raise ConfigError(
            [
                f"{name} is {changed[name][1]}, but {run_dir} was started with {changed[name][0]}: "
                "set it back, or choose another name=… or run_dir=… for another run"
                for name in fixed
            ]
        )
    free = [f"{name} {old} -> {new}" for name, (old, new) in changed.items() if not _is_place(name)]
    if free:
        print("changed since the last start: " + ", ".join(free))


def _is_place(name: str) -> bool:
    return name.startswith("data.") and name.endswith("prepared")


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['num_experts']} experts"  # the only section that may be null
    return "null" if value is None else str(value)


def prepare_run(run: RunConfig, run_dir: Path) -> RunConfig:
    """Hold the settings against an earlier start, make the tokens, and write down what is about to run."""
    from moetrain.config.data import with_prepared
    from moetrain.config.freeze import write_run
    from moetrain.config.identity import write_origin
    from moetrain.data.build import make_batches, usage
    from moetrain.data.corpus import TOKENIZER
    from moetrain.report.screen import mixture_text

    _compare_with_earlier(run, run_dir)
    is_begun = any((run_dir / "checkpoints").glob("step_*/manifest.json"))
    corpus = opening_of(run, run_dir, is_begun=is_begun) if run.data.stream else corpus_of(run)
    _hold_weights(run, run_dir, tokenizer=corpus.digests()["tokenizer"])
    if not run.data.stream:
        run = replace(run, data=with_prepared(run.data, {name: str(part.directory.resolve()) for name, part in
                                                         corpus.parts.items()}))  # fmt: skip
        make_batches(run, corpus)  # a mixture that does not work out is told before anything starts
    # so that the run directory can be moved, and sampled from without the token files; a checkpoint's stays with it
    if not is_begun:
        shutil.copyfile(corpus.first.tokenizer_path, run_dir / TOKENIZER)
    write_run(run, run_dir)
    metas = {name: asdict(part.meta) for name, part in corpus.parts.items()}
    write_origin(run_dir, command=["moetrain", *sys.argv[1:]],
                 data=metas if run.data.sources else next(iter(metas.values())))  # fmt: skip
    if run.data.sources:
        print(mixture_text(usage(run, corpus)))
    return run


def _hold_weights(run: RunConfig, run_dir: Path, *, tokenizer: str) -> None:
    """Hold ``init.weights`` against the settings before anything starts, while the run still begins from there."""
    from moetrain.checkpoint import store

    if run.init.weights is None or store.whole_checkpoints(run_dir / "checkpoints"):
        return
    weights = Path(run.init.weights)
    whole = [weights] if (weights / store.MANIFEST).is_file() else store.whole_checkpoints(weights / "checkpoints")
    if not whole:
        raise CheckpointError(f"init.weights is {weights}, but there is no checkpoint in it: name a run's directory")
    if problems := store.not_a_start(store.read_manifest(whole[-1]), run=run, tokenizer=tokenizer):
        raise ConfigError(problems)


def _remote(run: RunConfig) -> Remote | None:
    """Where copies of the checkpoints go; whether it can be reached is not asked."""
    if run.checkpoint.remote is None:
        return None
    from moetrain.checkpoint.remote import Remote

    return Remote(run.checkpoint.remote)


def _fetch_newest(remote: Remote | None, run: RunConfig, run_dir: Path) -> None:
    """Bring the newest checkpoint here, if it is not: in one process, where no rank waits for another meanwhile."""
    if remote is None:
        return
    from moetrain.checkpoint import store
    from moetrain.checkpoint.remote import fetch_newest
    from moetrain.data.build import open_corpus

    data = open_corpus(run, run_dir).digests()
    fetch_newest(
        remote,
        run_dir / "checkpoints",
        foreign=lambda manifest: store.foreign(manifest, run=run, data=data),
        warn=lambda message: print(f"warning: {message}", flush=True),
        say=lambda message: print(message, flush=True),
    )


def _catch_up(remote: Remote | None, run: RunConfig, run_dir: Path) -> None:
    """Copy what the run's own copying has left out: there is no next save that could make up for it."""
    if remote is None:
        return
    from moetrain.checkpoint import store
    from moetrain.checkpoint.remote import catch_up

    try:
        catch_up(remote, run_dir / "checkpoints", store.Retention.of(run.checkpoint))
    except CheckpointError as error:
        message = f"checkpoints of {run_dir} are saved, but their copies are not: {error}; the same command tries again"
        if run.checkpoint.on_failure == "stop":
            raise CheckpointError(message) from error
        print(f"warning: {message}", flush=True)


def _baselines(run: RunConfig) -> Baselines:
    from moetrain.data.build import open_corpus
    from moetrain.report.screen import Baselines

    metas = [part.meta for part in open_corpus(run, Path(str(run.run_dir))).parts.values()]
    num_bytes = sum(meta.held_out.bytes for meta in metas)
    return Baselines(
        trigram=sum(meta.baselines.trigram * meta.held_out.bytes / num_bytes for meta in metas),
        xz=sum(meta.baselines.xz * meta.held_out.bytes / num_bytes for meta in metas),
    )


def _opening(run: RunConfig, *, tokens: int = 12) -> str:
    """The first words of the held-out text, for a sample to go on from."""
    from tokenizers import Tokenizer

    from moetrain.data.build import open_corpus

    prepared = open_corpus(run, Path(str(run.run_dir))).first
    text: str = Tokenizer.from_file(str(prepared.tokenizer_path)).decode(prepared.held_out.tokens[:tokens].tolist())
    return text
