"""What tells runs apart: the settings that make one what it is, and where each start of it came from.

``origin.json``, beside ``run.yaml``, has an entry for each start: code, versions, command line, data.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from moetrain.config.data import DataConfig
from moetrain.config.freeze import flatten, to_dict
from moetrain.config.schema import ModelConfig, RunConfig
from moetrain.errors import ConfigError

ORIGIN_FILE = "origin.json"
_PACKAGES = ("moetrain", "torch", "deepspeed", "datasets", "tokenizers", "hydra-core", "numpy")

# What the weights, their names and the order of the data depend on. The rest (layout, length, learning rate, logging)
# may change between two starts of one run.
_FIXED = ("seed", "init.", "model.", "data.", "prepare.", "batch.global_batch", "batch.sequence_length")
_FREE = ("model.dtype", "data.name", "data.prepared", "prepare.workers", "prepare.fast_encoder")


def differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings whose values differ: dotted name -> (before, now); ``model.moe`` as a whole where one run is dense."""
    old, new = to_dict(before), to_dict(now)
    found: dict[str, tuple[Any, Any]] = {}
    if (before.model.moe is None) != (now.model.moe is None):
        found["model.moe"] = (old["model"].pop("moe"), new["model"].pop("moe"))
    names = [None if each.data.sources is None else list(each.data.sources) for each in (before, now)]
    if names[0] != names[1]:  # their order counts, too
        found["data.sources"] = (names[0], names[1])
    flat_old, flat_new = flatten(old), flatten(new)
    for name in flat_old.keys() & flat_new.keys():
        if flat_old[name] != flat_new[name]:
            found[name] = (flat_old[name], flat_new[name])
    return dict(sorted(found.items()))


def is_fixed(name: str) -> bool:
    """Whether a run must keep the setting from its first start to its end."""
    is_place = name.startswith("data.sources.") and name.endswith(".prepared")
    return name.startswith(_FIXED) and name not in _FREE and not is_place


def unlike(source: RunConfig, run: RunConfig) -> list[str]:
    """Settings by which the weights of one model are none of the other's, a sentence each."""
    theirs, own = _shape(source.model), _shape(run.model)
    return [f"{name} is {_shown(own.get(name))}, but {_shown(theirs.get(name))} in init.weights"
            for name in dict.fromkeys([*own, *theirs]) if own.get(name) != theirs.get(name)]  # fmt: skip


def _shape(model: ModelConfig) -> dict[str, Any]:
    """What the weights are made for, with what follows from the rest filled in; not how they are trained."""
    names = ("vocab_size", "num_layers", "d_model", "num_heads", "norm", "positions",
             "rope_theta", "qk_norm", "bias", "tie_embeddings")  # fmt: skip
    shape = {f"model.{name}": getattr(model, name) for name in names}
    shape["model.num_kv_heads"] = model.num_kv_heads or model.num_heads
    shape["model.d_head"] = model.d_head or model.d_model // model.num_heads
    if model.positions == "learned":
        shape["model.context"] = model.context
    moe = model.moe
    if moe is None or moe.every > 1:
        shape |= {"model.d_ff": model.d_ff, "model.activation": model.activation}
    if moe is None:
        return shape | {"model.moe": None}
    for name in ("num_experts", "top_k", "every", "num_shared_experts", "shared_gate"):
        shape[f"model.moe.{name}"] = getattr(moe, name)
    return shape | {"model.moe.d_expert": moe.d_expert or model.d_ff,
                    "model.moe.activation": moe.activation or model.activation}  # fmt: skip


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def training_digest(run: RunConfig) -> str:
    """Digest of all that decides what a run learns, except its sparse blocks and its layout.

    Two runs of one digest that differ in ``model.moe`` are twins: same tokens, same schedule, same dense parts.
    """
    settings = to_dict(run)
    settings["model"].pop("moe")
    settings["data"] = _what_is_read(settings["data"])
    settings["batch"].pop("micro_batch")
    for name in ("workers", "fast_encoder"):
        settings["prepare"].pop(name)
    kept = {key: settings[key] for key in ("seed", "model", "data", "prepare", "batch", "optim", "schedule")}
    # settings that came later count where they are used
    kept["model"] = {name: value for name, value in kept["model"].items() if name != "qk_norm" or value is not None}
    later = {"router_lr_ratio": 1.0, "experts_lr_ratio": 1.0, "freeze": []}
    kept["optim"] = {name: value for name, value in kept["optim"].items()
                     if name not in later or value != later[name]}  # fmt: skip
    if run.init.weights is not None:
        kept["init"] = settings["init"]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def write_origin(directory: Path, *, command: Sequence[str], data: dict[str, Any]) -> None:
    """Append this start to the history of the run.

    Args:
        command: the command line.
        data: what the tokens were made of.

    Raises:
        ConfigError: the history there is cannot be read.
    """
    path = directory / ORIGIN_FILE
    try:
        starts = list(json.loads(path.read_text())["starts"]) if path.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{path} is no history of starts ({error}): move it away, and a new one begins"]) from None
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": list(command),
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _PACKAGES},
            "code": _code(),
            "data": data,
        }
    )
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps({"starts": starts}, indent=1))
    os.replace(partial, path)


def _what_is_read(data: dict[str, Any]) -> dict[str, Any]:
    """The settings of the data without names and places; those that came later count where they are used."""
    defaults = asdict(DataConfig())
    always = ("text", "text_column", "held_out", "tokenizer")
    kept = {key: value for key, value in data.items() if key in always or value != defaults[key]}
    kept = {key: value for key, value in kept.items() if key not in ("name", "prepared")}
    if "sources" in kept:
        # a list: their order counts, too
        kept["sources"] = [[name, source | {"prepared": None}] for name, source in kept["sources"].items()]
    return kept


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code() -> dict[str, str] | None:
    """The commit of the checkout, and a digest of what was changed in it; None outside a checkout."""
    package = Path(__file__).resolve().parent.parent
    # an installation may lie in a checkout of something else: whose commit it is shows only what git tracks
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    changed = _git(package, "diff", "HEAD", "--", ".") or ""
    return {
        "commit": commit.strip(),
        "uncommitted_sha256": hashlib.sha256(changed.encode()).hexdigest() if changed else "",
    }


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    # a diff may hold bytes of any encoding
    return done.stdout.decode(errors="backslashreplace")
