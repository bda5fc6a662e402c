"""The run of a SLURM job, on its first node: ``python -m moetrain.cli.running.job RUN_DIR [MODULE]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moetrain.checkpoint.store import step_of, whole_checkpoints
from moetrain.cli.running.train import keep_running
from moetrain.config.freeze import read_run
from moetrain.errors import MoetrainError, NoGoError
from moetrain.launch.cluster.slurm import remember
from moetrain.launch.lock import RunLock
from moetrain.launch.machine.ranks import Order
from moetrain.launch.nodes.spec import requested
from moetrain.launch.start import start
from moetrain.parallel.lifeline import STOPPED

_ENDED = 1  # for good: what ends with 2 is tried again where there are retries (launch.cluster.job)


def main(words: Sequence[str]) -> int:
    """Run preflight, then the run, from where it is; a module that is named, only that. Returns the exit code."""
    run_dir = Path(words[0])
    try:
        if len(words) > 1:  # whoever waits for it holds the lock
            start(run_dir, read_run(run_dir).launch, module=words[1], in_job=True)
            return 0
        with RunLock(run_dir):
            return _run(run_dir)
    except MoetrainError as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return _ENDED if isinstance(error, NoGoError) else 2


def _run(run_dir: Path) -> int:
    remember(run_dir, os.environ["SLURM_JOB_ID"])
    before = _newest(run_dir)
    if not keep_running(read_run(run_dir), run_dir, in_job=True):
        return 0
    if requested(run_dir) is not Order.GO_ON:
        print("stopped by moetrain cancel: the job does not go back into the queue", flush=True)
        return _ENDED
    if _newest(run_dir) == before:
        print("moetrain: nothing was saved since the job began: the time limit (launch.slurm.time) is too short for "
              "the start, a step and a save, or launch.slurm.save_seconds is", file=sys.stderr)  # fmt: skip
        return 2
    return STOPPED


def _newest(run_dir: Path) -> int:
    return max((step_of(path) for path in whole_checkpoints(run_dir / "checkpoints")), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
