"""`moetrain VERB key=value …`. Each verb imports only the rooms it needs: help and checks start at once."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain import __version__
from moetrain.errors import ConfigError, MoetrainError
from moetrain.parallel.lifeline import STOPPED

if TYPE_CHECKING:
    from moetrain.compose import Composed
    from moetrain.config.schema import RunConfig
    from moetrain.data.corpus import Prepared
    from moetrain.report.screen import Baselines

HELP = """moetrain: pretraining of sparse mixture-of-experts language models

usage: moetrain VERB [key=value …] [--help]

  train      train a model, or go on with a run that was interrupted
  prepare    text to token files (train does it by itself)
  sample     let a trained model write
  config     show every setting of a run, and where each comes from

examples:
  moetrain train                                          8 experts, top-2, on two processes
  moetrain train model.moe.num_experts=16 name=wide       another run, in runs/wide
  moetrain train model=mixtral_8x7b --dry-run             check the settings, start nothing
  moetrain sample prompt="My fellow citizens"
"""

TRAIN_HELP = """usage: moetrain train [key=value …] [--config-dir DIR] [--dry-run]

Trains the run that the settings describe, in RUN_DIR (runs/NAME). The same command again goes on from the newest
whole checkpoint, also after a crash and on another number of processes; a finished run shows its result.

  --dry-run           check the settings and say what would run
  --config-dir DIR    presets of your own, laid out like moetrain's: DIR/model/mine.yaml, DIR/experiment/mine.yaml

exit codes: 0 finished, 2 something to mend (said in one message), 75 stopped on request and saved

examples:
  moetrain train
  moetrain train name=long schedule.steps=2000 optim.lr=6e-4
  moetrain train model/moe=none                           the dense model of the same active size
  moetrain train 'data.text=[books/*.txt,notes.jsonl]' name=books
"""

PREPARE_HELP = """usage: moetrain prepare [key=value …] [--config-dir DIR]

Reads data.text, trains the tokenizer (or takes data.tokenizer) and writes token files to data.prepared
(prepared/NAME-DIGEST). What is there already is not made again.

examples:
  moetrain prepare
  moetrain prepare 'data.text=[books/*.txt]' data.name=books model.vocab_size=16384
  moetrain prepare data.text=wiki.parquet data.text_column=body data.tokenizer=tokenizer.json
"""

CONFIG_HELP = """usage: moetrain config [key=value …] [--config-dir DIR]

Prints the settings a run would have, as YAML; beside each value, the file that set it, `command line`, `default`, or
`worked out` from other settings.

examples:
  moetrain config
  moetrain config model=glam_64b_64e parallel.zero_stage=2
"""

SAMPLE_HELP = """usage: moetrain sample [run_dir=DIR] [prompt=TEXT] [max_tokens=N] [temperature=X] [top_k=N] [seed=N]

Writes on from a prompt with the newest whole checkpoint of a run.

examples:
  moetrain sample
  moetrain sample run_dir=runs/tiny prompt="The state of the Union is" temperature=0.7 seed=3
