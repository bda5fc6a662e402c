"""Whether two settings describe the same run, so that one may go on from the other's checkpoint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from moetrain.config.freeze import flatten, to_dict
from moetrain.config.schema import RunConfig

# What the weights, their names and the order of the data depend on. The rest (layout, length, learning rate, logging)
# may change between two starts of one run.
_FIXED = ("seed", "model.", "data.", "prepare.", "batch.global_batch", "batch.sequence_length")
_FREE = ("model.dtype", "data.name", "data.prepared", "prepare.workers", "prepare.fast_encoder")


def differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ: dotted name -> (before, now); ``model.moe`` as a whole where one run is dense."""
    old, new = to_dict(before), to_dict(now)
    found: dict[str, tuple[Any, Any]] = {}
    if (before.model.moe is None) != (now.model.moe is None):
        found["model.moe"] = (old["model"].pop("moe"), new["model"].pop("moe"))
    flat_old, flat_new = flatten(old), flatten(new)
    found |= {name: (flat_old[name], flat_new[name]) for name in flat_old if flat_old[name] != flat_new[name]}
    return dict(sorted(found.items()))


def is_fixed(name: str) -> bool:
    """Whether a run must keep the setting from its first start to its end."""
    return name.startswith(_FIXED) and name not in _FREE


def training_digest(run: RunConfig) -> str:
    """Digest of all that decides what a run learns, except its sparse blocks and its layout.

    Two runs of one digest that differ in ``model.moe`` are twins: same tokens, same schedule, same dense parts.
    """
    settings = to_dict(run)
    settings["model"].pop("moe")
    settings["data"] = {key: settings["data"][key] for key in ("text", "text_column", "held_out", "tokenizer")}
    settings["batch"].pop("micro_batch")
    kept = {key: settings[key] for key in ("seed", "model", "data", "batch", "optim", "schedule")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
