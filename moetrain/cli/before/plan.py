"""The verb plan: what a run will need and cost, before a GPU is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.options import Options, named_cluster
from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config.schema import ModelConfig
    from moetrain.plan.search import Plan

HELP = {
    "plan": """usage: moetrain plan cluster=NAME [nodes=N] [tokens=T] [objective=time|cost|gpus] [key=value …]
                     [--write FILE.yaml] [--picture FILE.png] [--config-dir DIR]
       moetrain plan compare RUN_DIR… cluster=NAME

Says which layouts of a model fit a cluster, how long a run takes on each and what it costs, the best first; and why
each of the others does not fit. No GPU and no torch is needed. What it goes by: docs/plan.md.

  cluster=NAME        a file of configs/cluster, or of DIR/cluster; single entries: cluster.price_per_gpu_hour=2.5
  nodes=N             nodes of it: 16, or 1..64 (powers of two), or 4,6,8; default 1
  tokens=T            length of the run: 300B, 2T, 15e12; default 20 for each active parameter (arXiv:2203.15556)
  objective=…         what is best: time (default), cost, or gpus (the fewest that fit)
  imbalance=X         rows at the fullest device's experts over the mean that memory must hold; default 1.2
  show=N              how many layouts to show; default 5
  --write FILE.yaml   the best as an experiment for train: a name alone goes into ./experiment/
  --picture FILE.png  memory and time of the layouts shown

Other settings are those of train: model=…, batch.global_batch=…, batch.sequence_length=…, model.dtype=….

`plan compare` puts the measured steps of runs beside the plan, and says which cluster.efficiency would have been right.

examples:
  moetrain plan model=mixtral_8x7b cluster=h100_ib nodes=16 tokens=2T batch.sequence_length=4096
  moetrain plan model=mixtral_8x7b cluster=h200_ib nodes=1..32 tokens=2T objective=cost
  moetrain plan model=gpt4_8x220b cluster=h100_ib nodes=512 tokens=13T
  moetrain plan cluster=cpu tokens=3M --write tiny.yaml
""",
}
_OWN = ("cluster", "nodes", "tokens", "objective", "imbalance", "show")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_MOST_NODES = 100_000
_PLANNED = ("batch.", "parallel.", "launch.", "schedule.steps", "schedule.tokens", "run_dir")
"""Settings that the plan decides, or that name a place."""


@dataclass(frozen=True)
class _Asked:
    """The words of the command line that are the plan's own."""

    cluster: str
    nodes: tuple[int, ...]
    tokens: float | None
    objective: str
    imbalance: float
    show: int
    cluster_overrides: list[str]


@dataclass(frozen=True)
class _Model:
    """What is to be trained, and what of the command line is not for the plan to decide."""

    model: ModelConfig
    name: str
    sequence_length: int
    mask_documents: bool
    global_batch: int | None
    """None: not given."""
    choices: dict[str, str]
    """The files chosen for model and model/moe."""
    settings: dict[str, Any]
    """Dotted name -> value, given by the user."""


def plan(words: Sequence[str]) -> int:
    """The verb `plan`."""
    if words and words[0] == "compare":
        return _compare(words[1:])
    write, rest = _file_option(words, "--write", ending=".yaml")
    picture, rest = _file_option(rest, "--picture", ending=".png")
    options = Options.read(rest)
    asked, options.overrides = _asked(options.overrides)
    write = write and _experiment_path(write, options.config_dir)
    from moetrain.plan.layout import everything, offered
    from moetrain.plan.search import Question, search
    from moetrain.report.plan import plan_screen

    asked_for = _model(options)
    cluster, efficiency = named_cluster(asked.cluster, overrides=asked.cluster_overrides, config_dir=options.config_dir)
    question = Question(
        model=asked_for.model,
        sequence_length=asked_for.sequence_length,
        mask_documents=asked_for.mask_documents,
        tokens=_tokens(asked, asked_for.model),
        nodes=asked.nodes,
        objective=asked.objective,
        global_batch=asked_for.global_batch,
        imbalance=asked.imbalance,
    )
    offer = offered(asked_for.model.dtype)
    answer = search(question, cluster, efficiency=efficiency, offer=offer, modelled=everything())
    title = f"{asked_for.name} on {asked.cluster}"
    plan_screen(question, cluster, answer, title=title, show=asked.show, efficiency=efficiency)
    if picture and answer.plans:
        from moetrain.report.figures import plan_bars

        plan_bars(answer.plans[: asked.show], picture, title=title, limit_gb=cluster.memory_gb)
        print(f"picture     {picture}")
    if write:
        found = answer.plans[0] if answer.plans else None
        _write(write, found, tokens=question.tokens, asked_for=asked_for, command=["plan", *words])
    return 0


