"""The checkpoint benchmark measures what it says."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys
from dataclasses import asdict
from moetrain.bench.checkpoint import measure, table
from moetrain.bench.settings import CheckpointSettings
report = measure(CheckpointSettings(parameters=300_000, repeats=2, directory=sys.argv[1]))
print(table(report), file=sys.stderr)
print(json.dumps(asdict(report)))
"""


def test_every_contestant_has_a_row_with_its_bytes_and_nothing_is_left_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        "copy in memory", "raw write", "moetrain, stall", "moetrain, beside training", "moetrain, training waits",
        "torch.save", "DeepSpeed save_checkpoint", "raw read", "moetrain, load", "moetrain, load, digests checked",
    ]  # fmt: skip
    state = 12 * report["parameters"]
    for name, row in rows.items():
        assert 0 < row["spread"][0] <= row["seconds"] <= row["spread"][1], name
        # an index and the heads of some dozens of tensors come on top; DeepSpeed adds the weights of its model
        assert state <= row["num_bytes"] < state * 1.4 + 200_000, name
        assert name in done.stderr
    assert rows["raw write"]["num_bytes"] == state
    assert rows["moetrain, stall"]["seconds"] < rows["moetrain, beside training"]["seconds"]
    assert list(tmp_path.iterdir()) == []
