"""How fast text becomes tokens on disk: `prepare` against the bare encoder and Megatron's scheme, in turns.

    python scripts/bench_prepare.py corpus.jsonl tokenizer.json [--repeats 5] [--workers 2]

Contestants, each a process of its own:
    bare            encode_batch_fast of `tokenizers` on all cores, the documents in memory, the ids dropped
    pool            Megatron-LM's tools/preprocess_data.py: Pool.imap, a JSON line a task, the parent writes
    tokenizers      prepare, encoding with `tokenizers`
    fastokens       prepare, encoding with fastokens
    ..., one core   the same, all its processes on one core

Everything that prepare does counts: reading, the document index, digests, baselines, the round trip. Besides the time
on the clock stands the time on processors, of all processes, which neighbours on the machine disturb less. Medians;
compare within one table only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ONE_CORE = ", one core"
CONTESTANTS = ("bare", "pool", "tokenizers", "fastokens",
               *(name + ONE_CORE for name in ("bare", "tokenizers", "fastokens")))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="json lines with a column 'text'")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measure(options.contestant, options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.repeats):
        for name in CONTESTANTS:
            command = [sys.executable, *sys.argv, "--contestant", name]
            found[name].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    print(table(found, workers=options.workers))


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One turn of one contestant."""
    workers = options.workers
    if name.endswith(ONE_CORE):
        workers = 1
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    plain = name.removesuffix(ONE_CORE)
    work = {"bare": bare, "pool": pool}.get(plain) or partial(ours, fast=plain == "fastokens")
    with tempfile.TemporaryDirectory(dir=".") as directory:
        return work(options.corpus, options.tokenizer, Path(directory), workers)


def bare(corpus: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    from moetrain.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    with open(corpus, encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    watch = Watch()
    tokens = 0
    for start in range(0, len(documents), 500):
        encodings = loaded.encode_batch_fast(documents[start : start + 500], add_special_tokens=False)
        tokens += sum(len(encoding) for encoding in encodings)
    return watch.stop(tokens)


def pool(corpus: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    watch = Watch()
    tokens = 0
    context = multiprocessing.get_context("fork")
    with (
        open(corpus, encoding="utf-8") as lines,
        open(out / "tokens.bin", "wb") as file,
        context.Pool(workers, initializer=_load, initargs=(str(tokenizer),)) as processes,
    ):
        for ids in processes.imap(_encode, lines, 32):
            np.array(ids, dtype=np.uint16).tofile(file)
            tokens += len(ids)
    return watch.stop(tokens)


def ours(corpus: Path, tokenizer: Path, out: Path, workers: int, *, fast: bool) -> dict[str, float]:
    from moetrain.data.tokenizer import load_tokenizer, vocabulary_size
    from moetrain.prepare.directory import prepare
    from moetrain.prepare.reading import Options

    size = vocabulary_size(load_tokenizer(tokenizer))
    watch = Watch()
    prepared = prepare(
        out / "prepared", text=[str(corpus)], text_column="text", held_out=0.05, vocab_size=size,
        tokenizer=str(tokenizer), progress=lambda *_: None, say=lambda line: print(line, file=sys.stderr),
        options=Options(workers=workers, fast_encoder=fast),
    )  # fmt: skip
    found = watch.stop(prepared.train.num_tokens + prepared.held_out.num_tokens)
    shutil.rmtree(out / "prepared")
    return found


class Watch:
    """Seconds on the clock and on processors, from now on."""

    def __init__(self) -> None:
        self._clock, self._processors = time.perf_counter(), _processor_seconds()

    def stop(self, tokens: int) -> dict[str, float]:
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "seconds": time.perf_counter() - self._clock,
            "processors": _processor_seconds() - self._processors,
            "tokens": tokens,
            "mib": max(peaks) / 1024,
        }


def table(found: dict[str, list[dict[str, float]]], *, workers: int) -> str:
    """Medians, and their ratios to the first contestant."""
    middle: dict[str, dict[str, Any]] = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()
    }
    first = middle[CONTESTANTS[0]]
    lines = [
        f"{workers} workers on {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "| | seconds | processor seconds | Mtok/s | speed / bare | the same on processors | peak MiB of a process |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in middle.items():
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {row['processors']:.2f} | {row['tokens'] / row['seconds'] / 1e6:.2f} "
            f"| {first['seconds'] / row['seconds']:.2f} | {first['processors'] / row['processors']:.2f} "
            f"| {row['mib']:.0f} |"
        )
    return "\n".join(lines)


def _processor_seconds() -> float:
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _load(tokenizer: str) -> None:
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = Tokenizer.from_file(tokenizer)


def _encode(line: str) -> list[int]:
    ids: list[int] = _tokenizer.encode(json.loads(line)["text"]).ids
    return ids


if __name__ == "__main__":
    main()
