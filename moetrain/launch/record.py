"""RUN_DIR/launch/state.json: how a run went the last time, for those who did not watch.

{"state": "running" | "finished" | "stopped" | "failed", "message": "…", "time": 1700000000.0, "final": false}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moetrain.errors import NoGoError
from moetrain.launch.local import Outcome

_FILE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a start has left."""

    state: str
    message: str
    time: float
    final: bool = False
    """Whether another start would end in the same way."""


@contextmanager
def recorded(run_dir: Path) -> Iterator[Callable[[Outcome], Outcome]]:
    """Write down that a run runs, and how it ends; give its outcome to what is yielded, which returns it."""

    def record(outcome: Outcome) -> Outcome:
        _write(run_dir, "stopped" if outcome.stopped else "finished")
        return outcome

    _write(run_dir, "running")
    try:
        yield record
    except BaseException as error:
        _write(run_dir, "failed", str(error), final=isinstance(error, NoGoError))
        raise


def read_record(run_dir: Path) -> Record | None:
    """What the last start has left; None: nothing, or nothing that can be read."""
    try:
        return Record(**json.loads((run_dir / "launch" / _FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def forget(run_dir: Path) -> None:
    """Let the next start leave its own, or nothing if it never comes to that."""
    (run_dir / "launch" / _FILE).unlink(missing_ok=True)


def _write(run_dir: Path, state: str, message: str = "", *, final: bool = False) -> None:
    path = run_dir / "launch" / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = {"state": state, "message": message, "time": time.time(), "final": final}
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)
