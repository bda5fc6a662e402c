"""Command line to settings: Hydra composes ``configs/`` here, once, on one process. The only import of Hydra."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moetrain.config.freeze import config_directory, flatten, is_setting, setting_names, suggest
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

PRIMARY = "run"
COMMAND_LINE = "command line"
GROUPS = ("model", "model/moe", "launch", "experiment")
"""Directories of ``configs/``: each file in one is a preset, chosen by GROUP=NAME."""


@dataclass(frozen=True)
class Composed:
    """Settings as plain dicts, and where each came from."""

    settings: dict[str, Any]
    sources: dict[str, str]
    """Dotted name -> the file or ``command line`` that set it; not there: the default."""
    choices: dict[str, str]
    """Config group -> the file chosen in it, e.g. ``model/moe`` -> ``none``."""


def presets(group: str) -> dict[str, str]:
    """The files of a config group and a line on each, e.g. of ``model``: its title and its parameters."""
    found = {}
    for path in sorted((config_directory() / group).glob("*.yaml")):
        lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
        title = next(line for line in lines if not line.startswith("@package")).partition(" Source:")[0]
        size = [line for line in lines if line.endswith("active per token.")]
        found[path.stem] = " ".join([title, *size])
    return found


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Composed:
    """Compose the settings of a run.

    Args:
        overrides: Hydra's: ``model=mixtral_8x7b``, ``model/moe=none``, ``optim.lr=3e-4``, …
        config_dir: a directory of the user's own, laid out like ``configs/``.

    Raises:
        ConfigError: what Hydra or the file of a preset would not take; all unknown settings at once.
    """
    parsed = _parse(overrides)
    ConfigStore.instance().store(name="schema", node=dataclasses.asdict(RunConfig()))
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        loader = _loader(config_dir)
        _refuse_unknown(parsed, loader=loader)
        try:
            composed = hydra_compose(PRIMARY, overrides=list(overrides), return_hydra_config=True)
            choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra")}
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            settings = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
            sources = dict(_sources(overrides, parsed=parsed, loader=loader))
        except Exception as error:  # besides its own, Hydra lets PyYAML's, OmegaConf's and bare ValueErrors through
            raise ConfigError([_in_a_line(error)]) from error
    assert isinstance(settings, dict)
    _refuse_unknown_in_files(sources)
    return Composed(settings={str(key): value for key, value in settings.items()}, sources=sources, choices=choices)


def values_of(override: str) -> list[str] | None:
    """What Hydra's multirun makes of an override: ``optim.lr=1,2`` and ``range(…)``, one override for each value.

    Returns:
        None: it gives one value.

    Raises:
        ConfigError: it is no override.
    """
    (parsed,) = _parse([override])
    if not parsed.is_discrete_sweep():
        return None
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def interval_of(override: str) -> tuple[float, float, bool] | None:
    """``interval(a, b)`` of an override, and whether it is tagged log: ``optim.lr=tag(log, interval(1e-4, 1e-2))``."""
    (parsed,) = _parse([override])
    if not parsed.is_interval_sweep():
        return None
    value = parsed.value()
    assert isinstance(value, IntervalSweep)
    return float(value.start or 0.0), float(value.end or 0.0), "log" in value.tags


def compose_file(
    group: str, name: str, *, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> dict[str, Any]:
    """The settings in one file of a group that is no part of a run, such as ``cluster``.

    Args:
        group: a directory of ``configs/``.
        name: of the file in it, ours or one of ``config_dir``.
        overrides: Hydra's, of settings the file has: ``cluster.price_per_gpu_hour=2.5``.
        config_dir: a directory of the user's own, laid out like ``configs/``.

    Raises:
        ConfigError: there is no such file, or Hydra would not take it or an override.
    """
    parsed = _parse(overrides)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        loader = _loader(config_dir)
        options = loader.repository.get_group_options(group, ObjectType.CONFIG)
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError([f"'{group}={name}' is not there: {group} is one of {', '.join(options)}{hint}"])
        for override in parsed:
            if (
                override.is_add()
                or override.is_delete()
                or override.is_sweep_override()
                or override.package is not None
            ):
                raise ConfigError(
                    [f"'{override.input_line}' is not an override of a {group}: write {group}.NAME=VALUE"]
                )
        try:
            composed = OmegaConf.to_container(hydra_compose(f"{group}/{name}", overrides=list(overrides)), resolve=True)
        except Exception as error:  # as in ``compose``
            raise ConfigError([f"{group}/{name}.yaml: {_in_a_line(error)}"]) from error
    content = composed.get(group) if isinstance(composed, dict) else None
    if not isinstance(content, dict):
        raise ConfigError(
            [f"{group}/{name}.yaml holds no settings: see configs/{group}/h100_ib.yaml for how one looks"]
        )
    return {str(key): value for key, value in content.items()}


def _loader(config_dir: Path | None) -> ConfigLoaderImpl:
    """Hydra's reader of files, which then finds the user's directory too."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    if config_dir is None:
        return loader
    ours = sorted(path.relative_to(config_directory()) for path in config_directory().rglob("*.yaml"))
    hidden = [config_dir / path for path in ours if (config_dir / path).is_file()]
    if hidden:
        raise ConfigError([f"{path} would be hidden by moetrain's file of this name: rename it" for path in hidden])
    # not hydra.searchpath=…: a path may hold characters that an override may not
    loader.config_search_path.prepend("config-dir", f"file://{config_dir.resolve()}", "schema")
    loader.repository = ConfigRepository(loader.config_search_path)
    return loader


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed, problems = [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except Exception:  # the parser's own, and those of what it is built on: ValueError, RecursionError
            problems.append(
                f"'{text}' is not an override: write key=value; quote values with spaces, commas or brackets, "
                "e.g. 'name=\"a, b\"'"
            )
    if problems:
        raise ConfigError(problems)
    return parsed


def _refuse_unknown(overrides: Sequence[Override], *, loader: ConfigLoaderImpl) -> None:
    known, problems = setting_names(), []
    for override in overrides:
        key, text = override.key_or_group, override.input_line
        is_group = bool(key) and not key.startswith("hydra") and loader.repository.group_exists(key)
        if override.is_delete():
            problems.append(f"'{text}' takes a setting away, but a run has all of them: give it a value, or null")
        elif override.package is not None:
            problems.append(f"'{text}' names a package, but a preset has one place: write {key}=NAME")
        elif key == "cluster":
            problems.append(f"'{text}' is for moetrain plan: a run takes the machines that it is started on")
        elif key == "sweep":
            problems.append(f"'{text}' is for moetrain sweep: write moetrain sweep experiment=NAME")
        elif override.is_sweep_override():
            problems.append(
                f"'{text}' gives several values, but a run has one of each: use moetrain sweep, or, for a list, "
                f"write '{key}=[a,b]'"
            )
        elif is_group and (key in GROUPS or override.is_add()):
            problems += _unknown_presets(override, options=loader.repository.get_group_options(key, ObjectType.CONFIG))
        elif not is_group and not is_setting(key):
            hint = suggest(key, known | set(GROUPS))
            problems.append(f"'{key}' is not a setting{hint or '; see `moetrain config` for those there are'}")
    if problems:
        raise ConfigError(problems)


def _unknown_presets(override: Override, *, options: list[str]) -> Iterator[str]:
    key, value = override.key_or_group, override.value()
    if key in GROUPS and override.is_add():
        yield f"'{override.input_line}' adds a preset where there is one already: write {key}={value}, without the +"
        return
    # several experiments may be laid over one another; a model is one
    for name in value if isinstance(value, list) and key not in ("model", "model/moe", "launch") else [value]:
        if name not in options:
            near = difflib.get_close_matches(str(name), options, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield f"'{override.input_line}' is not there: {key} is one of {', '.join(options) or 'none'}{hint}"


def _refuse_unknown_in_files(sources: dict[str, str]) -> None:
    known, problems = setting_names(), []
    for name, source in sources.items():
        if source != COMMAND_LINE and not is_setting(name):
            hint = suggest(name, known) or "; see `moetrain config` for those there are"
            problems.append(f"{source}: '{name}' is not a setting{hint}")
    if problems:
        raise ConfigError(problems)


def _sources(
    overrides: Sequence[str], *, parsed: Sequence[Override], loader: ConfigLoaderImpl
) -> Iterator[tuple[str, str]]:
    """Walk the files in the order in which Hydra merges them; the last to set a value is its source."""
    defaults = loader.compute_defaults_list(PRIMARY, list(overrides), run_mode=RunMode.RUN).defaults
    for each in defaults:
        if each.config_path is None or each.config_path.startswith("hydra") or each.config_path == "schema":
            continue
        loaded = loader.repository.load_config(each.config_path)
        if loaded is None or not isinstance(loaded.config, DictConfig):
            continue
        content = OmegaConf.to_container(loaded.config, resolve=False)
        assert isinstance(content, dict)
        content.pop("defaults", None)
        package = f"{each.package}." if each.package and each.package != "_global_" else ""
        for name in flatten({str(key): value for key, value in content.items()}):
            yield f"{package}{name}", f"{each.config_path}.yaml"
    for override in parsed:
        if not loader.repository.group_exists(override.key_or_group):
            yield from ((name, COMMAND_LINE) for name in flatten({override.key_or_group: override.value()}))


def _in_a_line(error: Exception) -> str:
    dense = re.match(r"Could not override '(model\.moe\.\w+)'", str(error))
    if dense:
        return (
            f"'{dense[1]}' is set, but the model is dense (model.moe is null): choose model/moe=top2_8e, or leave the "
            "setting out"
        )
    if isinstance(error, UnicodeDecodeError):
        return f"a file of --config-dir is no UTF-8 text: {error}"
    lines = [line.strip() for line in str(error).strip().split("\n\n")[0].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
    where = f"'{error.full_key}': " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
    return where + (" ".join(lines) or f"the settings cannot be composed ({type(error).__name__})")
