"""Where a run came from: code, versions, command line, data. One entry for each start, beside ``run.yaml``."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from moetrain.errors import ConfigError

ORIGIN_FILE = "origin.json"
_PACKAGES = ("moetrain", "torch", "deepspeed", "datasets", "tokenizers", "hydra-core", "numpy")


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