def _asked(overrides: Sequence[str]) -> tuple[_Asked, list[str]]:
    from moetrain.plan.search import OBJECTIVES

    given, of_cluster, rest, problems = {}, [], [], []
    for word in overrides:
        key, equals, value = word.partition("=")
        if key in _OWN and equals:
            given[key] = value
        elif key.startswith("cluster."):
            of_cluster.append(word)
        else:
            rest.append(word)
    if not given.get("cluster"):
        from moetrain.compose import presets

        problems.append(f"cluster is not given: use cluster=NAME, one of {', '.join(presets('cluster'))}, or your own")
    nodes = _nodes(given.get("nodes", "1"))
    if not nodes:
        problems.append(
            f"nodes is '{given['nodes']}', but must be a number from 1 to {_MOST_NODES:,}, a range such as 1..16, or a "
            "list such as 2,4,6"
        )
    tokens = _amount(given["tokens"]) if "tokens" in given else None
    if "tokens" in given and tokens is None:
        problems.append(f"tokens is '{given['tokens']}', but must be a number above 0, such as 300B, 2T or 15e12")
    objective = given.get("objective", "time")
    if objective not in OBJECTIVES:
        problems.append(f"objective is '{objective}', but must be one of {', '.join(OBJECTIVES)}")
    imbalance, show = _amount(given.get("imbalance", "1.2")), _amount(given.get("show", "5"))
    if imbalance is None or not 1 <= imbalance <= 1000:
        problems.append(f"imbalance is '{given['imbalance']}', but must be at least 1: 1 is an even load")
    if show is None or show != int(show):
        problems.append(f"show is '{given['show']}', but must be a whole number above 0")
    if problems:
        raise ConfigError(problems)
    asked = _Asked(given["cluster"], nodes, tokens, objective, imbalance or 1.0, int(show or 1), of_cluster)
    return asked, rest


def _compare(words: Sequence[str]) -> int:
    """Runs of ours beside the plan for the cluster they ran on."""
    options = Options.read(words)
    run_dirs = [Path(word) for word in options.overrides if "=" not in word]
    asked, left = _asked([word for word in options.overrides if "=" in word])
    problems = [f"'{word}' is no word of plan compare: name run directories and cluster=NAME" for word in left]
    if not run_dirs:
        problems.append("no run is named: write moetrain plan compare RUN_DIR… cluster=NAME")
    if problems:
        raise ConfigError(problems)
    from moetrain.config.freeze import read_run
    from moetrain.metrics.log import read_metrics
    from moetrain.plan.published import own_run
    from moetrain.report.plan import comparison_screen

    cluster, efficiency = named_cluster(asked.cluster, overrides=asked.cluster_overrides, config_dir=options.config_dir)
    runs = [own_run(read_run(each), read_metrics(each / "metrics.jsonl"), cluster=asked.cluster) for each in run_dirs]
    comparison_screen(runs, cluster, name=asked.cluster, efficiency=efficiency)
    return 0


def _amount(text: str) -> float | None:
    """2T, 300B, 15e12, 1.2 as a number above 0; None for anything else."""
    unit = _UNITS.get(text[-1:].upper(), 0.0)
    try:
        value = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        return None
    return value if 0 < value < 1e30 else None


