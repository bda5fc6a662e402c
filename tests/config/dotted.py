"""Settings as a test gives them: by dotted name."""

from __future__ import annotations

from typing import Any

from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze
from moetrain.config.schema import RunConfig

DENSE = {"model.moe": None}


def resolved(settings: dict[str, Any], *, default_processes: int = 2) -> RunConfig:
    """Settings by dotted name, frozen and resolved."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return resolve(freeze(nested), default_processes=default_processes)
