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
