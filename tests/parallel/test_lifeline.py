"""That a killed launcher takes its workers along is in tests/launch/test_local.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moetrain
from moetrain.parallel.lifeline import die_with_parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a process to its parent")

CHILD = """
import sys
from moetrain.parallel.lifeline import die_with_parent
print(die_with_parent(), "torch" in sys.modules)
"""


def child(parent_pid: int) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parents[1]), "MOETRAIN_PARENT_PID": str(parent_pid)}
    return subprocess.run([sys.executable, "-S", "-c", CHILD], env=env, capture_output=True, text=True, timeout=20)


def test_a_worker_is_held_by_the_launcher_that_started_it_without_torch() -> None:
    assert child(os.getpid()).stdout == "True False\n"


def test_a_worker_whose_launcher_is_already_gone_ends(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    result = child(gone.pid)
    assert result.returncode == 1
    assert f"the launcher, process {gone.pid}, is not this worker's parent any more" in result.stderr


def test_a_worker_started_by_hand_is_held_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_PARENT_PID", raising=False)
    assert die_with_parent() is False
