"""The verb sweep: many runs, one answer."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.options import Options, corpus_of, number
from moetrain.errors import ConfigError
from moetrain.parallel.lifeline import STOPPED

if TYPE_CHECKING:
    from moetrain.config.launch.settings import LaunchConfig
    from moetrain.config.schema import RunConfig
    from moetrain.plan.cluster import Cluster
    from moetrain.sweep.grid import Point
    from moetrain.sweep.settings import Axis, SweepConfig
    from moetrain.sweep.state import Run, Sweep

HELP = {
    "sweep": """usage: moetrain sweep [experiment=NAME] [SETTING=value,value,… …] [keep=WHAT] [key=value …] [--dry-run]
       moetrain sweep status [DIR] [--once]
       moetrain sweep predict [DIR] compute=C [experts=E] [parameters=N] [tokens=D]
       moetrain sweep search SETTING=interval(a,b) … [trials=N] [key=value …]

Trains every combination of the values, each a run directory of its own in sweeps/NAME/runs. The same command again goes
on where it stopped; what failed is tried again. See docs/sweep.md.

  experiment=NAME     a file of configs/sweep, or of DIR/sweep; or an experiment of train, with axes on the command line
  SETTING=a,b,c       an axis; any setting or preset of train, as Hydra's multirun writes it
  keep=WHAT           active_flops, total_parameters, memory or time: kept equal by adjusting
  free=SETTING        this setting (default model.moe.d_expert),
  within=AXIS         within each value of this axis
  seeds=1,2           each point once with each seed; seed=1,2 means the same
  jobs=N              runs at the same time, each on cores, GPUs or hosts of its own
  launch=hostfile     each run on the hosts of launch.hosts, or on 1/jobs of them
  launch=slurm        an array of jobs; this command ends when it is in the queue
  halving=2           stop the worse half of the runs at each of rungs=0.25,0.5 of their steps
  --dry-run           show the points and what they cost; start nothing
  --config-dir DIR    presets of your own, laid out like moetrain's

`sweep status` shows how far it is; on a terminal the table is live while something runs (--once: a single look).
`sweep predict` fits the scaling laws and says what a larger run would reach, with its interval, or why the runs do not
tell. Both take a directory, a name in sweeps/, or nothing where there is only one. `sweep search` tries values in an
interval by Optuna (extra "search").

exit codes: 0 finished, 1 some runs failed, 2 something to mend, 75 stopped on request

examples:
  moetrain sweep experiment=expert_count
  moetrain sweep model.moe.num_experts=2,4,8 keep=active_flops seeds=1,2 name=experts
  moetrain sweep model=tiny optim.lr=1e-3,3e-3,1e-2 name=rates jobs=2
  moetrain sweep status sweeps/expert_count
  moetrain sweep predict sweeps/expert_count compute=1e13
