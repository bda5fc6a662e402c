"""Misfortunes of real runs, each with the outcome that docs/incidents.md promises. Real ranks, through the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain.cli.options import Options, settings
from moetrain.cli.running.train import prepare_run
from moetrain.launch.local import run_local
from moetrain.sources.text import expand, read_documents
from moetrain.watch.incidents import Incident, read_incidents

pytestmark = pytest.mark.slow

STEPS = 40
SETTINGS = [
    "data.text=corpus.jsonl", "data.held_out=0.2", "model.vocab_size=300", "model.context=32", "model.num_layers=2",
    "model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.moe.d_expert=32", "model.moe.num_experts=4",
    "batch.global_batch=8", "batch.micro_batch=4", f"schedule.steps={STEPS}", "schedule.warmup_steps=4",
    "checkpoint.every_steps=4", "checkpoint.keep=100", "evaluate.every_steps=null", "log.every_steps=1",
    "log.wandb=off", "launch.processes=2", "watch.straggler_steps=0",
]  # fmt: skip
LIMIT_SECONDS = 150


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small corpus of real text, already made into tokens."""
    place = tmp_path_factory.mktemp("place")
    documents = read_documents(expand(["builtin:sotu"]), text_column="text")
    (place / "corpus.jsonl").write_text("\n".join(json.dumps({"text": next(documents)[:2000]}) for _ in range(20)))
    return place


@pytest.fixture(autouse=True)
def _environment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place / "torch_extensions"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def start(name: str, *overrides: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "moetrain.cli", "train", f"name={name}", *SETTINGS, *overrides]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prepared(name: str, *overrides: str) -> Path:
    """The directory of a run that is ready to be started."""
    run, _ = settings(Options.read([f"name={name}", *SETTINGS, *overrides]))
    run_dir = Path(str(run.run_dir))
    run_dir.mkdir(parents=True)
    prepare_run(run, run_dir)
    return run_dir


def run_planted(run_dir: Path, **planted: Any) -> bool:
    """Start the ranks with planted misfortunes; whether they were stopped on request."""
    (run_dir / "planted.json").write_text(json.dumps({"not_finite": [], "spike": [], "stop_at": None} | planted))
    script = Path(__file__).with_name("planted_worker.py")
    return run_local(run_dir, processes=2, command=[sys.executable, str(script), str(run_dir)]).stopped


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    # the last line may be in the middle of being written
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] \
        if path.is_file() else []  # fmt: skip


