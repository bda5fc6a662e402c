"""A rank with planted misfortunes: ``python planted_worker.py RUN_DIR``. RUN_DIR/planted.json says which, and when:

{"not_finite": [6], "spike": [22], "stop_at": 16}
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from moetrain.parallel.lifeline import die_with_parent, end_as_rank

if __name__ == "__main__":
    die_with_parent()

from moetrain.train import worker


def main(run_dir: Path) -> int:
    planted = json.loads((run_dir / "planted.json").read_text())
    plain = worker.micro_batches

    def micro_batches(batches, step, **how):
        first, *rest = plain(batches, step, **how)
        if step in planted["not_finite"] and os.environ["RANK"] == "1":
            first = replace(first, counted=0.0)  # a loss divided by nothing, on one rank
        if step in planted["spike"]:
            first = replace(first, counted=first.token_BS.numel() / 5)  # five times the loss and the gradient
        if step == planted["stop_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return [first, *rest]

    worker.micro_batches = micro_batches
    return worker.main(run_dir)


if __name__ == "__main__":
    end_as_rank(main, Path(sys.argv[1]))
