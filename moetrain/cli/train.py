"""The verbs around a run: train, prepare, config."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.model import write_on
from moetrain.cli.options import Options as Words
from moetrain.cli.options import settings
from moetrain.errors import ConfigError
from moetrain.parallel.lifeline import STOPPED

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig
    from moetrain.data.corpus import Prepared
    from moetrain.report.screen import Baselines

HELP = {
    "train": """usage: moetrain train [key=value …] [--config-dir DIR] [--dry-run]

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
""",
    "prepare": """usage: moetrain prepare [key=value …] [--config-dir DIR]

Reads data.text, trains the tokenizer (or takes data.tokenizer) and writes token files to data.prepared
(prepared/NAME-DIGEST), on all cores. What is there already is not made again but compared with its digests; after a
crash or an interrupt the same command goes on where it was.

examples:
  moetrain prepare
  moetrain prepare 'data.text=[books/*.txt]' data.name=books model.vocab_size=16384
  moetrain prepare data.text=wiki.parquet data.text_column=body data.tokenizer=tokenizer.json
  moetrain prepare data.text=notes.jsonl data.name=notes prepare.duplicates=exact prepare.min_characters=20
""",
    "config": """usage: moetrain config [key=value …] [--config-dir DIR]

Prints the settings a run would have, as YAML; beside each value, the file that set it, `command line`, `default`, or
`worked out` from other settings.

examples:
  moetrain config
  moetrain config model=glam_64b_64e parallel.zero_stage=2
""",
}


def train(words: Sequence[str]) -> int:
    """The verb `train`."""
    options = Words.read(words, flags=("--dry-run",))
    run, _ = settings(options)
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
        sample = "".join(write_on(run_dir=run_dir, prompt=opening)) if screen.is_small(run) else ""
        screen.last_screen(run, run_dir=run_dir, baselines=_baselines(run), opening=opening, sample=sample)
    return 0


def prepare(words: Sequence[str]) -> int:
    """The verb `prepare`."""
    run, _ = settings(Words.read(words))
    from moetrain.report.screen import prepared_text

    directory, prepared = _prepared(run, verify=True)
    print(prepared_text(directory, prepared))
    return 0


def config(words: Sequence[str]) -> int:
    """The verb `config`."""
    run, composed = settings(Words.read(words))
    from moetrain.report.screen import config_text

    print(config_text(run, composed=composed.settings, sources=composed.sources))
    return 0


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


def _prepared(run: RunConfig, *, verify: bool = False) -> tuple[Path, Prepared]:
    """The token files of a run, made now if they are not there."""
    from moetrain.metrics.console import StageBars
    from moetrain.prepare.build import Options
    from moetrain.prepare.directory import prepare as make
    from moetrain.prepare.directory import prepared_directory

    data = run.data
    what: dict[str, Any] = {"text": data.text, "text_column": data.text_column, "held_out": data.held_out,
                            "vocab_size": run.model.vocab_size, "tokenizer": data.tokenizer}  # fmt: skip
    what["options"] = Options(**asdict(run.prepare) | {"special_tokens": tuple(run.prepare.special_tokens)})
    directory = Path(data.prepared) if data.prepared else prepared_directory(Path("prepared"), name=data.name, **what)
    with StageBars("prepare") as bars:
        return directory, make(directory, progress=bars, say=bars.say, verify=verify, **what)


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
