"""What stands behind a verb: overrides, flags, the settings they make."""

from __future__ import annotations

import sys
import typing
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.compose import Composed
    from moetrain.config.schema import RunConfig
    from moetrain.data.build import Corpus
    from moetrain.plan.cluster import Cluster

Section = TypeVar("Section")


class Options:
    """The words after a verb: overrides, flags and the directory of own presets."""

    def __init__(self) -> None:
        self.overrides: list[str] = []
        self.flags: set[str] = set()
        self.config_dir: Path | None = None

    @staticmethod
    def read(words: Sequence[str], *, flags: Sequence[str] = ()) -> Options:
        options, problems = Options(), []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word in flags:
                options.flags.add(word)
            elif word == "--config-dir" or word.startswith("--config-dir="):
                value = word.partition("=")[2] or (rest.pop(0) if rest else "")
                options.config_dir = Path(value)
                if not value or not options.config_dir.is_dir():
                    problems.append(f"--config-dir is '{value}', but must be a directory")
            elif word.startswith("-"):
                problems.append(f"{word} is not an option: see --help")
            else:
                options.overrides.append(word)
        if problems:
            raise ConfigError(problems)
        return options


def settings(options: Options, *, jobs: int = 1) -> tuple[RunConfig, Composed]:
    """The checked settings of a run, and where each came from.

    Args:
        jobs: runs at a time that share the hosts, if it has any.
    """
    from moetrain.compose import compose
    from moetrain.config.checks import check, resolve
    from moetrain.config.freeze import flatten, freeze, to_dict
    from moetrain.launch.machine.cores import default_processes
    from moetrain.launch.nodes.hosts import shared

    composed = compose(options.overrides, config_dir=options.config_dir)
    run = freeze(composed.settings)
    if run.name is None:
        run = replace(run, name=_default_name(composed.choices, is_dense=run.model.moe is None))
    run = replace(run, launch=shared(run.launch, jobs=jobs))
    nodes = run.launch.nodes or 1
    run = resolve(run, default_processes=_fitting(default_processes(), batch=run.batch.global_batch // max(1, nodes)))
    check(run, flatten(to_dict(run)))
    return run, composed


def named_cluster(name: str, *, overrides: Sequence[str] = (), config_dir: Path | None = None) -> tuple[Cluster, float]:
    """The cluster in a file of configs/cluster, and the share of the peak that matrix products reach on it."""
    from moetrain.compose import compose_file
    from moetrain.plan.cluster import known_clusters, read_cluster
    from moetrain.plan.published import efficiency_on

    cluster = read_cluster(compose_file("cluster", name, overrides=overrides, config_dir=config_dir), name=name)
    return cluster, efficiency_on(cluster, known_clusters())


def corpus_of(run: RunConfig, *, verify: bool = False) -> Corpus:
    """The token files of each source of a run, made now if they are not there.

    Args:
        verify: compare those that are there with their digests; else only those touched since they were written.
    """
    if run.data.stream:
        raise ConfigError(
            ["data.stream is true, but this needs token files, and a stream makes its tokens while it is trained on: "
             "set data.stream=false"]
        )  # fmt: skip
    from moetrain.config.data import sources_of, told_of
    from moetrain.data.build import hold_together
    from moetrain.data.corpus import Prepared, mark_compared, open_prepared, was_touched
    from moetrain.instruct.build import instruction_directory, prepare_instructions
    from moetrain.metrics.console import StageBars
    from moetrain.prepare.directory import prepare
    from moetrain.prepare.directory import prepared_directory as named
    from moetrain.prepare.reading import Options as Chosen

    chosen = Chosen(**asdict(run.prepare) | {"special_tokens": tuple(run.prepare.special_tokens)})
    parts: dict[str, Prepared] = {}
    compared: list[str] = []

    def compares(name: str, directory: Path) -> bool:
        touched = was_touched(directory)
        if touched and not verify:
            print(f"{directory} was touched since it was written: comparing it with its digests", flush=True)
        if touched or verify:
            compared.append(name)
        return touched or verify

    tokenizer = run.data.tokenizer
    for name, source in sources_of(run.data).items():
        with told_of(name, run.data):
            if source.text is None:
                directory = Path(str(source.prepared))
                parts[name] = open_prepared(directory, verify=compares(name, directory))
            else:
                what: dict[str, Any] = {"text": source.text, "held_out": source.held_out,
                                        "vocab_size": run.model.vocab_size, "tokenizer": tokenizer,
                                        "options": chosen}  # fmt: skip
                is_instruction = source.format == "instruction"
                what |= {"template": run.data.template} if is_instruction else {"text_column": source.text_column}
                place = instruction_directory if is_instruction else named
                directory = Path(source.prepared or place(Path("prepared"), name=name, **what))
                what["verify"] = compares(name, directory)
                with StageBars("prepare" if run.data.sources is None else f"prepare {name}") as bars:
                    if is_instruction:
                        parts[name] = prepare_instructions(directory, progress=bars, **what)
                    else:
                        parts[name] = prepare(directory, progress=bars, say=bars.say, **what)
        tokenizer = tokenizer or str(parts[name].tokenizer_path)
    corpus = hold_together(parts, verify=compared)
    for name in compared:
        mark_compared(parts[name].directory)
    return corpus


def opening_of(run: RunConfig, run_dir: Path, *, is_begun: bool) -> Corpus:
    """What must be there before a run that streams its text: tokenizer, held-out text, the very first tokens.

    Args:
        is_begun: whether it has checkpoints.
    """
    from moetrain.config.data import label_of
    from moetrain.data.build import Corpus
    from moetrain.metrics.console import StageBars
    from moetrain.stream.opening import open_stream

    with StageBars("stream") as bars:
        opening = open_stream(run, run_dir, is_begun=is_begun, progress=bars)
    return Corpus({label_of(run.data): opening}, is_streamed=True)


def _fitting(processes: int, *, batch: int) -> int:
    """The most of this machine's processes that share the batch evenly: 6 GPUs take a batch of 16 four at a time."""
    return max((n for n in range(1, processes + 1) if batch % n == 0), default=1)


def _default_name(choices: dict[str, str], *, is_dense: bool) -> str:
    moe = choices.get("model/moe", "preset")
    if is_dense:
        return f"{choices['model']}-dense"
    return choices["model"] if moe in ("preset", "none") else f"{choices['model']}-{moe}"


def warn(message: str) -> None:
    """Tell what a user should know beside the result."""
    print(f"warning: {message}", file=sys.stderr)


def number(text: str) -> int | float | str:
    """A word as the number it may be."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def own_words(words: Sequence[str], *, defaults: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A verb's own settings, over their defaults, and the words that are not among them.

    Raises:
        ConfigError: one that must be a whole number from 0 is none.
    """
    own, rest, problems = dict(defaults), [], []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in own:
            rest.append(word)
        elif isinstance(defaults[key], int) and not (value.isascii() and value.isdecimal()):
            problems.append(f"{key} is {value!r}, but must be a whole number from 0")
        else:
            own[key] = int(value) if isinstance(defaults[key], int) else value
    if problems:
        raise ConfigError(problems)
    return own, rest


def paths_and_settings(
    words: Sequence[str], section: type[Section], *, paths: Sequence[str]
) -> tuple[list[Path], Section]:
    """What follows a verb that takes paths and settings of its own, a dataclass.

    Args:
        section: the settings; none of the numbers may be below 0, and a list is given word by word.
        paths: what each path is, in words.

    Raises:
        ConfigError: another number of paths, or settings that are not there or of another type.
    """
    from moetrain.config.freeze import freeze_section

    hints = typing.get_type_hints(section)
    texts = {name for name, hint in hints.items() if str in (typing.get_args(hint) or (hint,))}
    lists = {name for name, hint in hints.items() if typing.get_origin(hint) is list}
    given: dict[str, Any] = {}
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.isidentifier() and not Path(word).exists():
            if key in lists:
                given.setdefault(key, []).append(value)
                continue
            truth = {"true": True, "false": False, "null": None}
            given[key] = value if key in texts and value != "null" else truth.get(value.lower(), number(value))
        elif word.startswith("-"):
            raise ConfigError([f"{word} is not an option: see --help"])
        else:
            found.append(Path(word))
    if len(found) != len(paths):
        raise ConfigError([f"{len(found)} paths are given, but it takes {len(paths)} ({', '.join(paths)}): see --help"])
    wanted = freeze_section(section, given)
    problems = [f"{name} is {value:,}, but must be at least 0" for name, value in vars(wanted).items()
                if type(value) in (int, float) and not value >= 0]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return found, wanted