def losses(run_dir: Path) -> list[float | None]:
    return [loss for line in metrics(run_dir) for loss in line.get("step_losses", [])]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def worker(place: Path, name: str, *, rank: int) -> int:
    """The process id of a rank, read from /proc."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            where = Path(os.readlink(entry / "cwd"))
        except OSError:
            continue
        is_ours = b"moetrain.train.worker" in words and f"runs/{name}".encode() in words and where == place.resolve()
        if is_ours and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"rank {rank} of {name} does not run")


def kinds(run_dir: Path) -> list[str]:
    return [each.kind for each in read_incidents(run_dir)]


def of_kind(run_dir: Path, kind: str) -> Incident:
    return next(each for each in read_incidents(run_dir) if each.kind == kind)


def test_bad_batches_are_skipped_and_left_out_also_after_a_stop_as_if_they_had_never_been(place):
    """Bit for bit the run that leaves them out from the start, with no misfortune at all."""
    clean = prepared("clean", "watch.spike=off")
    (clean / "left_out.json").write_text(
        json.dumps({"batches": [[6, 6], [9, 12], [21, 22]], "rolled_back_at": []}), encoding="ascii"
    )
    assert run_planted(clean) is False
    bad = prepared("bad", "watch.spike=rollback", "watch.spike_window=8", "watch.max_skips=3")
    what = {"not_finite": [6, 10, 11, 12], "spike": [22]}
    assert run_planted(bad, **what, stop_at=17) is True
    assert kinds(bad) == ["not_finite"] * 4 + ["roll_back"]
    stopped_at = metrics(bad)[-1]["step"]
    assert 14 < stopped_at < 20, "between the two roll-backs"
    assert run_planted(bad, **what) is False
    assert kinds(bad) == ["not_finite"] * 4 + ["roll_back"] * 2
    done = [each.done for each in read_incidents(bad)]
    assert done[0] == "the step is skipped (1 of 3 in a row)"
    assert done[4] == "back to the checkpoint of step 8; the batches of steps 9 to 12 are left out"
    assert done[5] == "back to the checkpoint of step 20; the batches of steps 21 to 22 are left out"
    assert "deviations above" in read_incidents(bad)[5].what
    without = losses(clean)
    assert len(without) == STEPS
    assert [step for step, loss in enumerate(without) if loss is None] == [6, 9, 10, 11, 12, 21, 22]
    assert losses(bad) == without
    finals = [next(line["held_out_loss"] for line in metrics(each) if line.get("final")) for each in (clean, bad)]
    assert finals[0] == finals[1]
    manifest = json.loads((bad / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    assert manifest["updates"] == STEPS - 7
    assert manifest["watch"]["left_out"]["batches"] == [[9, 12], [21, 22]]


def test_a_rank_killed_and_a_rank_stopped_cost_a_restart_each_and_change_no_loss(place):
    unbroken = prepared("unbroken")
    assert run_planted(unbroken) is False
    run_dir = place / "runs/unlucky"
    process = start("unlucky", "launch.max_restarts=2", "watch.hang_seconds=2")
    wait_for(lambda: len(losses(run_dir)) >= 6, process)
    os.kill(worker(place, "unlucky", rank=1), signal.SIGKILL)
    wait_for(lambda: "restart" in kinds(run_dir), process)
    killed_at = len(losses(run_dir))
    wait_for(lambda: "resumed" in (run_dir / "log/rank_00001.log").read_text() or len(losses(run_dir)) > killed_at + 2
             or process.poll() is not None, process)  # fmt: skip
    stopped = worker(place, "unlucky", rank=1)
    os.kill(stopped, signal.SIGSTOP)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    assert kinds(run_dir) == ["restart", "hang", "restart"], output
    first, hang, second = read_incidents(run_dir)
    assert first.rank == hang.rank == second.rank == 1
    assert "SIGKILL" in first.what
    assert "restart 1 of 2 from the checkpoint of step" in first.done
    assert "rank 1 is behind: its process is stopped (SIGSTOP)" in hang.what
    assert "rank 0 waits in" in hang.what
    assert "the stacks of this rank" in (run_dir / "log/rank_00000.log").read_text()
    assert "in _exchange" in (run_dir / "log/rank_00000.log").read_text() or "in step" in hang.what
    assert output.count("incident at step") == 3
    assert "incidents    3 (2 restart, 1 hang): runs/unlucky/incidents.jsonl" in output
    assert losses(run_dir) == losses(unbroken)
    assert not Path(f"/proc/{stopped}").exists()


def test_a_slow_rank_is_told_and_so_is_its_recovery(place):
    run_dir = place / "runs/slow"
    process = start("slow", "schedule.steps=1000000", "checkpoint.every_steps=null", "watch.straggler_steps=10",
                    "watch.straggler_ratio=2", "watch.hang_seconds=4")  # fmt: skip
    wait_for(lambda: len(losses(run_dir)) > 3, process)
    rank = worker(place, "slow", rank=1)
    over = threading.Event()

    def hold_back() -> None:
        while not over.wait(0.002):
            os.kill(rank, signal.SIGSTOP)
            time.sleep(0.02)
            os.kill(rank, signal.SIGCONT)

    thread = threading.Thread(target=hold_back)
    thread.start()
    try:
        wait_for(lambda: "slow_rank" in kinds(run_dir), process)
    finally:
        over.set()
        thread.join()
    wait_for(lambda: "slow_rank_over" in kinds(run_dir), process)
    slow = of_kind(run_dir, "slow_rank")
    assert slow.rank == of_kind(run_dir, "slow_rank_over").rank == 1
    assert "for its own work in a step" in slow.what
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, errors
    assert "saved at step" in output
    assert "hang" not in kinds(run_dir), "a rank that is only slow is no hang"


def test_a_run_whose_time_is_over_is_saved_and_says_so_by_its_exit_code(place):
    process = start("limit", "launch.processes=1", "schedule.steps=1000000", "launch.stop_after_minutes=0.001")
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, errors
    assert "saved at step 1\n" in output, "over before the first step, which is still made and saved"
    assert (place / "runs/limit/checkpoints/step_00000001/manifest.json").is_file()
