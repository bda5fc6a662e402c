"""Plain dict <-> RunConfig. Every unknown key and wrong type is told, at once, with the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import yaml

from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

RUN_FILE = "run.yaml"
Section = typing.TypeVar("Section")


def config_directory() -> Path:
    """The directory of the presets: in a checkout beside the package, in an installation inside it."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def freeze(settings: dict[str, Any]) -> RunConfig:
    """Turn a composed dict into the settings of a run.

    Raises:
        ConfigError: unknown keys, missing sections or values of the wrong type; all of them.
    """
    return freeze_section(RunConfig, settings)


def freeze_section(section: type[Section], settings: dict[str, Any]) -> Section:
    """The same for the settings of one verb or section, a dataclass.

    Raises:
        ConfigError: as ``freeze``.
    """
    problems: list[str] = []
    built = _build(section, settings, "", problems)
    if problems:
        raise ConfigError(problems)
    return typing.cast(Section, built)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The settings as nested plain dicts."""
    return dataclasses.asdict(run)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to ``{"model.moe.top_k": 2, …}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@functools.cache
def setting_names() -> frozenset[str]:
    """Every section and setting there is, dotted."""
    return frozenset(_names(RunConfig, ""))


def is_setting(name: str) -> bool:
    """Whether there is such a section or setting; names that a user gives, as of sources, are as good as any."""
    return name in setting_names() or name.startswith(_beginnings_of_users_names())


def suggest(name: str, known: Set[str]) -> str:
    """'; did you mean …' for the nearest known name, or nothing."""
    own, last = _last_part(name), {each: _last_part(each) for each in sorted(known)}
    # a name right but for its section is the commonest slip, then one cut short (experts for num_experts)
    same = [each for each in last if last[each] == own]
    alike = [each for each in last if min(len(own), len(last[each])) > 3 and (own in last[each] or last[each] in own)]
    near = (
        difflib.get_close_matches(name, same or alike, n=1, cutoff=0)
        or difflib.get_close_matches(name, list(last), n=1, cutoff=0.6)
        or [each for each in last if last[each] in difflib.get_close_matches(own, last.values(), n=1, cutoff=0.7)]
    )
    return f"; did you mean '{near[0]}'?" if near else ""


def write_run(run: RunConfig, directory: Path) -> None:
    """Write ``run.yaml`` in one step: a reader sees the old file or the new one, never half of one."""
    path = directory / RUN_FILE
    partial = path.with_suffix(".yaml.partial")
    partial.write_text(yaml.safe_dump(to_dict(run), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)


def read_run(directory: Path) -> RunConfig:
    """The settings of the run in ``directory``.

    Raises:
        ConfigError: no run there, or its file does not fit this version.
    """
    path = directory / RUN_FILE
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError([f"{path} does not exist: name the directory of a run, e.g. run_dir=runs/tiny"]) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"{path} holds no settings: name another run_dir"])
    try:
        return freeze(settings)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    """Cached, for it compiles the text of each annotation anew."""
    return typing.get_type_hints(section)


def _last_part(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _names(section: type, prefix: str) -> Iterator[str]:
    hints = _hints(section)
    for each in dataclasses.fields(section):
        yield prefix + each.name
        nested = _section_of(hints[each.name])
        if nested is not None:
            yield from _names(nested, f"{prefix}{each.name}.")


@functools.cache
def _beginnings_of_users_names() -> tuple[str, ...]:
    return tuple(f"{each}." for each in _named_by_users(RunConfig, ""))


def _named_by_users(section: type, prefix: str) -> Iterator[str]:
    hints = _hints(section)
    for each in dataclasses.fields(section):
        nested = _section_of(hints[each.name])
        if nested is not None:
            yield from _named_by_users(nested, f"{prefix}{each.name}.")
        elif any(typing.get_origin(option) is dict for option in _options(hints[each.name])):
            yield prefix + each.name


def _section_of(hint: Any) -> type | None:
    for option in _options(hint):
        if dataclasses.is_dataclass(option):
            return typing.cast(type, option)
    return None


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _build(section: type, settings: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(settings, dict):
        problems.append(f"'{prefix.rstrip('.')}' is {_shown(settings)}, but must be a section of settings")
        return None
    hints = _hints(section)
    known = [each.name for each in dataclasses.fields(section)]
    in_run = section is RunConfig or bool(prefix)
    way_out = "; see `moetrain config` for those there are" if in_run else f": use {', '.join(known)}"
    for key in settings:
        if key not in known:
            names: Set[str] = setting_names() if in_run else set(known)
            if in_run and f"{prefix}{known[0]}" not in names:
                names = {f"{prefix}{each}" for each in known}  # a section that the user named
            hint = suggest(f"{prefix}{key}", names)
            problems.append(f"'{prefix}{key}' is not a setting{hint or way_out}")
    values = {
        name: _value(hints[name], settings[name], f"{prefix}{name}", problems) for name in known if name in settings
    }
    return section(**values)


def _value(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    nested = _section_of(hint)
    if nested is not None:
        return _build(nested, value, f"{name}.", problems)
    kind = next(each for each in options if each is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        inner = typing.get_args(kind)[1]
        return {str(key): _value(inner, each, f"{name}.{key}", problems) for key, each in value.items()}
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        if inner is not str and isinstance(value, list):
            return [_value(inner, each, f"{name}[{number}]", problems) for number, each in enumerate(value)]
        if inner is str and isinstance(value, str):
            return [value]
        if inner is str and isinstance(value, list) and all(isinstance(each, str) for each in value):
            return list(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = _in_words(kind)
    or_null = " or null" if type(None) in options else ""
    # the command line reads name=2024 as a number
    is_bare = kind is str and isinstance(value, (bool, int, float))
    as_text = f": on the command line, '{name}=\"{_shown(value)}\"' is text" if is_bare else ""
    problems.append(f"'{name}' is {_shown(value)}, but must be {wanted}{or_null}{as_text}")
    return value


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is dict:
        return "a section of settings"
    if typing.get_origin(kind) is list and typing.get_args(kind)[0] is not str:
        return "a list of sections of settings"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a list of texts")


def _shown(value: Any) -> str:
    """A value as a user writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
