"""What a sweep is: axes, what is kept equal across them, seeds, and how its runs are worked off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moetrain.config.freeze import freeze_section, setting_names, suggest
from moetrain.errors import ConfigError

KEPT = ("none", "active_flops", "total_parameters", "memory", "time")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of a sweep itself; those of its runs are in ``settings`` and on the axes."""

    name: str = "sweep"
    """What it is called; it lies in sweeps/NAME."""
    sweep_dir: str | None = None
    """Where it lies. null: sweeps/NAME."""
    settings: list[str] = field(default_factory=list)
    """Overrides that every run has, as train takes them."""
    keep: str = "none"
    """What every run of the grid has alike: active_flops (of the whole run), total_parameters, memory (of one device),
    time (of the whole run, by the plan) or none."""
    free: str = "model.moe.d_expert"
    """The setting that is adjusted so that it is kept: any whole number of a run, such as model.num_layers."""
    within: list[str] = field(default_factory=list)
    """Axes along which it is not kept: at equal compute within each size, say."""
    tolerance: float = 0.02
    """How far off a run may be, as a share; a point that cannot come nearer is refused."""
    cluster: str = "cpu"
    """A file of configs/cluster, for keep=time and for the device of keep=memory."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Each point is trained once with each."""
    jobs: int | None = None
    """Runs at the same time. null: one, or, in SLURM's queue, as many as it lets."""
    retries: int = 1
    """How often a run that failed is started again, from its newest checkpoint."""
    halving: int = 0
    """At each rung, a run stays if it is among the best 1/halving of those that have come there (asynchronous
    successive halving, Li et al. 2018, arXiv:1810.05934); 0: every run goes to its end."""
    rungs: list[float] = field(default_factory=lambda: [0.25, 0.5])
    """Where runs are compared, as shares of their steps."""

    @property
    def at_once(self) -> int:
        """Runs at the same time, where we start them ourselves."""
        return 1 if self.jobs is None else self.jobs


@dataclass(frozen=True)
class Choice:
    """One place on an axis."""

    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """What is varied."""

    name: str
    """A setting, or a name for several that change together."""
    choices: tuple[Choice, ...]

    @property
    def is_named(self) -> bool:
        """Whether its choices are labels for several settings."""
        return any(choice.overrides != (f"{self.name}={choice.label}",) for choice in self.choices)


def axes_of(content: Any) -> list[Axis]:
    """Axes as a sweep's file has them: NAME -> list of values, or NAME -> {label: [override, …]}.

    Raises:
        ConfigError: an axis is neither.
    """
    if not isinstance(content, dict):
        raise ConfigError([f"axes is {content!r}, but must be a section: SETTING: [value, …] or NAME: {{label: […]}}"])
    axes, problems = [], []
    for name, given in content.items():
        if isinstance(given, list) and given:
            choices = [Choice(_text(value), (f"{name}={_text(value)}",)) for value in given]
        elif isinstance(given, dict) and given and all(isinstance(each, list) for each in given.values()):
            choices = [Choice(str(label), tuple(map(str, each))) for label, each in given.items()]
        else:
            problems.append(f"axes.{name} is {given!r}, but must be a list of values, or {{label: [override, …]}}")
            continue
        axes.append(Axis(str(name), tuple(choices)))
    if problems:
        raise ConfigError(problems)
    return axes


def freeze_sweep(settings: dict[str, Any], axes: Sequence[Axis]) -> SweepConfig:
    """The checked settings.

    Raises:
        ConfigError: every one that is unknown, of the wrong type, or breaks a rule.
    """
    config = freeze_section(SweepConfig, settings)
    problems = [*_numbers(config), *_names(config, axes)]
    if config.keep not in KEPT:
        problems.append(f"keep is {config.keep!r}, but must be one of {', '.join(KEPT)}")
    if not axes:
        problems.append(
            "no axis is given: write SETTING=value,value,…, or experiment=NAME of a file in configs/sweep (seeds alone "
            "compare nothing)"
        )
    if problems:
        raise ConfigError(problems)
    return config


def _numbers(config: SweepConfig) -> list[str]:
    problems = []
    for name, value, least in (("jobs", config.at_once, 1), ("retries", config.retries, 0)):
        if value < least:
            problems.append(f"{name} is {value}, but must be at least {least}")
    if config.halving != 0 and config.halving < 2:
        problems.append(f"halving is {config.halving}, but must be 0 (off) or at least 2: 2 stops the worse half")
    if not 0 < config.tolerance < 1:
        problems.append(f"tolerance is {config.tolerance}, but must lie in (0, 1): 0.02 is 2 percent")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        problems.append(f"seeds is {config.seeds}, but must be different whole numbers from 0")
    if not config.rungs or any(not 0 < rung < 1 for rung in config.rungs) or sorted(config.rungs) != config.rungs:
        problems.append(f"rungs is {config.rungs}, but must be shares of the run in (0, 1), growing")
    return problems


def _names(config: SweepConfig, axes: Sequence[Axis]) -> list[str]:
    problems = []
    names = [axis.name for axis in axes]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"axis {name} is given twice: leave one")
    for name in config.within:
        if name not in names:
            problems.append(f"within names {name}, but the axes are {', '.join(names) or 'none'}")
    if config.keep != "none" and config.free not in setting_names():
        problems.append(f"free is '{config.free}', which is not a setting{suggest(config.free, setting_names())}")
    if config.keep != "none" and config.free in names:
        problems.append(f"free is {config.free}, which is an axis: name a setting that is not")
    if not re.fullmatch(r"[\w.@+-]+", config.name):
        problems.append(f"name is {config.name!r}, but must be letters, digits and . _ - + @: it names a directory")
    taken = {"seed": "seeds: [1, 2]", "name": "name", "run_dir": "sweep_dir"}
    for name in [*names, *(word.partition("=")[0] for word in config.settings)]:
        if name in taken:
            problems.append(f"{name} is given as a setting of the runs, but a sweep sets it itself: use {taken[name]}")
    for axis in axes:
        labels = [choice.label for choice in axis.choices]
        if len(set(labels)) < len(labels):
            problems.append(f"axis {axis.name} has a value twice: leave one of them")
    return problems


def _text(value: Any) -> str:
    """A value of a file as the command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
