"""How long a step waits for its batch: reads from token files that are there, and from a simulated trillion tokens.

    python scripts/loader_speed.py [DIRECTORY]

DIRECTORY is where the token files are made (default: a temporary one). There is no worker process and no state, so a
step's wait is one call, and so is a seek to any step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.data.loader import Ahead, Batches, Sequences
from moetrain.data.middle import FillInMiddle
from moetrain.data.mixture import Mixture, Stage
from moetrain.data.packing import Packing

WEIGHTS = (0.45, 0.2, 0.12, 0.1, 0.06, 0.04, 0.02, 0.01)
FILE_TOKENS = 200_000_000
REPEATS = 31


class Trillion:
    """As many tokens as no disk here holds: each tells its place."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, where: slice) -> Any:
        return np.arange(where.start, where.stop, dtype=np.int64)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        path = place / "tokens.bin"
        np.random.default_rng(0).integers(0, 50_000, size=FILE_TOKENS, dtype=np.uint16).tofile(path)
        tokens: Any = np.memmap(path, dtype=np.uint16, mode="r")
        packing = Packing(end_of_text=0, mask_documents=True, reset_positions=True)
        middle = FillInMiddle(rate=0.5, spm=0.5, prefix=1, middle=2, suffix=3, end_of_text=0, seed=1)
        print(f"{'what one rank reads at a step':<62} {'median':>9} {'slowest':>9}")
        for length, batch, ranks in ((256, 16, 1), (2048, 512, 8), (8192, 1024, 64)):
            shape = f"{batch // ranks} of {batch} x {length} tokens"
            one = make(tokens, sources=1, length=length, batch=batch)
            row(f"{shape}, one source", one, ranks=ranks, batch=batch)
            row(f"{shape}, 8 sources, two stages", make(tokens, length=length, batch=batch), ranks=ranks, batch=batch)
            row(f"{shape}, the same, masks and positions", make(tokens, length=length, batch=batch), ranks=ranks,
                batch=batch, then=lambda rows: (packing.documents(rows), packing.positions(rows)))  # fmt: skip
            filled = make(tokens, length=length, batch=batch, rearrange=middle)
            row(f"{shape}, the same, fill in the middle", filled, ranks=ranks, batch=batch)
        huge = make(Trillion(), length=2048, batch=512)
        row("64 of 512 x 2048 tokens, 8 sources of 10^12 tokens each", huge, ranks=8, batch=512)
        print("\nwait of a step of 200 ms that reads ahead")
        ahead = Ahead(lambda step: huge.rank_slice(step, rank=0, world_size=8, micro_batch=64), steps=REPEATS)
        waits = []
        for step in range(REPEATS):
            begun = time.perf_counter()
            ahead(step)
            waits.append(time.perf_counter() - begun)
            time.sleep(0.2)
        print(f"{'64 of 512 x 2048 tokens, 8 sources of 10^12 each':<62} {statistics.median(waits) * 1e3:>6.2f} ms")
        tracemalloc.start()
        for step in range(20):
            huge.rank_slice(step * 10**6, rank=0, world_size=8, micro_batch=64)
        print(f"peak memory of 20 such reads: {tracemalloc.get_traced_memory()[1] / 2**20:.1f} MiB")


def make(tokens: Any, *, length: int, batch: int, sources: int = 8, rearrange: Any = None) -> Batches:
    """Batches of so many sources, all of the same tokens in orders of their own."""
    weights = WEIGHTS[:sources]
    every = [Sequences(tokens, sequence_length=length, seed=seed) for seed in range(sources)]
    stages = [Stage(10**9, weights), Stage(None, tuple(reversed(weights)))]
    return Batches(every, global_batch=batch, mixture=Mixture(stages, most=[None] * sources), rearrange=rearrange)


def row(what: str, batches: Batches, *, ranks: int, batch: int, then: Callable[[Any], Any] = lambda rows: None) -> None:
    """Each read is a seek: steps drawn at random over a long run."""
    seconds = []
    for step in np.random.default_rng(1).integers(0, 10**7, size=REPEATS).tolist():
        begun = time.perf_counter()
        then(batches.rank_slice(step, rank=0, world_size=ranks, micro_batch=batch // ranks).tokens[..., :-1])
        seconds.append(time.perf_counter() - begun)
    print(f"{what:<62} {statistics.median(seconds) * 1e3:>6.2f} ms {max(seconds) * 1e3:>6.2f} ms")


if __name__ == "__main__":
    main()
