"""The verbs on runs that are there: status, logs, cancel."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.launch.runs import Status

HELP = {
    "status": """usage: moetrain status [RUN_DIR|NAME|DIRECTORY …]

Lists the runs in runs/, or those that are named, the newest first: state (running, queued, finished, stopped, failed,
new), step, tokens per second, the newest whole checkpoint, and the first line of what went wrong. For runs of any
launcher; those in SLURM's queue are looked up there.

examples:
  moetrain status
  moetrain status tiny
""",
    "logs": """usage: moetrain logs RUN_DIR|NAME [--rank=N] [--lines=N] [--follow]

Prints the end of what a run, or one of its ranks, has printed.

  --rank=N      that rank's log; without it, what the run prints where nobody watches it, else rank 0's log
  --lines=N     how many lines (40)
  --follow      go on with what comes, until Ctrl-C

examples:
  moetrain logs tiny
  moetrain logs runs/tiny --rank=1 --lines=100
""",
    "cancel": """usage: moetrain cancel RUN_DIR|NAME [--now]

Asks a run of any launcher to save and stop; the same `moetrain train …` goes on later. A job that waits in SLURM's
queue is taken out of it. The run meets it within about a second; where run_dir is on a network file system, within a
minute.

  --now         end it without saving

examples:
  moetrain cancel tiny
  moetrain cancel runs/tiny --now
""",
}


def status(words: Sequence[str]) -> int:
    """The verb `status`."""
    from moetrain.launch.runs import find_runs, named
    from moetrain.launch.runs import status as status_of

    _refuse_options(words)
    found: list[Path] = []
    for word in words or ["runs"]:
        found += (find_runs(Path(word)) if Path(word).is_dir() else []) or ([named(word)] if words else [])
    if not found:
        print("there is no run in runs/: moetrain train starts one")
        return 0
    print(_table([status_of(run_dir) for run_dir in found]))
    return 0


def logs(words: Sequence[str]) -> int:
    """The verb `logs`."""
    from moetrain.launch.runs import log_file, named

    run, options = _one_run(words, numbers=("--rank", "--lines"), flags=("--follow",))
    rank = options.get("--rank")
    path = log_file(named(run), rank=None if rank is None else int(rank))
    text = path.read_text(encoding="utf-8", errors="replace")
    print("\n".join(text.splitlines()[-int(options.get("--lines", "40")) :]), flush=True)
    if "--follow" in options:
        _follow(path, place=len(text.encode()))
    return 0


def cancel(words: Sequence[str]) -> int:
    """The verb `cancel`."""
    from moetrain.launch.runs import cancel as cancel_run
    from moetrain.launch.runs import named

    run, options = _one_run(words, numbers=(), flags=("--now",))
    print(cancel_run(named(run), now="--now" in options))
    return 0


def _table(runs: Sequence[Status]) -> str:
    rows = [("run", "launch", "state", "step", "tokens/s", "checkpoint", "")]
    for run in runs:
        rows.append(
            (
                str(run.run_dir),
                run.kind,
                run.state,
                f"{run.step:,}/{run.steps:,}",
                "-" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
                "-" if run.checkpoint is None else f"{run.checkpoint:,}",
                run.note,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _one_run(words: Sequence[str], *, numbers: Sequence[str], flags: Sequence[str]) -> tuple[str, dict[str, str]]:
    runs, options, problems = [], {}, []
    for word in words:
        name, _, value = word.partition("=")
        if word in flags:
            options[word] = ""
        elif name in numbers:
            options[name] = value
            if not (value.isascii() and value.isdecimal()):
                problems.append(f"{name} is '{value}', but must be a whole number from 0: write {name}=N")
        elif word.startswith("-"):
            problems.append(f"{word} is not an option: see --help")
        else:
            runs.append(word)
    if len(runs) != 1:
        problems.append(f"{len(runs)} runs are named, but it must be one: a run directory, or its name in runs/")
    if problems:
        raise ConfigError(problems)
    return runs[0], options


def _refuse_options(words: Sequence[str]) -> None:
    wrong = [word for word in words if word.startswith("-")]
    if wrong:
        raise ConfigError([f"{word} is not an option: see --help" for word in wrong])


def _follow(path: Path, *, place: int) -> None:
    try:
        with path.open("rb") as file:
            file.seek(place)
            while True:
                sys.stdout.write(file.read().decode(errors="replace"))
                sys.stdout.flush()
                time.sleep(0.5)
    except KeyboardInterrupt:
        return