def _nodes(text: str) -> tuple[int, ...]:
    """16, 1..16 or 2,4,6 as numbers of nodes; empty for anything else."""
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= _MOST_NODES for word in words):
        return ()
    numbers = [int(word) for word in words]
    if not dots:
        return tuple(sorted(set(numbers)))
    between = [2**power for power in range(20) if numbers[0] < 2**power < numbers[1]]
    return tuple(sorted({numbers[0], *between, numbers[1]})) if numbers[0] <= numbers[1] else ()


def _model(options: Options) -> _Model:
    """The model of the settings, and what else was asked for."""
    from moetrain.compose import COMMAND_LINE, compose
    from moetrain.config.checks import check, resolve
    from moetrain.config.freeze import flatten, freeze, to_dict
    from moetrain.config.launch.settings import LaunchConfig

    composed = compose(options.overrides, config_dir=options.config_dir)
    run = resolve(freeze(composed.settings), default_processes=1)
    # the layout is what is asked for: of the rules, those on one process with one sequence are to hold here
    alone = replace(
        run,
        batch=replace(run.batch, global_batch=1, micro_batch=1),
        launch=LaunchConfig(nodes=1, processes=1),
        parallel=replace(run.parallel, expert_parallel=1),
    )
    check(alone, flatten(to_dict(alone)))
    sources = {name: source for name, source in composed.sources.items()
               if source == COMMAND_LINE or source.startswith("experiment/")}  # fmt: skip
    flat = flatten(composed.settings)
    settings = {name: flat[name] for name in sources if name in flat and not name.startswith(_PLANNED)}
    name = str(run.name or composed.choices["model"]) if run.model.moe else f"{composed.choices['model']} (dense)"
    return _Model(
        model=run.model,
        name=name,
        sequence_length=run.sequence_length,
        mask_documents=run.data.mask_documents,
        global_batch=run.batch.global_batch if "batch.global_batch" in sources else None,
        choices={group: composed.choices[group] for group in ("model", "model/moe") if group in composed.choices},
        settings=settings,
    )


def _tokens(asked: _Asked, model: ModelConfig) -> float:
    if asked.tokens is not None:
        return asked.tokens
    from moetrain.plan.flops import count_parameters

    return 20.0 * count_parameters(model).active


def _file_option(words: Sequence[str], option: str, *, ending: str) -> tuple[Path | None, list[str]]:
    """Take ``option FILE`` or ``option=FILE`` out of the words."""
    rest, found = [], None
    waiting = iter(words)
    for word in waiting:
        if word == option or word.startswith(f"{option}="):
            value = word.partition("=")[2] if "=" in word else next(waiting, "")
            if not value.endswith(ending) or Path(value).name == ending:
                raise ConfigError([f"{option} is '{value}', but must be a file whose name ends in {ending}"])
            found = Path(value)
        else:
            rest.append(word)
    return found, rest


def _write(path: Path, found: Plan | None, *, tokens: float, asked_for: _Model, command: Sequence[str]) -> None:
    """The best plan as an experiment, which train takes as it is."""
    from moetrain.report.plan import experiment_text, train_command

    if found is None:
        raise ConfigError([f"{path} is not written: no layout that train runs fits; see above for what is missing"])
    text = experiment_text(
        found,
        title=asked_for.name,
        sequence_length=asked_for.sequence_length,
        tokens=tokens,
        choices=asked_for.choices,
        settings=asked_for.settings,
        command=command,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".yaml.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    print(f"written     {path}; start it with\n  {train_command(path)}")
    if found.nodes > 1:
        print("  (as a SLURM job; with launch=hostfile or launch=kubernetes otherwise)")


def _experiment_path(path: Path, config_dir: Path | None) -> Path:
    """Where ``--config-dir`` finds an experiment."""
    if path.parent == Path("."):
        return (config_dir or Path(".")) / "experiment" / path
    if path.parent.name != "experiment":
        told = f"--write is '{path}', but must lie in a directory named experiment, where --config-dir finds it: use "
        raise ConfigError([f"{told}{path.parent / 'experiment' / path.name}"])
    return path
