"""`moetrain sweep search`: values in intervals, tried by Optuna; the trials are runs of a sweep like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.options import Options
from moetrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moetrain.config.launch.settings import LaunchConfig
    from moetrain.sweep.settings import Axis, SweepConfig
    from moetrain.sweep.state import Sweep

_TRIALS = 10
Space = dict[str, tuple[float, float, bool]]
"""Setting -> low, high, whether logarithmic."""
Ask = Callable[["Sweep", int], list[dict[str, float]]]


def search(words: Sequence[str]) -> int:
    """`sweep search SETTING=interval(a,b) … [trials=N]`: rounds of ``jobs`` trials, each a run, until N are done."""
    from moetrain.cli.running.sweep import points_of, read_sweep
    from moetrain.launch.lock import RunLock

    options = Options.read(words, flags=("--dry-run",))
    trials, space, options.overrides = _asked(options.overrides)
    ask = _asker(space)
    axis = _axis(0, {name: low for name, (low, _, _) in space.items()})
    config = replace(read_sweep(options, axes=[axis])[0], keep="none")
    launch = points_of(config, [axis], options)[1]
    if launch.kind == "slurm":
        raise ConfigError(
            [
                "launch.kind is slurm, but a search chooses its trials by what earlier ones reached, and would have to "
                "wait for the queue: use launch=local inside an allocation, or launch=hostfile"
            ]
        )
    directory = Path(config.sweep_dir or f"sweeps/{config.name}")
    shown = ", ".join(f"{name} in {low:g} to {high:g}" for name, (low, high, _) in space.items())
    print(f"{directory}: {trials} trials of {shown}")
    if "--dry-run" in options.flags:
        print("a dry run: nothing was started")
        return 0
    with RunLock(directory):
        return _rounds(directory, config, ask, trials=trials, space=space, options=options, launch=launch)


def _rounds(
    directory: Path,
    config: SweepConfig,
    ask: Ask,
    *,
    trials: int,
    space: Space,
    options: Options,
    launch: LaunchConfig,
) -> int:
    from moetrain.cli.running.sweep import points_of, run_points
    from moetrain.sweep.state import open_sweep

    opened = open_sweep(directory, config, [])
    while len(opened.points) < trials or any(run.status == "waiting" for run in opened.runs):
        if not any(run.status == "waiting" for run in opened.runs):
            points = list(opened.points.values())
            for values in ask(opened, min(trials - len(points), config.at_once)):
                points += points_of(config, [_axis(len(points), values)], options)[0]
            opened = open_sweep(directory, config, points)
            opened.write()
        code = run_points(opened, launch, options)
        if code not in (0, 1):
            return code
    results = opened.results()
    if not results:
        raise DataError(f"no trial of {directory} has finished: see moetrain sweep status {directory}")
    best = min(results, key=lambda name: results[name].loss)
    run = next(run for run in opened.runs if run.name == best)
    pairs = (override.partition("=") for override in opened.points[run.point].overrides)
    reached = {name: value for name, _, value in pairs}
    found = [f"{name}={reached[name]}" for name in space]
    print(f"best of {len(results)} runs: {' '.join(found)}, loss {results[best].loss:.4f}")
    return 0


def _axis(number: int, values: dict[str, float]) -> Axis:
    from moetrain.sweep.settings import Axis, Choice

    return Axis("trial", (Choice(str(number), tuple(f"{name}={value:.6g}" for name, value in values.items())),))


def _asked(overrides: Sequence[str]) -> tuple[int, Space, list[str]]:
    from moetrain.compose import interval_of

    trials, space, rest, problems = _TRIALS, Space(), [], []
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "trials":
            if value.isascii() and value.isdecimal() and int(value) > 0:
                trials = int(value)
            else:
                problems.append(f"trials is {value!r}, but must be a whole number above 0")
        elif (interval := interval_of(word)) is not None:
            low, high, is_log = interval
            space[key] = interval
            if not low < high or (is_log and low <= 0):
                problems.append(f"{key} is {value}, but an interval goes from low to high, and above 0 where it is log")
        else:
            rest.append(word)
    if not space:
        problems.append("nothing is searched: give SETTING=interval(a,b), or 'SETTING=tag(log,interval(a,b))'")
    if problems:
        raise ConfigError(problems)
    return trials, space, rest


def _asker(space: Space) -> Ask:
    """Asks Optuna for the next trials, out of what has been tried: the sweep's file is its only memory."""
    try:
        import optuna
    except ImportError:
        raise DataError('the search needs Optuna, which is not installed: pip install "moetrain[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, Any] = {
        name: optuna.distributions.FloatDistribution(low, high, log=is_log)
        for name, (low, high, is_log) in space.items()
    }

    def ask(opened: Sweep, count: int) -> list[dict[str, float]]:
        # seeded by how many there were: after a restart it asks for what it would have asked for without one
        sampler = optuna.samplers.TPESampler(seed=len(opened.points), n_startup_trials=5)
        study = optuna.create_study(sampler=sampler)
        results = opened.results()
        for run in (run for run in opened.runs if run.name in results):
            given = dict(override.partition("=")[::2] for override in opened.points[run.point].overrides)
            values = {name: float(given[name]) for name in space}
            trial = optuna.trial.create_trial(params=values, distributions=distributions, value=results[run.name].loss)
            study.add_trial(trial)
        return [dict(study.ask(distributions).params) for _ in range(count)]

    return ask