"""

_LARGEST = 1 << 62


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader of our output left, as `moetrain config | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MoetrainError as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"moetrain: the disk is full ({error.filename or 'a file of the run'}): make room", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        print(f"moetrain: {error.filename}: {error.strerror}: choose another place, or mend it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moetrain: interrupted", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int:
    if words and words[0] in ("--version", "version"):
        print(f"moetrain {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"moetrain: there is no verb '{verb}': use {', '.join(VERBS)}; see moetrain --help", file=sys.stderr)
        return 2
    action, help_text = VERBS[verb]
    if "-h" in rest or "--help" in rest:
        print(help_text + (_preset_help() if verb != "sample" else ""))
        return 0
    return action(rest)


def train(words: Sequence[str]) -> int:
    """The verb `train`."""
    options = _Options.read(words, flags=("--dry-run",))
    run, _ = _settings(options)
    from moetrain.report import screen

    run_dir = Path(str(run.run_dir))
    if "--dry-run" in options.flags:
        _compare_with_earlier(run, run_dir)
        print(f"{screen.plan_text(run)}\na dry run: nothing was started")
        return 0
    from moetrain.launch.lock import RunLock

    with RunLock(run_dir):
        run = _prepare_run(run, run_dir)
        if screen.is_finished(run, run_dir):
            print(f"{run_dir} is finished; here is what it reached. For another run, set name=… or schedule.steps=…\n")
        else:
            print(screen.plan_text(run), flush=True)
            from moetrain.launch.local import run_local

            if run_local(run_dir, processes=run.launch.processes or 1).stopped:
                print("stopped on request; the same command goes on from the newest checkpoint")
                return STOPPED
        screen.draw(run_dir)
        opening = _opening(run)
        sample = "".join(_sample(run_dir=run_dir, prompt=opening)) if screen.is_small(run) else ""
        screen.last_screen(run, run_dir=run_dir, baselines=_baselines(run), opening=opening, sample=sample)
    return 0


def prepare(words: Sequence[str]) -> int:
    """The verb `prepare`."""
    run, _ = _settings(_Options.read(words))
    from moetrain.report.screen import prepared_text

    directory, prepared = _prepared(run)
    print(prepared_text(directory, prepared))
    return 0


def config(words: Sequence[str]) -> int:
    """The verb `config`."""
    run, composed = _settings(_Options.read(words))
    from moetrain.report.screen import config_text

    print(config_text(run, composed=composed.settings, sources=composed.sources))
    return 0


def sample(words: Sequence[str]) -> int:
    """The verb `sample`."""
    from moetrain.config.freeze import freeze_section
    from moetrain.config.schema import SampleConfig

    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError([f"'{word}' is not a setting: write key=value, e.g. prompt=\"My fellow citizens\""])
        given[key] = value if key in ("prompt", "run_dir") else _number(value)
    wanted = freeze_section(SampleConfig, given)
    rules = (("max_tokens", wanted.max_tokens, 1), ("temperature", wanted.temperature, 0), ("top_k", wanted.top_k, 0),
             ("seed", wanted.seed, 0))  # fmt: skip
    problems = [f"{name} is {value}, but must be from {least} to {_LARGEST:.0e}"
                for name, value, least in rules if not least <= value <= _LARGEST]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    pieces = _sample(**asdict(wanted) | {"run_dir": Path(wanted.run_dir)})
    print(wanted.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class _Options:
    """The words after a verb: overrides, flags and the directory of own presets."""

    def __init__(self) -> None:
        self.overrides: list[str] = []
        self.flags: set[str] = set()
        self.config_dir: Path | None = None

    @staticmethod
    def read(words: Sequence[str], *, flags: Sequence[str] = ()) -> _Options:
        options, problems = _Options(), []
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


def _settings(options: _Options) -> tuple[RunConfig, Composed]:
    from moetrain.compose import compose
    from moetrain.config.checks import check, resolve
    from moetrain.config.freeze import flatten, freeze, to_dict
    from moetrain.launch.local import default_processes

    composed = compose(options.overrides, config_dir=options.config_dir)
    run = freeze(composed.settings)
    if run.name is None:
        run = replace(run, name=_default_name(composed.choices, is_dense=run.model.moe is None))
    run = resolve(run, default_processes=_fitting(default_processes(), batch=run.batch.global_batch))
    check(run, flatten(to_dict(run)))
    return run, composed


def _fitting(processes: int, *, batch: int) -> int:
    """The most of this machine's processes that share the batch evenly: 6 GPUs take a batch of 16 four at a time."""
    return max((n for n in range(1, processes + 1) if batch % n == 0), default=1)


