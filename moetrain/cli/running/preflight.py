"""The verb preflight, and what `train` asks of it before the first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli.options import Options, named_cluster, settings
from moetrain.errors import ConfigError, LaunchError, NoGoError

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig
    from moetrain.preflight.checks import Needs
    from moetrain.preflight.seen.facts import Found
    from moetrain.preflight.verdict import Line, Stated

HELP = {
    "preflight": """usage: moetrain preflight [key=value …] [cluster=NAME] [--config-dir DIR] [--dry-run]

Looks at every node that the run would have: versions, GPUs, InfiniBand ports, limits, variables, disk, clocks; then
measures matrix products, all-reduce, the run's own all-to-all and every link between nodes, each by itself. Prints go,
warn or no-go for each, with a way out, and names the node or link at fault. Takes seconds; `train` does it too, before
its first step, unless preflight=skip.

  cluster=NAME     hold speeds against a file of configs/cluster, or of DIR/cluster; without it, against each other
  --dry-run        say what would be looked at, start nothing

RUN_DIR/preflight.json has all that was found; RUN_DIR/hostfile.good the nodes without those at fault.
exit codes: 0 go, 2 no-go

examples:
  moetrain preflight
  moetrain preflight model=tiny launch.processes=2 cluster=cpu
""",
}
NODE = "moetrain.preflight.node"
NO_GO_CODE = 2


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a preflight came to."""

    lines: list[Line]
    hostfile: Path | None

    @property
    def is_go(self) -> bool:
        from moetrain.preflight.rules import NO_GO
        from moetrain.preflight.verdict import overall

        return overall(self.lines) != NO_GO


def preflight(words: Sequence[str]) -> int:
    """The verb `preflight`."""
    options = Options.read(words, flags=("--dry-run",))
    stated, options.overrides = _stated(options)
    run, _ = settings(options)
    if run.launch.kind == "kubernetes":
        raise ConfigError(["launch.kind is kubernetes, whose pods start without us, but preflight starts processes "
                           "itself: run `moetrain preflight launch=local` in a pod"])  # fmt: skip
    run_dir = Path(str(run.run_dir))
    from moetrain.report.preflight import opening, preflight_screen

    print(opening(run, cluster=None if stated is None else stated.name), flush=True)
    if "--dry-run" in options.flags:
        print("a dry run: nothing was started")
        return 0
    judged = look(run, run_dir, stated=stated)
    preflight_screen(judged.lines, run_dir=run_dir, hostfile=judged.hostfile)
    return 0 if judged.is_go else NO_GO_CODE


def before_training(run: RunConfig, run_dir: Path, *, in_job: bool = False) -> None:
    """What `train` does first, as ``preflight`` says; the screen tells what is not well.

    Raises:
        NoGoError: no-go.
    """
    from moetrain.preflight.rules import NO_GO
    from moetrain.preflight.verdict import GO, NOT_MEASURED
    from moetrain.report.preflight import preflight_screen

    if run.preflight == "skip":
        return
    if run.preflight == "auto" and _on_cpu(run):
        judged = look_alone(run, run_dir)
    else:
        judged = look(run, run_dir, stated=None, in_job=in_job)
    told = [line for line in judged.lines if line.verdict not in (GO, NOT_MEASURED)]
    if told:
        preflight_screen(told, run_dir=run_dir, hostfile=judged.hostfile)
    if not judged.is_go:
        # in a sweep it is all that is told of the run
        why = next(f"{line.where}: {line.found}: {line.remedy}" for line in judged.lines if line.verdict == NO_GO)
        raise NoGoError(f"{run_dir} was not started: preflight says no-go: {why}")


