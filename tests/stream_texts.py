"""What tests of streams share: text that tells itself apart, and runs that stream it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, write_run
from moetrain.config.schema import RunConfig
from moetrain.stream.blocks import Blocks, End, Shape, Stream, open_again
from moetrain.stream.opening import open_stream


def rows_of(count: int, *, words: int = 60) -> list[dict[str, str]]:
    """Documents, each another one."""
    return [{"text": " ".join(f"w{(number * words + word) * 7919 % 4001}" for word in range(words))}
            for number in range(count)]  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run_of(text: list[Path], run_dir: Path, **settings: dict[str, Any]) -> RunConfig:
    """A run that streams; settings by section."""
    data = {"text": [str(path) for path in text], "held_out": 0.2, "stream": True, "stream_block": 256,
            "stream_window": 4} | settings.pop("data", {})  # fmt: skip
    run = freeze({"data": data, "model": {"vocab_size": 400, "context": 32}, "batch": {"global_batch": 4},
                  "run_dir": str(run_dir)} | settings)  # fmt: skip
    return resolve(run, default_processes=1)


def opened(run: RunConfig) -> Stream:
    """The stream of a run as its ranks find it: opening and run.yaml are there."""
    run_dir = Path(str(run.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    open_stream(run, run_dir, is_begun=False, progress=lambda *_: None)
    write_run(run, run_dir)
    return open_again(run, run_dir)


def counted_blocks(directory: Path, *, tokens: int, shape: Shape) -> Blocks:
    """A whole stream of the ids 0, 1, 2, …, as the producer would leave it."""

    blocks = Blocks(directory, shape=shape, dtype=np.dtype("<u4"))
    blocks.directory.mkdir(parents=True)
    ids = np.arange(tokens)
    total = (tokens - 1) // shape.sequence_length
    for first in range(0, total, shape.sequences):
        last = min(first + shape.sequences, total)
        blocks.write(first // shape.sequences, ids[first * shape.sequence_length : last * shape.sequence_length + 1])
    blocks.write_end(End(total, tokens, 1, 1, {}))
    return blocks


def all_tokens(blocks: Blocks) -> npt.NDArray[Any]:
    """Those of a stream that is at its end, put together again."""
    end = blocks.end()
    assert end is not None
    rows = [blocks.read(sequence) for sequence in range(end.sequences)]
    return np.concatenate([row[:-1] for row in rows] + [rows[-1][-1:]])
