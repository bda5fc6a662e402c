"""The first process of a SLURM job: ``python -m moetrain.launch.cluster.job [--array FILE] [--retries N] -- COMMAND…``.

Runs the command. SLURM sends SIGUSR1 here some minutes before the time limit; it is passed on, and a command that then
ends with 75 (stopped and saved) puts the job back into the queue, where it goes on from its checkpoint. A stop for any
other reason (`moetrain cancel`, scancel) does not. A command that fails is started again in its place, N times.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from moetrain.parallel.lifeline import STOPPED


def main(words: Sequence[str]) -> int:
    """Run the command, and requeue the job where that is wanted; returns the exit code."""
    options, command = list(words[: words.index("--")]), list(words[words.index("--") + 1 :])
    if "--array" in options:
        commands = json.loads(Path(options[options.index("--array") + 1]).read_text(encoding="utf-8"))
        command = commands[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    retries = int(options[options.index("--retries") + 1]) if "--retries" in options else 0
    code, at_limit = _run(command)
    while retries and not at_limit and _is_failure(code):
        print(f"it ended with {code} and is tried again ({retries} left)", flush=True)
        retries -= 1
        code, at_limit = _run(command)
    if code != STOPPED or not at_limit or "--no-requeue" in options:
        return code
    job = job_name(os.environ)
    print(f"the time limit is near and all is saved: job {job} goes back into the queue", flush=True)
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        print(f"it could not be put back: {done.stderr.strip()}; the same command goes on", file=sys.stderr)
        return code
    return 0


def job_name(environment: dict[str, str] | os._Environ[str]) -> str:
    """What scontrol calls this job; one of an array by its own number."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def _is_failure(code: int) -> bool:
    """Whether another try may end better: after an error that was told (2), or a signal; not after a stop that was
    asked for, or on nodes that are not fit (1)."""
    return code == 2 or code > 128


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """The exit code of a command, and whether the time limit was near."""
    asked: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in running:
            process.send_signal(number)

    # SLURM sends SIGTERM to every process of the job when it is cancelled: the command has its own
    old = {number: signal.signal(number, handler) for number, handler in
           ((signal.SIGUSR1, pass_on), (signal.SIGTERM, lambda *_: None))}  # fmt: skip
    try:
        with subprocess.Popen(command) as process:
            running.append(process)
            if asked:
                process.send_signal(signal.SIGUSR1)
            code = process.wait()
            running.clear()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), bool(asked)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
