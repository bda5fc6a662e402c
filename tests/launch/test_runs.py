"""What is told of runs that are there, and how they are asked to stop; with real launchers and locks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moetrain
from moetrain.config.checks import resolve
from moetrain.config.freeze import write_run
from moetrain.config.launch.settings import LaunchConfig
from moetrain.config.schema import RunConfig
from moetrain.errors import LaunchError
from moetrain.launch.lock import RunLock, is_running
from moetrain.launch.record import read_record, recorded
from moetrain.launch.runs import cancel, find_runs, log_file, named, status


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "small"
    run_dir.mkdir(parents=True)
    write_run(resolve(RunConfig(name="small", launch=LaunchConfig(processes=1)), default_processes=1), run_dir)
    return run_dir


def write_metrics(run_dir: Path, *lines: dict[str, object]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_never_started_is_new(run_dir: Path) -> None:
    told = status(run_dir)
    assert (told.state, told.step, told.steps, told.tokens_per_second, told.checkpoint) == ("new", 0, 600, None, None)


def test_a_run_goes_from_running_to_stopped_failed_and_finished(run_dir: Path) -> None:
    write_metrics(run_dir, {"step": 10, "tokens_per_second": 5.0}, {"step": 20, "tokens_per_second": 7.0})
    (run_dir / "checkpoints/step_00000015").mkdir(parents=True)
    with RunLock(run_dir):
        told = status(run_dir)
        assert (told.state, told.step, told.tokens_per_second, told.checkpoint) == ("running", 20, 7.0, 15)
    with pytest.raises(LaunchError), recorded(run_dir):
        raise LaunchError("rank 1 ended with SIGKILL\nand more")
    assert (status(run_dir).state, status(run_dir).note) == ("failed", "rank 1 ended with SIGKILL")
    write_metrics(run_dir, {"step": 600, "final": True})
    assert status(run_dir).state == "finished"


def test_a_launcher_that_vanished_leaves_a_failed_run(run_dir: Path) -> None:
    code = f"""
import os, pathlib
from moetrain.launch.record import recorded
with recorded(pathlib.Path({str(run_dir)!r})):
    os._exit(1)
"""
    subprocess.run([sys.executable, "-c", code], env=environment())
    assert (status(run_dir).state, status(run_dir).note[:20]) == ("failed", "its launcher is gone")


def test_cancel_makes_a_local_run_save_and_stop(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "saves.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "pathlib.Path(sys.argv[1], 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    code = f"""
import pathlib
from moetrain.config.launch.settings import LaunchConfig
from moetrain.launch.lock import RunLock, is_running
from moetrain.launch.start import start
run_dir = pathlib.Path({str(run_dir)!r})
with RunLock(run_dir):
    print(start(run_dir, LaunchConfig(processes=1, nodes=1), module="saves"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(str(tmp_path)), stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 30
        while not (run_dir / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert is_running(run_dir)
        assert cancel(run_dir, now=False) == f"{run_dir} was asked to save and stop"
        assert process.communicate(timeout=20)[0] == "Outcome(stopped=True, queued='')\n"
    finally:
        process.kill()
    assert read_record(run_dir) is None  # it was not the run that was started there
    with pytest.raises(LaunchError, match="does not run"):
        cancel(run_dir, now=False)


def test_runs_are_found_by_directory_and_by_name(run_dir: Path) -> None:
    assert find_runs(run_dir.parent) == [run_dir]
    assert named("small").resolve() == named(str(run_dir)).resolve() == run_dir
    with pytest.raises(LaunchError, match="'smal' is no run: name a run directory, or one of runs/: small"):
        named("smal")


def test_the_log_of_a_rank_or_of_the_run(run_dir: Path) -> None:
    with pytest.raises(LaunchError, match="it has not started yet"):
        log_file(run_dir, rank=None)
    (run_dir / "log").mkdir()
    for name in ("rank_00000.log", "rank_00001.log"):
        (run_dir / "log" / name).touch()
    assert log_file(run_dir, rank=None).name == "rank_00000.log"
    (run_dir / "log/console.txt").touch()
    assert log_file(run_dir, rank=None).name == "console.txt"
    with pytest.raises(LaunchError, match=r"no rank_00007\.log: there are rank_00000\.log to rank_00001\.log"):
        log_file(run_dir, rank=7)


def environment(*places: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(moetrain.__file__).parents[1]), *places])}
