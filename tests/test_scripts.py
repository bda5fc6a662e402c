"""The scripts run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_the_layer_benchmark_prints_a_row_for_each_shape_and_dtype():
    line = [sys.executable, str(SCRIPTS / "bench_layer.py"), "--tokens", "64", "--repeats", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [row.split("|") for row in done.stdout.splitlines() if "fp32 |" in row or "bf16 |" in row]
    assert [row[0].split() for row in rows] == [
        [experts, top_k, dtype]
        for dtype in ("fp32", "bf16")
        for experts, top_k in (("8", "2"), ("64", "2"), ("64", "8"))
    ]
    assert all(float(value) > 0 for row in rows for value in row[1].split("]")[1].split())


def test_the_comparison_of_routers_names_settings_that_pass_the_checks():
    sys.path.insert(0, str(SCRIPTS))
    try:
        from compare_routers import ROUTERS
    finally:
        sys.path.pop(0)
    from moetrain.cli.main import main
    from moetrain.config.routers import ROUTERS as THERE_ARE

    assert set(ROUTERS) == set(THERE_ARE) - {"balanced"}
    for router, own in ROUTERS.items():
        assert main(["train", f"model.moe.router={router}", f"name={router}", *own, "--dry-run"]) == 0
