"""A sweep as a job array in a real SLURM: what fails is tried again, and the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.conftest import Place
from cluster.two_node_slurm import Slurm

pytestmark = pytest.mark.cluster

Wait = Callable[..., None]
IN_SLURM = ["launch=slurm", "launch.processes=1", "launch.master_addr=127.0.0.1", "launch.slurm.gpus_per_node=0",
            "launch.slurm.time=20:00", "checkpoint.every_steps=null"]  # fmt: skip


def test_a_grid_is_an_array_and_the_same_command_goes_on(place: Place, slurm: Slurm, wait_until: Wait) -> None:
    words = place.train("each", *IN_SLURM, "schedule.steps=6")
    words = [*words[:3], "sweep", "name=array", "optim.weight_decay=0.1,0.2,0.3", *words[5:]]
    directory = place.directory / "sweeps/array"
    # its directory of checkpoints cannot be made: the run fails when it saves, again and again
    broken = directory / "runs/weight_decay-0.2_seed-1/checkpoints"
    broken.parent.mkdir(parents=True)
    broken.touch()

    def status() -> dict[str, list[str]]:
        shown = place.call(*place.words("sweep", "status", str(directory)), **slurm.environment)
        assert shown.returncode == 0, shown.stderr
        rows = [line.split(maxsplit=2) for line in shown.stdout.splitlines()[2:]]
        return {row[0].removesuffix("_seed-1"): row[1:] for row in rows}

    done = place.call(*words, **slurm.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an array of 3 runs" in done.stdout
    assert {state for state, *_ in status().values()} <= {"queued", "running", "done"}

    again = place.call(*words, **slurm.environment)
    assert "an array of" not in again.stdout, "what is in the queue is left there"
    wait_until(lambda: {row[0] for row in status().values()} == {"done", "failed"}, what=lambda: str(status()))
    table = status()
    assert [name for name, row in table.items() if row[0] == "failed"] == ["weight_decay-0.2"]
    assert "checkpoints" in table["weight_decay-0.2"][-1]
    printed = "".join(path.read_text() for path in (directory / "array/001").glob("array-*_1.out"))
    assert printed.count("is tried again") == 1

    broken.unlink()
    done = place.call(*words, **slurm.environment)
    assert "an array of 1 runs" in done.stdout, done.stdout + done.stderr
    wait_until(lambda: {row[0] for row in status().values()} == {"done"}, what=lambda: str(status()))
    for number in (1, 2, 3):
        lines = metrics(directory / f"runs/weight_decay-0.{number}_seed-1")
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    done = place.call(*words, **slurm.environment)
    assert done.returncode == 0
    assert "next: moetrain report" in done.stdout


def test_two_nodes_for_each_run_and_one_that_is_taken_out_of_the_queue(
    place: Place, slurm: Slurm, wait_until: Wait
) -> None:
    words = place.train("each", *IN_SLURM, "launch.nodes=2", "preflight=skip", "parallel.expert_parallel=2",
                        "schedule.steps=5")  # fmt: skip
    words = [*words[:3], "sweep", "name=wide", "optim.weight_decay=0.1,0.2", "jobs=1", *words[5:]]
    done = place.call(*words, **slurm.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    second = place.directory / "sweeps/wide/runs/weight_decay-0.2_seed-1"
    told = place.call(*place.words("cancel", str(second)), **slurm.environment)
    assert "was cancelled" in told.stdout, told.stderr
    shown: list[str] = []

    def settled() -> bool:
        shown[:] = [place.call(*place.words("sweep", "status", "sweeps/wide"), **slurm.environment).stdout]
        return "1 done, 1 failed" in shown[0]

    wait_until(settled, what=lambda: "".join(shown))
    assert "left the queue before anything ran" in shown[0]
    run = json.loads((second.with_name("weight_decay-0.1_seed-1") / "metrics.jsonl").read_text().splitlines()[0])
    assert run["step"] == 1


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
