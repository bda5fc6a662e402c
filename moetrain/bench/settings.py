"""What a benchmark measures: its settings, read from key=value words, and who takes part."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moetrain.config.freeze import suggest
from moetrain.errors import ConfigError

DTYPES = ("fp32", "bf16")
ROUTINGS = ("balanced", "skewed")
DEVICES = ("auto", "cpu", "cuda")
YARDSTICK = "dense"
"""Every time is told as a multiple of its."""

PACKAGES = {
    "transformers": "pip install 'transformers>=5,<6'",
    "deepspeed": "pip install 'deepspeed>=0.19.8,<0.20'",
}
"""What peers need, and how to install it."""

_PEERS = {
    "transformers_grouped": "transformers",
    "transformers_eager": "transformers",
    "deepspeed_capacity": "deepspeed",
    "deepspeed_no_drop": "deepspeed",
}
LAYER_CONTESTANTS: dict[str, str | None] = {YARDSTICK: None, "floor": None, "moetrain": None, **_PEERS}
"""Contestants of ``bench layer`` -> the package they need beyond our own."""
STEP_CONTESTANTS: dict[str, str | None] = {YARDSTICK: None, "moetrain": None, "moetrain_unobserved": None, **_PEERS}
"""Contestants of ``bench step`` -> the package they need beyond our own."""

_LARGEST = 1 << 34


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """One MoE layer, forward and backward."""

    tokens: int = 4096
    """Tokens in the batch."""
    d_model: int = 256
    """Width of the residual stream; at least the number of experts."""
    d_ff: int = 1024
    """Hidden units active per token: those of the dense block; an expert has d_ff / top_k."""
    experts: tuple[int, ...] = (8, 64)
    """Experts in the layer."""
    top_k: tuple[int, ...] = (2, 8)
    """Experts per token; every pair with experts above top_k is measured."""
    routing: tuple[str, ...] = ROUTINGS
    """balanced: every expert gets as many copies; skewed: one gets half of them, or as many as a router can give it."""
    dtype: tuple[str, ...] = DTYPES
    """Of weights and activations."""
    contestants: tuple[str, ...] = tuple(LAYER_CONTESTANTS)
    """Who takes part; dense always does."""
    repeats: int = 5
    """Timed turns, after two to warm up."""
    device: str = "auto"
    """cpu or cuda; auto: cuda where there is one."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """A whole training step of a small GPT: forward, backward, fused AdamW."""

    d_model: int = 256
    """Width of the residual stream."""
    d_ff: int = 1024
    """Hidden units active per token and block: those of a dense block; an expert has d_ff / top_k."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    vocab: int = 4096
    """Rows of the embedding."""
    sequence: int = 256
    """Tokens in a sequence."""
    batch: int = 8
    """Sequences in a step."""
    experts: tuple[int, ...] = (8, 64)
    """Experts in each block."""
    top_k: tuple[int, ...] = (2,)
    """Experts per token; every pair with experts above top_k is measured."""
    dtype: tuple[str, ...] = DTYPES
    """fp32, or bf16 with fp32 master weights."""
    contestants: tuple[str, ...] = tuple(STEP_CONTESTANTS)
    """Who takes part; dense always does."""
    repeats: int = 5
    """Timed turns, after two to warm up."""
    device: str = "auto"
    """cpu or cuda; auto: cuda where there is one."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What saving and loading cost."""

    parameters: int = 50_000_000
    """Of the model, about; a checkpoint has twelve bytes for each."""
    repeats: int = 5
    """Turns of each contestant; one before them, which takes memory, is not timed."""
    directory: str = ""
    """On the disk to be measured. Empty: a temporary one."""


AnySettings = LayerSettings | StepSettings | CheckpointSettings
Settings = TypeVar("Settings", LayerSettings, StepSettings, CheckpointSettings)


def read(kind: type[Settings], words: Sequence[str]) -> Settings:
    """Settings from ``key=value`` words; a value may be a list, ``a,b`` or ``[a,b]``, where the setting is one.

    Raises:
        ConfigError: every word that is no setting, has the wrong type or breaks a rule.
    """
    fields = {each.name: each for each in dataclasses.fields(kind)}
    problems: list[str] = []
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            problems.append(f"'{word}' is not a setting: write key=value, e.g. dtype=bf16")
        elif key not in fields:
            way_out = suggest(key, set(fields)) or f": use {', '.join(fields)}"
            problems.append(f"'{key}' is not a setting{way_out}")
        else:
            given[key] = _value(key, text, default=fields[key].default, problems=problems)
    if problems:
        raise ConfigError(problems)
    settings = kind(**given)
    problems = _broken_rules(settings)
    if problems:
        raise ConfigError(problems)
    return settings