def look(run: RunConfig, run_dir: Path, *, stated: Stated | None, in_job: bool = False) -> Judged:
    """Start a rank for each of the run's, let them look and measure, and judge what they found.

    Raises:
        LaunchError: they did not come so far that anything could be judged.
    """
    from moetrain.config.freeze import write_run
    from moetrain.launch.lock import RunLock
    from moetrain.launch.start import node_names
    from moetrain.preflight.seen.facts import FOUND_FILE, read_found
    from moetrain.preflight.verdict import judge, write_report

    place = run_dir / "preflight"
    failure: LaunchError | None = None
    with RunLock(place):
        write_run(run, place)
        (place / FOUND_FILE).unlink(missing_ok=True)
        shutil.rmtree(place / "log", ignore_errors=True)
        try:
            _start(run, place, in_job=in_job)
        except LaunchError as error:
            failure = error
            if not (place / FOUND_FILE).is_file():
                raise
        found = read_found(place)
    names = node_names(run.launch, in_job=in_job)
    lines = judge(found, needs=needs_of(run, found, stated), stated=stated, dtype=run.model.dtype, hosts=names,
                  failure=None if failure is None else str(failure))  # fmt: skip
    return Judged(lines=lines, hostfile=write_report(found, lines, run_dir, hosts=names))


def look_alone(run: RunConfig, run_dir: Path) -> Judged:
    """The facts of this machine, in this process: a few milliseconds."""
    from moetrain.preflight.seen.read import read_facts, this_host
    from moetrain.preflight.verdict import judge_alone

    facts = read_facts(this_host(), node=0, place=run_dir, versions={})
    needs = _needs(run, nodes=1, processes=run.launch.processes or 1, gpus=False)
    return Judged(lines=judge_alone(facts, needs=needs), hostfile=None)


def needs_of(run: RunConfig, found: Found, stated: Stated | None) -> Needs:
    """What the run asks of the nodes that were found."""
    return _needs(
        run,
        nodes=found.world_size // found.ranks_per_node,
        processes=found.ranks_per_node,
        gpus=any(facts.gpus for facts in found.nodes),
        port_gbits=None if stated is None else 8 * stated.cluster.network_gb_per_second,
    )


def _needs(run: RunConfig, *, nodes: int, processes: int, gpus: bool, port_gbits: float | None = None) -> Needs:
    from moetrain.plan.flops import count_parameters
    from moetrain.plan.search import CHECKPOINT_BYTES
    from moetrain.preflight.checks import Needs

    return Needs(
        nodes=nodes,
        processes=processes,
        gpus=gpus,
        checkpoint_bytes=CHECKPOINT_BYTES * count_parameters(run.model).total,
        checkpoints_kept=run.checkpoint.keep + run.checkpoint.keep_best + 1,
        port_gbits=port_gbits,
    )


def _start(run: RunConfig, place: Path, *, in_job: bool) -> None:
    """The one place where the preflight's ranks are started."""
    from moetrain.launch.start import start

    if start(place, run.launch, module=NODE, in_job=in_job).stopped:
        raise KeyboardInterrupt


def _on_cpu(run: RunConfig) -> bool:
    """Whether the run stays on this machine, and that has no GPUs."""
    from moetrain.launch.machine.cores import visible_gpus

    return run.launch.kind == "local" and visible_gpus(os.listdir("/dev"), os.environ) == 0


def _stated(options: Options) -> tuple[Stated | None, list[str]]:
    """The cluster that was named, and the words that are the run's."""
    from moetrain.preflight.verdict import Stated

    own = [word for word in options.overrides if word.startswith(("cluster=", "cluster."))]
    rest = [word for word in options.overrides if word not in own]
    name = next((word.partition("=")[2] for word in reversed(own) if word.startswith("cluster=")), "")
    if own and not name:
        raise ConfigError([f"'{own[0]}' is of a cluster, but none is named: use cluster=NAME too"])
    if not name:
        return None, rest
    overrides = [word for word in own if word.startswith("cluster.")]
    cluster, efficiency = named_cluster(name, overrides=overrides, config_dir=options.config_dir)
    return Stated(name=name, cluster=cluster, efficiency=efficiency), rest
