"""Command line to settings: Hydra composes ``configs/`` here, once, on one process. The only import of Hydra."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moetrain.config.freeze import flatten, setting_names, suggest
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

PRIMARY = "run"
COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Composed:
    """Settings as plain dicts, and where each came from."""

    settings: dict[str, Any]
    sources: dict[str, str]
    """Dotted name -> the file or ``command line`` that set it; not there: the default."""
    choices: dict[str, str]
    """Config group -> the file chosen in it, e.g. ``model/moe`` -> ``none``."""


def config_directory() -> Path:
    """The directory of the presets: in a checkout beside the package, in an installation inside it."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def presets(group: str) -> dict[str, str]:
    """The files of a config group and the first line of each, e.g. of ``model``."""
    return {
        path.stem: path.read_text().splitlines()[0].lstrip("# ")
        for path in sorted((config_directory() / group).glob("*.yaml"))
    }


def compose(overrides: Sequence[str], *, config_dir: Path | None = None) -> Composed:
    """Compose the settings of a run.

    Args:
        overrides: Hydra's: ``model=mixtral_8x7b``, ``model/moe=none``, ``optim.lr=3e-4``, …
        config_dir: a directory of the user's own, laid out like ``configs/``.

    Raises:
        ConfigError: what Hydra or the file of a preset would not take; all unknown settings at once.
    """
    defaults = dataclasses.asdict(RunConfig())
    ConfigStore.instance().store(name="schema", node=defaults)
    own = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            _refuse_unknown(_parse(overrides), config_dir=config_dir)
            composed = hydra_compose(PRIMARY, overrides=[*own, *overrides], return_hydra_config=True)
            choices = {k: v for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra")}
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            settings = OmegaConf.to_container(composed, resolve=True)
            sources = dict(_sources([*own, *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_first_paragraph(error)]) from None
    assert isinstance(settings, dict)
    return Composed(settings={str(key): value for key, value in settings.items()}, sources=sources, choices=choices)


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed, problems = [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            problems.append(
                f"'{text}' is not an override: write key=value; quote values with spaces, commas or brackets, "
                "e.g. 'name=\"a, b\"'"
            )
    if problems:
        raise ConfigError(problems)
    return parsed


def _refuse_unknown(overrides: Sequence[Override], *, config_dir: Path | None) -> None:
    known, problems = setting_names(), []
    loader = GlobalHydra.instance().config_loader()
    groups = {"model", "model/moe", "launch", "experiment"}
    for override in overrides:
        key = override.key_or_group
        if key in groups and isinstance(override.value(), str):
            roots = [config_directory(), *([config_dir] if config_dir else [])]
            options = sorted({path.stem for root in roots for path in (root / key).glob("*.yaml")})
            if override.value() not in options:
                near = difflib.get_close_matches(str(override.value()), options, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                problems.append(
                    f"{key}={override.value()} is not there: {key} is one of {', '.join(options) or 'none'}{hint}"
                )
        elif key.startswith("hydra.") or loader.repository.group_exists(key):
            continue
        elif key not in known:
            hint = suggest(key, known | groups)
            problems.append(f"'{key}' is not a setting{hint or '; see `moetrain config` for those there are'}")
        elif override.is_sweep_override():
            problems.append(f"'{key}' has several values, but a run has one of each")
    if problems:
        raise ConfigError(problems)


def _sources(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Walk the files in the order in which Hydra merges them; the last to set a value is its source."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
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
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        yield override.key_or_group, COMMAND_LINE


def _first_paragraph(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().split("\n\n")[0].splitlines()]
    lines = [line for line in lines if line and not line.startswith(("full_key", "object_type", "reference_type"))]
    message = " ".join(lines)
    if "Could not override" in message and ".moe." in message:
        message += "; the model is dense (model.moe is null): choose model/moe=top2_8e or drop the override"
    return message
