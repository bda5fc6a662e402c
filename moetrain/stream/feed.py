"""The rank's side of a stream: the first rank starts the producer and watches it, all read what it makes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.config.schema import RunConfig
from moetrain.parallel.lifeline import PARENT_PID
from moetrain.stream.blocks import Blocks, Fault, open_again
from moetrain.stream.sequences import StreamedSequences

LOG = "stream.log"
"""What the producer writes, in RUN_DIR/log."""

_LAST_CHARACTERS = 2000


@contextmanager
def streamed(run: RunConfig, run_dir: Path, *, is_first: bool) -> Iterator[StreamedSequences | None]:
    """The training sequences of a run that streams its text; None for one that does not.

    Args:
        run: as it was written down: its opening is there.
        run_dir: of the run.
        is_first: whether this rank is the one that starts the producer; it must enter before any rank reads.
    """
    if not run.data.stream:
        yield None
        return
    blocks = open_again(run, run_dir).blocks
    tell = logging.getLogger(__name__).warning if is_first else _nobody
    sequences = StreamedSequences(
        blocks, seed=run.seed, together=run.batch.global_batch, want=blocks.want if is_first else _nobody, say=tell
    )
    if not is_first:
        yield sequences
        return
    blocks.forget_fault()
    with _producer(blocks, run_dir):
        yield sequences


@contextmanager
def _producer(blocks: Blocks, run_dir: Path) -> Iterator[None]:
    """A producer that ends with the block, or with this process; if it ends before, training is told."""
    log = run_dir / "log" / LOG
    log.parent.mkdir(exist_ok=True)
    environment = os.environ | {
        PARENT_PID: str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "moetrain.stream.produce", str(run_dir)],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
        )  # fmt: skip
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process, blocks, log, is_over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        process.kill()
        watcher.join()


def _watch(process: subprocess.Popen[bytes], blocks: Blocks, log: Path, is_over: threading.Event) -> None:
    code = process.wait()
    if code and not is_over.is_set() and blocks.fault() is None:
        killed = code < 0
        how = signal.Signals(-code).name if killed else f"exit code {code}"
        why = " (often out of memory)" if code == -signal.SIGKILL else ""
        if killed:
            message = f"the process that tokenizes the stream ended with {how}{why}; the same command goes on"
        else:
            end = log.read_text(errors="replace")[-_LAST_CHARACTERS:]
            message = f"the process that tokenizes the stream ended with {how}; {log} ends with:\n{end}"
        blocks.write_fault(Fault("lost" if killed else "crash", message))


def _nobody(_: object) -> None:
    """Only the first rank asks and tells."""