""",
}


def sweep(words: Sequence[str]) -> int:
    """The verb `sweep`."""
    if words and words[0] == "status":
        return _status(words[1:])
    if words and words[0] == "predict":
        from moetrain.cli.running.predict import predict

        return predict(words[1:])
    if words and words[0] == "search":
        from moetrain.cli.running.search import search

        return search(words[1:])
    options = Options.read(words, flags=("--dry-run",))
    config, axes = read_sweep(options)
    points, launch = points_of(config, axes, options)
    directory = Path(config.sweep_dir or f"sweeps/{config.name}")
    from moetrain.report.sweep import grid_text

    print(grid_text(directory, config, points), flush=True)
    from moetrain.launch.lock import RunLock
    from moetrain.sweep.state import open_sweep
    from moetrain.sweep.work.array import script, take_up

    if "--dry-run" in options.flags:
        print("a dry run: nothing was started")
        if launch.kind == "slurm":
            opened = open_sweep(directory, config, points)
            print(f"\n{script(opened, len(opened.runs), launch)}", end="")
        return 0
    with RunLock(directory):
        opened = open_sweep(directory, config, points)
        take_up(opened)
        return run_points(opened, launch, options)


def run_points(opened: Sweep, launch: LaunchConfig, options: Options) -> int:
    """Train what waits, by the launcher that the runs name, and show what came of it; returns the exit code."""
    from moetrain.report.sweep import status_table
    from moetrain.sweep.work.array import settle
    from moetrain.sweep.work.places import queue_runs, slots_of
    from moetrain.sweep.work.queue import run_queue

    _prepare(opened, options)
    if launch.kind == "slurm":
        from moetrain.cli.running.train import prepare_run

        queued = queue_runs(opened, lambda run: _composed(options, _words_of(opened, run), jobs=1), prepare=prepare_run)
        settle(opened)
        status_table(opened)
        if queued or any(run.status in ("queued", "running") for run in opened.runs):
            print(f"SLURM does the rest: see moetrain sweep status {opened.directory}")
            return 0
    else:
        stopped = run_queue(
            opened,
            command=lambda run: command_of(opened, run, options),
            steps={
                name: _steps(_composed(options, point.overrides, jobs=opened.config.at_once))
                for name, point in opened.points.items()
            }
            if opened.config.halving
            else {},
            say=lambda line: print(line, flush=True),
            places=slots_of(opened, launch),
        )
        status_table(opened)
        if stopped:
            print("stopped on request; the same command goes on")
            return STOPPED
    print(f"next: moetrain report {opened.directory}")
    return 1 if any(run.status == "failed" for run in opened.runs) else 0


def command_of(opened: Sweep, run: Run, options: Options) -> list[str]:
    """What starts a run, or goes on with it."""
    place = [] if options.config_dir is None else ["--config-dir", str(options.config_dir)]
    return [sys.executable, "-m", "moetrain.cli", "train", *_words_of(opened, run), *place]


def _words_of(opened: Sweep, run: Run) -> list[str]:
    own = [f"seed={run.seed}", f'name="{run.name}"', f'run_dir="{opened.run_dir(run)}"']
    return [*opened.points[run.point].overrides, *own]


def read_sweep(options: Options, *, axes: Sequence[Axis] = ()) -> tuple[SweepConfig, list[Axis]]:
    """The settings of a sweep out of its file and the command line.

    Args:
        axes: there are besides.
    """
    from moetrain.compose import values_of
    from moetrain.sweep.settings import Axis, Choice, SweepConfig, axes_of, freeze_sweep

    own_names = {field.name for field in fields(SweepConfig)}
    content, words = _file_of(options)
    axes = [*axes, *axes_of(content.pop("axes", {}))]
    settings = list(content.pop("settings", []))
    given: dict[str, Any] = dict(content)
    for word in words:
        key, _, value = word.partition("=")
        if key == "seed":
            # a seed is no setting to be compared, and each point has all of them
            each = [one.partition("=")[2] for one in values_of(word) or [word]]
            given["seeds"] = [number(one) for one in each]
        elif key in own_names:
            given[key] = _own(key, value)
        elif (named := _named_axis(axes, key)) is not None:
            labels = [each.partition("=")[2] for each in values_of(word) or [word]]
            axes = [_only(axis, labels) if axis is named else axis for axis in axes]
        elif (values := values_of(word)) is not None:
            choices = tuple(Choice(each.partition("=")[2], (each,)) for each in values)
            axes = [*(axis for axis in axes if axis.name != key), Axis(key, choices)]
        else:
            axes = [axis for axis in axes if axis.name != key]
            settings.append(word)
    return freeze_sweep(given | {"settings": settings}, axes), axes


def _named_axis(axes: Sequence[Axis], name: str) -> Axis | None:
    """The axis of this name, if its choices are labels for several settings."""
    return next((axis for axis in axes if axis.name == name and axis.is_named), None)


def _only(axis: Axis, labels: Sequence[str]) -> Axis:
    from moetrain.sweep.settings import Axis

    known = {choice.label: choice for choice in axis.choices}
    if unknown := [label for label in labels if label not in known]:
        raise ConfigError([f"{axis.name} has no {unknown[0]!r}: use {', '.join(known)}"])
    return Axis(axis.name, tuple(known[label] for label in labels))


def _own(key: str, value: str) -> Any:
    """A word of the sweep's own as its type is."""
    if key in ("seeds", "rungs"):
        return [number(each) for each in value.strip("[]").split(",")]
    if key == "within":
        return value.strip("[]").split(",")
    if key in ("jobs", "retries", "halving", "tolerance"):
        return None if value == "null" else number(value)
    return value


