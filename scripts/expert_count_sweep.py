"""The sweep over expert counts, killed in the middle and taken up again; then its report.

    python scripts/expert_count_sweep.py [--after 12] [key=value …]

SIGKILL goes to the sweep and to the run that is at work, as a machine that fails would. Half an hour on one free core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moetrain.errors import MoetrainError
from moetrain.sweep.state import DONE, RUNNING, Sweep

COMMAND = [sys.executable, "-m", "moetrain.cli"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=int, default=12, help="runs that are done when it is killed")
    parser.add_argument("words", nargs="*", help="for moetrain sweep, besides experiment=expert_count")
    given = parser.parse_args()
    named = dict(word.partition("=")[::2] for word in given.words)
    directory = Path(named.get("sweep_dir") or f"sweeps/{named.get('name', 'expert_count')}")
    command = [*COMMAND, "sweep", "experiment=expert_count", *given.words]
    with subprocess.Popen(command) as first:
        while first.poll() is None and done(directory) < given.after:
            time.sleep(0.5)
        first.kill()
    for launcher in at_work(directory):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher, signal.SIGKILL)
    print(f"killed with {done(directory)} runs done; the same command again:", flush=True)
    code = subprocess.run(command).returncode
    return code or subprocess.run([*COMMAND, "report", str(directory)]).returncode


def done(directory: Path) -> int:
    """Finished runs."""
    try:
        return sum(run.status == DONE for run in Sweep.read(directory).runs)
    except MoetrainError:
        return 0


def at_work(directory: Path) -> list[int]:
    """Process groups of the runs that a killed sweep left."""
    sweep = Sweep.read(directory)
    locks = [sweep.run_dir(run) / "lock" for run in sweep.runs if run.status == RUNNING]
    return [int(lock.read_text().split()[0]) for lock in locks if lock.is_file() and lock.read_text()]


if __name__ == "__main__":
    sys.exit(main())
