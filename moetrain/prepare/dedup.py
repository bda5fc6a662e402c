"""Duplicates left out: a mark for each document of the spool, in ``dropped.npy``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moetrain.parallel.pool import Task, run_tasks
from moetrain.prepare.encoding import SMALL
from moetrain.prepare.shards import DIGESTS, DROPPED, SPOOL, digest_shard
from moetrain.sources.duplicates import PERMUTATIONS, exact_duplicates, near_duplicates, require_rensa
from moetrain.sources.spool import Shard, read_json, rows_of, write_json

_COUNTS = "dropped.json"


def mark_duplicates(
    work: Path,
    shards: list[Shard],
    *,
    near: bool,
    similarity: float,
    workers: int | None,
    progress: Callable[[str, int, int | None], None],
) -> dict[str, int]:
    """Write which documents are left out; returns how many, by reason.

    Args:
        work: with the whole spool.
        shards: of it.
        near: whether similar documents are duplicates, too.
        similarity: from which on they are.
        workers: processes that work out digests; None: one for each core.
        progress: told "duplicates" and shards.

    Raises:
        DataError: rensa is needed and not installed, or a worker was killed.
    """
    done = read_json(work / _COUNTS)
    if done is not None:
        return done
    if near:
        require_rensa()
    parts = [rows_of(work / SPOOL, shards, number).rows for number in range(len(shards))]
    dropped = exact_duplicates(
        np.concatenate([part["place"] for part in parts]), np.concatenate([part["bytes"] for part in parts])
    )
    counts = {"exact_duplicates": int(dropped.sum())}
    if near:
        _digest_all(work, shards, workers=workers, progress=progress)
        digests = np.load(work / DIGESTS, mmap_mode="r", allow_pickle=False)
        similar = near_duplicates(digests, dropped=dropped, similarity=similarity)
        counts["near_duplicates"] = int(similar.sum())
        dropped |= similar
    np.save(work / DROPPED, dropped, allow_pickle=False)
    write_json(work / _COUNTS, counts)
    return counts


def _digest_all(
    work: Path, shards: list[Shard], *, workers: int | None, progress: Callable[[str, int, int | None], None]
) -> None:
    marks = work / "digested"
    if not (work / DIGESTS).exists() or not marks.is_dir():
        shape = (shards[-1].documents, PERMUTATIONS)
        np.lib.format.open_memmap(work / DIGESTS, mode="w+", dtype=np.uint32, shape=shape).flush()
        marks.mkdir(exist_ok=True)
    pending = [shard.number for shard in shards if not (marks / str(shard.number)).exists()]
    done = len(shards) - len(pending)
    progress("duplicates", done, len(shards))
    for number in _digested(work, shards, pending, workers=workers):
        (marks / str(number)).touch()
        done += 1
        progress("duplicates", done, len(shards))


def _digested(work: Path, shards: list[Shard], pending: list[int], *, workers: int | None) -> Iterator[int]:
    if shards[-1].bytes < SMALL:
        for number in pending:
            digest_shard(work, shards, number)
            yield number
        return

    def tasks() -> Iterator[Task]:
        for number in pending:
            yield {"what": "digest", "directory": str(work), "shard": number}

    wanted = workers or len(os.sched_getaffinity(0))
    for result in run_tasks(tasks(), module="moetrain.prepare.shards", workers=max(1, min(wanted, len(pending)))):
        yield int(result.task["shard"])