def _file_of(options: Options) -> tuple[dict[str, Any], list[str]]:
    """The content of the file that experiment=NAME names, if it is a sweep's, and the other words."""
    from moetrain.compose import compose_file, presets
    from moetrain.config.freeze import config_directory

    for word in options.overrides:
        key, _, name = word.partition("=")
        places = [place / "sweep" / f"{name}.yaml" for place in (config_directory(), options.config_dir) if place]
        if key == "experiment" and any(place.is_file() for place in places):
            content = compose_file("sweep", name, config_dir=options.config_dir)
            return {"name": name} | content, [each for each in options.overrides if each != word]
        own = options.config_dir / "experiment" / f"{name}.yaml" if options.config_dir else None
        if key == "experiment" and name.isidentifier() and name not in presets("experiment") and not _is_file(own):
            near = difflib.get_close_matches(name, [*presets("sweep"), *presets("experiment")], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            told = f"sweeps: {', '.join(presets('sweep'))}; experiments: {', '.join(presets('experiment'))}"
            raise ConfigError([f"'{word}' is not there: {told}{hint}"])
    return {}, options.overrides


def _is_file(path: Path | None) -> bool:
    return path is not None and path.is_file()


def points_of(config: SweepConfig, axes: Sequence[Axis], options: Options) -> tuple[list[Point], LaunchConfig]:
    """The grid, and how its runs are launched."""
    from moetrain.launch.machine.cores import default_processes
    from moetrain.sweep.grid import make_grid
    from moetrain.sweep.work.places import launch_of

    cluster, efficiency = _cluster(config, options)
    launches: list[LaunchConfig] = []

    def make(overrides: Sequence[str]) -> RunConfig:
        run = _made(options, overrides, jobs=config.at_once)
        launches.append(run.launch)
        return run

    points = make_grid(
        config,
        axes,
        make=make,
        default_processes=max(1, default_processes() // config.at_once),
        cluster=cluster,
        efficiency=efficiency,
    )
    return points, launch_of(config, launches)


def _cluster(config: SweepConfig, options: Options) -> tuple[Cluster | None, float]:
    if config.keep not in ("memory", "time"):
        return None, 1.0
    from moetrain.cli.options import named_cluster

    return named_cluster(config.cluster, config_dir=options.config_dir)


def _made(options: Options, overrides: Sequence[str], *, jobs: int) -> RunConfig:
    from moetrain.compose import compose
    from moetrain.config.freeze import freeze
    from moetrain.launch.machine.cores import default_processes
    from moetrain.launch.nodes.hosts import shared

    run = freeze(compose(list(overrides), config_dir=options.config_dir).settings)
    launch = shared(run.launch, jobs=jobs)
    if launch.kind == "slurm" and launch.processes is None:
        launch = replace(launch, processes=default_processes())  # runs at a time share nothing there
    return replace(run, launch=launch)


def _composed(options: Options, overrides: Sequence[str], *, jobs: int) -> RunConfig:
    from moetrain.cli.options import settings

    each = Options()
    each.overrides, each.config_dir = list(overrides), options.config_dir
    return settings(each, jobs=jobs)[0]


def _prepare(opened: Sweep, options: Options) -> None:
    """Token files, once for all runs that read the same: a fault of the text is told before anything runs."""
    seen = set()
    for point in opened.points.values():
        run = _composed(options, point.overrides, jobs=opened.config.at_once)
        what = (repr(run.data), run.model.vocab_size)
        if what not in seen:
            seen.add(what)
            corpus_of(run)


def _steps(run: RunConfig) -> int:
    from moetrain.sweep.grid import run_steps

    return run_steps(run)


def _status(words: Sequence[str]) -> int:
    named = [word for word in words if word != "--once"]
    if wrong := [word for word in named if "=" in word or word.startswith("-")]:
        raise ConfigError([f"'{wrong[0]}' is not known here: moetrain sweep status [DIR] [--once]"])
    from moetrain.report.sweep import is_at_work, status_table, watch
    from moetrain.sweep.state import Sweep, find_sweep
    from moetrain.sweep.work.array import settle

    directory = find_sweep(named)

    def read() -> Sweep:
        opened = Sweep.read(directory)
        settle(opened)
        return opened

    opened = read()
    if sys.stdout.isatty() and "--once" not in words and is_at_work(opened):
        watch(read)
    else:
        status_table(opened)
    return 0