def shapes(settings: LayerSettings | StepSettings) -> list[tuple[int, int]]:
    """The (experts, top_k) that are measured: the pairs that are sparse."""
    return [(experts, top_k) for experts in settings.experts for top_k in settings.top_k if top_k < experts]


def plan_text(settings: AnySettings) -> str:
    """What would be timed."""
    if isinstance(settings, CheckpointSettings):
        size = 12 * settings.parameters / 1e9
        where = settings.directory or "a temporary directory"
        return f"would save and load {size:,.2f} GB, {settings.repeats} turns, in {where}"
    known = LAYER_CONTESTANTS if isinstance(settings, LayerSettings) else STEP_CONTESTANTS
    pairs = ", ".join(f"{experts} top-{top_k}" for experts, top_k in shapes(settings))
    routing = f", {' and '.join(settings.routing)} routing" if isinstance(settings, LayerSettings) else ""
    lines = [
        f"would time {', '.join(taking_part(settings, known))}",
        f"  experts {pairs}; {' and '.join(settings.dtype)}{routing}; {settings.repeats} turns, after two to warm up",
    ]
    lines += [f"  {name} is not installed, and its rows are left out: {how}" for name, how in missing(settings).items()]
    return "\n".join(lines)


def taking_part(settings: LayerSettings | StepSettings, known: dict[str, str | None]) -> list[str]:
    """Who of the ``known`` takes part and is installed, the yardstick first."""
    gone = missing(settings)
    wanted = {YARDSTICK, *settings.contestants}
    return [name for name, package in known.items() if name in wanted and package not in gone]


def missing(settings: LayerSettings | StepSettings) -> dict[str, str]:
    """Packages that wanted contestants need and that are not installed -> how to install them."""
    needs = LAYER_CONTESTANTS | STEP_CONTESTANTS
    wanted = {needs[name] for name in settings.contestants}
    return {name: how for name, how in PACKAGES.items() if name in wanted and importlib.util.find_spec(name) is None}


def _value(key: str, text: str, *, default: Any, problems: list[str]) -> Any:
    if not isinstance(default, tuple):
        return _item(key, text, like=default, problems=problems)
    items = [each.strip() for each in text.strip().removeprefix("[").removesuffix("]").split(",")]
    return tuple(_item(key, each, like=default[0], problems=problems) for each in dict.fromkeys(items))


def _item(key: str, text: str, *, like: Any, problems: list[str]) -> Any:
    if isinstance(like, str):
        return text
    try:
        return int(text)
    except ValueError:
        problems.append(f"'{key}' is '{text}', but must be a whole number")
        return like


def _broken_rules(settings: AnySettings) -> list[str]:
    is_layer = isinstance(settings, LayerSettings)
    choices = {
        "dtype": DTYPES,
        "routing": ROUTINGS,
        "device": DEVICES,
        "contestants": tuple(LAYER_CONTESTANTS if is_layer else STEP_CONTESTANTS),
    }
    problems = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if field.name in choices and item not in choices[field.name]:
                problems.append(f"{field.name} is '{item}', but must be one of {', '.join(choices[field.name])}")
            elif isinstance(item, int) and not 1 <= item <= _LARGEST:
                problems.append(f"{field.name} is {item}, but must be from 1 to {_LARGEST:,}")
    if isinstance(settings, CheckpointSettings):
        if settings.directory and not Path(settings.directory).is_dir():
            problems.append(f"directory is '{settings.directory}', but must be a directory that is there")
        return problems
    return problems or _broken_shapes(settings)


def _broken_shapes(settings: LayerSettings | StepSettings) -> list[str]:
    problems = []
    pairs = shapes(settings)
    if not pairs:
        problems.append(
            f"experts is {_listed(settings.experts)} and top_k {_listed(settings.top_k)}, but one pair at least must "
            "have more experts than it takes for a token: raise experts or lower top_k"
        )
    for top_k in sorted({top_k for _, top_k in pairs}):
        if settings.d_ff % top_k:
            problems.append(f"d_ff is {settings.d_ff}, but must be a multiple of top_k, {top_k}")
    if isinstance(settings, LayerSettings):
        largest = max((experts for experts, _ in pairs), default=0)
        if settings.d_model < largest:
            # the inputs carry the router's scores in their first channels (``layer.make_inputs``)
            problems.append(f"d_model is {settings.d_model}, but must be at least the number of experts, {largest}")
    elif settings.d_model % (2 * settings.heads):
        problems.append(
            f"d_model is {settings.d_model}, but must be a multiple of 2 x heads, {2 * settings.heads}: "
            "rotary positions turn pairs of channels"
        )
    return problems


def _listed(items: tuple[int, ...]) -> str:
    return ",".join(map(str, items))
