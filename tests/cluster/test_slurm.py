"""A run in a real SLURM of two nodes: submitted, requeued at its time limit, resumed, cancelled; arrays."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.conftest import SETTINGS, Place
from cluster.two_node_slurm import Slurm
from moetrain.config.launch.settings import SlurmConfig
from moetrain.launch.cluster.slurm import submit_array

pytestmark = pytest.mark.cluster

IN_SLURM = ["launch=slurm", "launch.nodes=2", "launch.processes=1", "launch.master_addr=127.0.0.1",
            "launch.slurm.gpus_per_node=0", "checkpoint.every_steps=null", "parallel.expert_parallel=1"]  # fmt: skip
ENDLESS = "schedule.steps=1000000"
Wait = Callable[..., None]


def job(place: Place, name: str) -> str:
    return str(json.loads((place.run_dir(name) / "launch/job.json").read_text())["job"])


def state(slurm: Slurm, number: str) -> str:
    """A word for each task of a job; empty when it has left the queue."""
    return " ".join(
        slurm.call("squeue", "--noheader", "--array", "--format=%T", "--states=all", f"--jobs={number}").split()
    )


def interface() -> str:
    """One by which preflight takes nodes to reach each other: not the loopback."""
    for place in sorted(Path("/sys/class/net").iterdir()):
        if place.name != "lo" and (place / "operstate").read_text().strip() == "up":
            return place.name
    pytest.skip("needs a network interface that is up")


def printed(place: Place, name: str) -> str:
    return "".join(path.read_text() for path in (place.run_dir(name) / "log").glob("slurm-*.out"))


def test_a_run_is_requeued_at_its_time_limit_resumes_and_is_cancelled(
    place: Place, slurm: Slurm, wait_until: Wait
) -> None:
    # SLURM counts a limit in minutes, and warns up to a minute early
    limits = ["launch.slurm.time=1:00", "launch.slurm.save_seconds=25", "preflight=skip"]
    done = place.call(*place.train("queued", *IN_SLURM, *limits, ENDLESS), **slurm.environment)
    assert done.returncode == 0, done.stderr
    number = job(place, "queued")
    assert f"SLURM job {number}" in done.stdout

    wait_until(lambda: "goes back into the queue" in printed(place, "queued"), what=lambda: printed(place, "queued"))
    wait_until(lambda: state(slurm, number) == "PENDING", what=lambda: state(slurm, number))
    saved = place.step("queued")
    assert saved > 0
    shown = place.call(*place.words("status", "queued"), **slurm.environment).stdout
    assert "queued" in shown
    assert f"SLURM job {number}, PENDING" in shown
    # SLURM holds a requeued job back for two minutes; within the same second its nodes would still refuse it
    slurm.call("scontrol", "update", f"JobId={number}", "StartTime=now+5", "TimeLimit=30")
    wait_until(lambda: place.step("queued") > saved + 3, what=lambda: printed(place, "queued"))
    assert "resumed from" in printed(place, "queued")

    cancelled = place.call(*place.words("cancel", "queued"), **slurm.environment)
    assert "was asked to save and stop" in cancelled.stdout, cancelled.stderr
    wait_until(lambda: state(slurm, number) == "FAILED", what=lambda: state(slurm, number))
    shown = place.call(*place.words("status", "queued"), **slurm.environment).stdout
    assert " stopped " in shown

    steps = place.step("queued")
    unbroken = place.call(*place.train("at once", "launch.processes=2", "parallel.expert_parallel=1",
                                       "checkpoint.every_steps=null", f"schedule.steps={saved + 3}"))  # fmt: skip
    assert unbroken.returncode == 0, unbroken.stderr
    assert steps >= saved + 3
    assert place.losses("queued")[: saved + 3] == place.losses("at once")


def test_a_job_looks_at_its_nodes_before_the_first_step(place: Place, slurm: Slurm, wait_until: Wait) -> None:
    run = [*IN_SLURM, "schedule.steps=6"]
    done = place.call(*place.train("looks", *run, "launch.interface=ib77"), **slurm.environment)
    assert done.returncode == 0, done.stderr
    number = job(place, "looks")
    wait_until(lambda: state(slurm, number) == "FAILED", what=lambda: printed(place, "looks"))
    shown = place.call(*place.words("logs", "looks"), **slurm.environment).stdout
    for node in ("n1", "n2"):
        assert re.search(rf"no-go +interface variables +{node} .*there is no interface ib77", shown)
    assert "was not started: preflight says no-go" in shown
    assert not place.metrics("looks")
    shown = place.call(*place.words("status", "looks"), **slurm.environment).stdout
    assert " failed " in shown
    assert "preflight says no-go" in shown

    done = place.call(*place.train("looks", *run, f"launch.interface={interface()}"), **slurm.environment)
    assert done.returncode == 0, done.stderr
    number = job(place, "looks")
    wait_until(lambda: state(slurm, number) == "COMPLETED", what=lambda: printed(place, "looks"))
    assert place.step("looks") == 6
    report = json.loads((place.run_dir("looks") / "preflight.json").read_text())
    assert report["verdict"] in ("go", "warn")
    assert len(report["found"]["measured"]["links"]) == 1


def test_preflight_alone_is_a_job_that_is_waited_for(place: Place, slurm: Slurm) -> None:
    words = ["name=alone in a job", *SETTINGS, *IN_SLURM, f"launch.interface={interface()}"]
    done = place.call(*place.words("preflight", *words), **slurm.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"go +links +1 between nodes", done.stdout)
    assert re.search(r"go +code +2 nodes", done.stdout)


def test_a_job_that_waits_is_cancelled_where_it_is(place: Place, slurm: Slurm) -> None:
    done = place.call(*place.train("waits", *IN_SLURM, "launch.slurm.extra=['--begin=now+1hour']", ENDLESS),
                      **slurm.environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    number = job(place, "waits")
    assert state(slurm, number) == "PENDING"
    settings = (place.directory / "runs/waits/run.yaml").read_bytes()
    again = place.call(*place.train("waits", *IN_SLURM, "schedule.steps=7"), **slurm.environment)
    assert again.returncode == 2
    assert f"already SLURM job {number} (PENDING)" in again.stderr
    assert (place.directory / "runs/waits/run.yaml").read_bytes() == settings
    cancelled = place.call(*place.words("cancel", "waits"), **slurm.environment)
    assert cancelled.stdout == f"SLURM job {number} (PENDING) was cancelled\n"
    assert state(slurm, number) == "CANCELLED"


def test_an_array_runs_each_command_and_requeues_the_one_that_stops_at_its_limit(
    place: Place, slurm: Slurm, wait_until: Wait, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    odd = 'it\'s $HOME "and" `more`'
    wait = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
        "first = pathlib.Path('first'); again = first.exists(); first.touch(); again or time.sleep(60)"
    )
    commands = [
        [sys.executable, "-c", "import sys, pathlib; pathlib.Path('word').write_text(sys.argv[1])", odd],
        [sys.executable, "-c", wait],
    ]
    number = submit_array(commands, directory=tmp_path / "an array", slurm=SlurmConfig(time="5"), name="a b", at_once=2)
    wait_until(lambda: (tmp_path / "word").exists() and (tmp_path / "first").exists())
    assert (tmp_path / "word").read_text() == odd
    slurm.call("scancel", "--batch", "--signal=USR1", f"{number}_1")
    wait_until(lambda: "PENDING" in state(slurm, f"{number}_1"), what=lambda: state(slurm, number))
    slurm.call("scontrol", "update", f"JobId={number}_1", "StartTime=now+5")
    wait_until(lambda: state(slurm, number) == "COMPLETED COMPLETED", what=lambda: state(slurm, number))
    assert "goes back into the queue" in (tmp_path / "an array" / f"array-{number}_1.out").read_text()
