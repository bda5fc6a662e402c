"""`moetrain sweep` and `moetrain report` as a user types them; one real sweep is killed and taken up again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from as_typed import assert_told
from made import a_run, a_sweep

import moetrain
from moetrain.errors import LaunchError
from moetrain.launch.lock import RunLock
from moetrain.metrics.log import read_metrics
from moetrain.sweep.state import Sweep

pytestmark = pytest.mark.slow

TINY = [
    "model.d_model=16", "model.num_heads=2", "model.num_layers=1", "model.vocab_size=300", "model.context=16",
    "model.d_ff=32", "model.moe.d_expert=16", "launch.processes=1", "batch.global_batch=2", "schedule.warmup_steps=1",
    "data.text=text", "data.held_out=0.3", 'log.wandb="off"', "log.every_steps=1", "checkpoint.every_steps=5",
    "evaluate.every_steps=null",
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "moetrain.cli", *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def test_a_sweep_that_is_killed_goes_on_and_has_every_step_once(place):
    """SIGKILL to the sweep and to its run, between two saves: the next start goes on from the newest checkpoint."""
    (place / "text").mkdir()
    for number in range(20):
        (place / "text" / f"{number}.txt").write_text(f"Document {number}. " + "What is said is said. " * (number + 20))
    words = ("sweep", "optim.weight_decay=0.1,0.2", "schedule.steps=60", "name=killed", *TINY)
    metrics = place / "sweeps/killed/runs/weight_decay-0.1_seed-1/metrics.jsonl"
    with subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True) as first:  # fmt: skip
        # a checkpoint is written while training goes on
        saved = metrics.parent / "checkpoints"
        _wait_for(
            lambda: any(saved.glob("step_*/manifest.json")) and len(metrics.read_bytes().splitlines()) >= 8, first
        )
        first.send_signal(signal.SIGKILL)
    launcher = int((metrics.parent / "lock").read_text().split()[0])
    os.killpg(launcher, signal.SIGKILL)
    _wait_for(lambda: _is_free(metrics.parent))
    done = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {run.status for run in Sweep.read(place / "sweeps/killed").runs} == {"done"}
    steps = [line["step"] for line in read_metrics(metrics) if "loss" in line]
    assert steps == list(range(1, 61))
    starts = json.loads((metrics.parent / "origin.json").read_text())["starts"]
    assert len(starts) == 2
    assert "resumed from" in (place / "sweeps/killed/log/weight_decay-0.1_seed-1.log").read_text()


def _wait_for(ready, process=None):
    deadline = time.monotonic() + 90
    while not ready():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_free(directory: Path) -> bool:
    try:
        with RunLock(directory):
            return True
    except LaunchError:
        return False


class TestWords:
    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ((), "no axis is given: write SETTING=value,value,…"),
            (("optim.lr=1e-3",), "no axis is given"),
            (("seed=1,2",), "seeds alone compare nothing"),
            (("optim.lr=1e-3,2e-3", "seed=x"), "'seeds[0]' is 'x', but must be a whole number"),
            (("optim.lr=1e-3,2e-3", "run_dir=a"), "run_dir is given as a setting of the runs, but a sweep sets it"),
            (("optim.lr=1e-3,2e-3", "jobs=two"), "'jobs' is 'two', but must be a whole number"),
            (("optim.lr=1e-3,2e-3", "--fast"), "--fast is not an option"),
            (("optim.rl=1,2",), "'optim.rl' is not a setting; did you mean 'optim.lr'?"),
            (("experiment=expert_count", "size=xl,s"), "size has no 'xl': use s, m, l"),
            (
                ("experiment=expert_cuont", "seed=1,2"),
                "sweeps: expert_count; experiments:",
            ),
            (("status",), "no sweeps are named, but it must be one: none is in sweeps"),
            (("status", "a", "b"), "2 sweeps are named, but it must be one"),
            (("status", "--twice"), "'--twice' is not known here"),
            (("status", "nowhere"), "nowhere/sweep.json does not exist"),
            (("predict", "sweeps/a"), "nothing is asked for: give compute=FLOPS"),
            (("predict", "sweeps/a", "compute=much"), "compute is 'much', but must be a number above 0"),
            (("predict", "sweeps/a", "parameters=1e9"), "parameters is given alone"),
            (("predict", "sweeps/a", "flops=1e9"), "'flops' is not known here"),
            (("search", "optim.lr=1e-3"), "nothing is searched"),
            (("search", "optim.lr=interval(2,1)"), "an interval goes from low to high"),
        ],
    )
    def test_what_is_wrong_is_told_before_anything_is_written(self, moetrain_in_process, place, words, told):
        done = moetrain_in_process("sweep", *words)
        assert_told(done, told)
        assert list(place.iterdir()) == []

    def test_the_experiment_of_the_docs_is_a_grid_at_equal_flops(self, moetrain_in_process):
        text = moetrain_in_process("sweep", "experiment=expert_count", "--dry-run").stdout
        assert text.startswith("sweeps/expert_count: 18 points x 2 seeds = 36 runs")
        assert "size-l_num_experts-32" in text

    def test_single_words_narrow_an_experiment(self, moetrain_in_process):
        words = ("experiment=expert_count", "size=s", "model.moe.num_experts=2,4", "seeds=7", "--dry-run")
        assert "2 points x 1 seeds = 2 runs" in moetrain_in_process("sweep", *words).stdout

    def test_ranges_are_hydras(self, moetrain_in_process):
        text = moetrain_in_process("sweep", "model.num_layers=range(1,4)", "--dry-run").stdout
        assert "3 points" in text

    def test_a_seed_is_no_axis_but_one_for_every_point(self, moetrain_in_process):
        words = ("model.num_layers=1,2", "seed=range(1,4)", "--dry-run")
        assert "2 points x 3 seeds = 6 runs" in moetrain_in_process("sweep", *words).stdout
        words = ("model.num_layers=1,2", "seed=7", "--dry-run")
        assert "2 points x 1 seeds = 2 runs" in moetrain_in_process("sweep", *words).stdout

    def test_a_search_says_what_it_would_try(self, moetrain_in_process):
        pytest.importorskip("optuna")
        done = moetrain_in_process("sweep", "search", "optim.lr=tag(log,interval(1e-4,1e-2))", "trials=3", "--dry-run")
        assert done.stdout.startswith("sweeps/sweep: 3 trials of optim.lr in 0.0001 to 0.01")


class TestAnswers:
    def test_the_status_has_a_line_for_each_run(self, moetrain_in_process, place):
        a_sweep(place / "s", unfinished=1)
        lines = moetrain_in_process("sweep", "status", "s").stdout.splitlines()
        assert lines[0] == "s: 36 runs: 35 done, 1 waiting"
        assert len(lines) == 38

    def test_the_only_sweep_need_not_be_named(self, moetrain_in_process, place):
        a_sweep(place / "sweeps" / "a")
        asked = ("predict", "parameters=5e6", "experts=8")
        alone = moetrain_in_process("sweep", *asked)
        assert alone.returncode == 0
        shutil.copytree(place / "sweeps" / "a", place / "sweeps" / "b")
        assert_told(moetrain_in_process("sweep", *asked), "no sweeps are named, but it must be one: one of a, b")
        assert moetrain_in_process("sweep", *asked, "b").stdout == alone.stdout
        assert moetrain_in_process("sweep", "status", "b").stdout.startswith("sweeps/b: 36 runs: 36 done")

    def test_a_prediction_has_its_interval_and_a_refusal_its_reason(self, moetrain_in_process, place):
        a_sweep(place / "s")
        near = moetrain_in_process("sweep", "predict", "s", "parameters=5e6", "experts=8")
        assert near.returncode == 0
        assert "with 90%), 1." in near.stdout or "with 90%), 2" in near.stdout
        far = moetrain_in_process("sweep", "predict", "s", "parameters=5e9", "experts=8")
        assert far.returncode == 1
        assert "times beyond the runs" in far.stdout

    def test_laws_that_the_runs_do_not_tell_are_refused(self, moetrain_in_process, place):
        a_sweep(place / "s")
        done = moetrain_in_process("sweep", "predict", "s", "compute=1e15")
        assert done.returncode == 1
        assert "3 of the 4 different values of compute" in done.stdout

    def test_a_report_is_written_with_its_pictures(self, moetrain_in_process, place):
        a_run(place / "r")
        done = moetrain_in_process("report", "r", "cluster=cpu")
        assert done.returncode == 0, done.stderr
        page = (place / "r" / "report.html").read_text()
        assert "http-equiv" not in page
        assert "plan, cpu" in page
        assert {path.suffix for path in (place / "r" / "report").iterdir()} == {".png", ".svg"}

    @pytest.mark.parametrize(
        ("words", "told"),
        [((), "report takes one directory"), (("nowhere",), "nowhere/run.yaml does not exist"),
         (("r", "clutser=cpu"), "'clutser' is not a setting of report")],
    )  # fmt: skip
    def test_a_report_of_nothing_is_told(self, moetrain_in_process, words, told):
        assert_told(moetrain_in_process("report", *words), told)
