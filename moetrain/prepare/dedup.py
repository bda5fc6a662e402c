"""Duplicates left out: a mark for each document of the spool, in ``dropped.npy``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moetrain.parallel.pool import Here, Pool
from moetrain.prepare.shards import DIGESTS, DROPPED
from moetrain.sources.duplicates import PERMUTATIONS, exact_duplicates, near_duplicates, require_rensa
from moetrain.sources.spool import Spool, read_json, write_json

_COUNTS = "dropped.json"


def mark_duplicates(
    work: Path,
    spool: Spool,
    *,
    near: bool,
    similarity: float,
    crew: Here | Pool,
    progress: Callable[[str, int, int | None], None],
) -> dict[str, int]:
    """Write which documents are left out; returns how many, by reason.

    Args:
        work: with the whole spool.
        spool: of it.
        near: whether similar documents are duplicates, too.
        similarity: from which on they are.
        crew: who works out digests.
        progress: told "duplicates" and shards.

    Raises:
        DataError: rensa is needed and not installed, or a worker was killed.
    """
    done = read_json(work / _COUNTS)
    if done is not None:
        return done
    if near:
        require_rensa()
    parts = [spool.rows(index) for index in range(len(spool.shards))]
    dropped = exact_duplicates(
        np.concatenate([part["place"] for part in parts]), np.concatenate([part["bytes"] for part in parts])
    )
    counts = {"exact_duplicates": int(dropped.sum())}
    if near:
        _digest_all(work, spool, crew=crew, progress=progress)
        digests = np.load(work / DIGESTS, mmap_mode="r", allow_pickle=False)
        similar = near_duplicates(digests, dropped=dropped, similarity=similarity)
        counts["near_duplicates"] = int(similar.sum())
        dropped |= similar
    np.save(work / DROPPED, dropped, allow_pickle=False)
    write_json(work / _COUNTS, counts)
    return counts


def _digest_all(
    work: Path, spool: Spool, *, crew: Here | Pool, progress: Callable[[str, int, int | None], None]
) -> None:
    marks = work / "digested"
    if not (work / DIGESTS).exists() or not marks.is_dir():
        shape = (spool.num_documents, PERMUTATIONS)
        np.lib.format.open_memmap(work / DIGESTS, mode="w+", dtype=np.uint32, shape=shape).flush()
        marks.mkdir(exist_ok=True)
    total = len(spool.shards)
    pending = [index for index in range(total) if not (marks / str(index)).exists()]
    done = total - len(pending)
    progress("duplicates", done, total)
    for result in crew.run({"what": "digest", "directory": str(work), "shard": index} for index in pending):
        (marks / str(result.task["shard"])).touch()
        done += 1
        progress("duplicates", done, total)