def _default_name(choices: dict[str, str], *, is_dense: bool) -> str:
    moe = choices.get("model/moe", "preset")
    if is_dense:
        return f"{choices['model']}-dense"
    return choices["model"] if moe in ("preset", "none") else f"{choices['model']}-{moe}"


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
    free = [f"{name} {old} -> {new}" for name, (old, new) in changed.items() if name != "data.prepared"]
    if free:
        print("changed since the last start: " + ", ".join(free))


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['num_experts']} experts"  # the only section that may be null
    return "null" if value is None else str(value)


def _prepare_run(run: RunConfig, run_dir: Path) -> RunConfig:
    """Hold the settings against an earlier start, make the tokens, and write down what is about to run."""
    from moetrain.config.freeze import write_run
    from moetrain.config.origin import write_origin
    from moetrain.data.corpus import TOKENIZER

    _compare_with_earlier(run, run_dir)
    directory, prepared = _prepared(run)
    run = replace(run, data=replace(run.data, prepared=str(directory.resolve())))
    # so that the run directory can be moved, and sampled from without the token files; a checkpoint's stays with it
    if not any((run_dir / "checkpoints").glob("step_*/manifest.json")):
        shutil.copyfile(prepared.tokenizer_path, run_dir / TOKENIZER)
    write_run(run, run_dir)
    write_origin(run_dir, command=["moetrain", *sys.argv[1:]], data=asdict(prepared.meta))
    return run


def _prepared(run: RunConfig) -> tuple[Path, Prepared]:
    """The token files of a run, made now if they are not there."""
    from moetrain.data.prepare import prepare as make
    from moetrain.data.prepare import prepared_directory
    from moetrain.metrics.console import StageBars

    data = run.data
    what: dict[str, Any] = {"text": data.text, "text_column": data.text_column, "held_out": data.held_out,
                            "vocab_size": run.model.vocab_size, "tokenizer": data.tokenizer}  # fmt: skip
    directory = Path(data.prepared) if data.prepared else prepared_directory(Path("prepared"), name=data.name, **what)
    with StageBars("prepare") as bars:
        return directory, make(directory, progress=bars, **what)


def _baselines(run: RunConfig) -> Baselines:
    from moetrain.data.corpus import read_meta
    from moetrain.report.screen import Baselines

    found = read_meta(Path(str(run.data.prepared))).baselines
    return Baselines(trigram=found.trigram, xz=found.xz)


def _opening(run: RunConfig, *, tokens: int = 12) -> str:
    """The first words of the held-out text, for a sample to go on from."""
    from tokenizers import Tokenizer

    from moetrain.data.corpus import open_prepared

    prepared = open_prepared(Path(str(run.data.prepared)))
    text: str = Tokenizer.from_file(str(prepared.tokenizer_path)).decode(prepared.held_out.tokens[:tokens].tolist())
    return text


def _sample(**wanted: Any) -> Any:
    from moetrain.config.schema import SampleConfig
    from moetrain.data.corpus import TOKENIZER
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.hub.generate import generate, load_model

    defaults = asdict(SampleConfig())
    wanted = defaults | wanted
    run_dir = wanted.pop("run_dir")
    run, gpt = load_model(run_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    # positions past the trained length were never seen
    context = min(run.model.context, run.batch.sequence_length or run.model.context)
    return generate(gpt, tokenizer, context=context, **wanted)


def _preset_help() -> str:
    from moetrain.compose import presets

    lines = []
    for group, what in (("model", "models"), ("model/moe", "sparse blocks"), ("experiment", "experiments")):
        lines += [f"\n{what} ({group}=NAME):"]
        lines += [f"  {name:<18} {title}" for name, title in presets(group).items()]
    return "\n".join(lines)


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, TRAIN_HELP),
    "prepare": (prepare, PREPARE_HELP),
    "sample": (sample, SAMPLE_HELP),
    "config": (config, CONFIG_HELP),
}

if __name__ == "__main__":
    sys.exit(main())
