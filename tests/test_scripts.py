"""The scripts run."""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


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


def test_the_sweep_script_finds_what_a_killed_sweep_left(tmp_path):
    sys.path[:0] = [str(SCRIPTS)]
    try:
        from expert_count_sweep import at_work, done
    finally:
        sys.path.pop(0)
    from made import a_sweep

    assert done(tmp_path) == 0
    sweep = a_sweep(tmp_path, seeds=1, unfinished=2)
    sweep.runs[-1].status = "running"
    sweep.write()
    lock = sweep.run_dir(sweep.runs[-1]) / "lock"
    lock.parent.mkdir()
    lock.write_text("4711 host\n")
    assert (done(tmp_path), at_work(tmp_path)) == (16, [4711])
