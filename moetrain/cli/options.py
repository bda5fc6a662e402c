"""What stands behind a verb: overrides, flags, the settings they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.compose import Composed
    from moetrain.config.schema import RunConfig


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


def settings(options: Options) -> tuple[RunConfig, Composed]:
    """The checked settings of a run, and where each came from."""
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


def number(text: str) -> int | float | str:
    """A word as the number it may be."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
