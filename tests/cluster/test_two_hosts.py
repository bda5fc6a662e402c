"""A run on two hosts, through the deepspeed launcher over ssh; a host that is lost, and the run that goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.conftest import LIMIT_SECONDS, SETTINGS, Place
from cluster.two_hosts import ADDRESSES, NAMES, Hosts
from moetrain.config.freeze import read_run
from moetrain.watch.incidents import read_incidents

pytestmark = pytest.mark.cluster

LOST_AFTER, STEPS = 5, 60
ON_BOTH = ["launch=hostfile", f"launch.hosts=[{','.join(NAMES)}]", f"launch.master_addr={ADDRESSES[0]}",
           "launch.interface=eth0", f"launch.lost_after_seconds={LOST_AFTER}"]  # fmt: skip
Wait = Callable[..., None]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(hosts: Hosts, place: Place) -> Iterator[Start]:
    """Start a command on the first host."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, **environment: str) -> subprocess.Popen[str]:
        process = hosts.start(0, words, environment=place.environment | environment, cwd=place.directory)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    return output


def test_two_hosts_of_two_processes_train_as_one_host_of_four(place: Place, start: Start, tmp_path: Path) -> None:
    """Experts are shared by all four ranks, tokens travel by way of the node; the nodes come from a file."""
    (place.directory / "my hosts").write_text("# both\nnode1 slots=2\nnode2 slots=2\n")
    steps = ["schedule.steps=10", "parallel.expert_parallel=4", "checkpoint.every_steps=null"]
    both = [word for word in ON_BOTH if not word.startswith("launch.hosts=")]
    secret = "not-to-be-seen"
    process = start(*place.train("both", *both, "launch.hostfile='my hosts'", "parallel.two_level_all_to_all=true",
                                 "launch.export=[MY_*]", *steps), MY_SECRET=secret, NCCL_DEBUG="INFO")  # fmt: skip
    seen: set[str] = set()
    while process.poll() is None:
        seen |= {text for path in Path("/proc").glob("[0-9]*/cmdline") if secret in (text := read(path))}
        time.sleep(0.2)
    output = finish(process)
    assert "2 nodes of 2 processes (hostfile), expert parallel 4" in output
    assert "train 10/10 steps" in output
    assert not seen
    alone = place.call(*place.train("alone", "launch.processes=4", *steps))
    assert alone.returncode == 0, alone.stderr
    assert len(place.losses("both")) == 10
    assert place.losses("both") == place.losses("alone")
    assert json.loads((place.run_dir("both") / "preflight.json").read_text())["verdict"] in ("go", "warn")
    # what was handed over may hold secrets
    assert not (place.directory / "runs/both/launch/node.json").exists()


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_a_slowed_link_is_named_before_the_run(place: Place, hosts: Hosts, start: Start) -> None:
    hosts.slow("16mbit")  # of 100 Mbit/s, as the cluster's file says
    stated = ["cluster=cpu", "cluster.network_gb_per_second=0.0125"]
    process = start(*place.words("preflight", "name=slowed", *SETTINGS, *ON_BOTH, "launch.processes=1", *stated))
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    hosts.slow("1gbit")
    assert process.returncode == 2, output + errors
    told = next(line for line in output.splitlines() if line.startswith("no-go"))
    assert re.search(r"no-go +link +node1 - node2 +1\.\d+ MB/s each way, \d+% of what the plan counts on", told)
    assert (place.directory / "runs/slowed/hostfile.good").read_text() == "node1 slots=1\n"


def test_a_run_that_loses_a_host_goes_on_with_the_other_and_later_with_both(
    place: Place, hosts: Hosts, start: Start, wait_until: Wait
) -> None:
    # the work of a step is what one host needs 0.1 s for, so that the cut and the stop come in mid-run
    run = [f"schedule.steps={STEPS}", "batch.global_batch=64", "checkpoint.every_steps=4", "parallel.expert_parallel=1"]
    on_both = [*ON_BOTH, "launch.processes=1", "launch.max_restarts=1", "launch.elastic=true", "preflight=skip"]
    process = start(*place.train("cut", *on_both, *run))
    wait_until(lambda: place.step("cut") >= 6, what=lambda: f"{process.poll()} {place.step('cut')}")
    hosts.cut()
    cut_at = time.time()
    wait_until(lambda: read_incidents(place.run_dir("cut")), what=lambda: str(process.poll()))
    (told,) = read_incidents(place.run_dir("cut"))
    assert told.kind == "smaller"
    assert told.what.startswith(f"node2 is lost: nothing was heard from there for {LOST_AFTER} s")
    assert "on 1 process " in told.done
    # the ranks that wait in a collective are killed after a grace of 10 s, what waits for ssh to the host 2 s later
    assert told.time - cut_at < LOST_AFTER + 15
    reached = place.step("cut")
    wait_until(lambda: place.step("cut") > reached, what=lambda: f"{process.poll()} {place.step('cut')}")
    assert read_run(place.run_dir("cut")).launch.hosts == ["node1"]
    assert not hosts.pids(1), "the host that was cut off has ended its part by itself"
    print(f"told {told.time - cut_at:.1f} s after the cut, the next step was made after {time.time() - cut_at:.1f} s")
    process.terminate()
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, errors

    alone = place.step("cut")
    assert reached < alone < STEPS
    hosts.join()
    output = finish(start(*place.train("cut", *on_both, *run)))
    assert re.search(rf"resumed from \S+ at step {alone}\n", output)
    assert read_run(place.run_dir("cut")).launch.hosts == ["node1", "node2"]
    unbroken = place.call(*place.train("unbroken", *run, "launch.processes=2"))
    assert unbroken.returncode == 0, unbroken.stderr
    assert len(place.losses("cut")) == STEPS
    assert place.losses("cut") == pytest.approx(place.losses("unbroken"), rel=1e-5)


def test_a_launcher_that_is_killed_leaves_nothing_and_the_run_is_saved(
    place: Place, hosts: Hosts, start: Start, wait_until: Wait
) -> None:
    process = start(*place.train("orphan", *ON_BOTH, "schedule.steps=100000", "checkpoint.every_steps=null",
                                 "launch.processes=1"))  # fmt: skip
    wait_until(lambda: place.step("orphan") >= 3)
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: not hosts.pids(0) and not hosts.pids(1), seconds=30,
               what=lambda: f"left behind: {hosts.pids(0)} {hosts.pids(1)}")  # fmt: skip
    saved = sorted((place.directory / "runs/orphan/checkpoints").glob("step_*/manifest.json"))
    assert json.loads(saved[-1].read_text())["step"] == place.step("orphan")


def test_a_host_that_ssh_does_not_reach_is_told_at_once(
    place: Place, hosts: Hosts, start: Start, wait_until: Wait
) -> None:
    hosts.cut()
    since = time.monotonic()
    try:
        process = start(*place.train("unreached", *ON_BOTH, "launch.processes=1"))
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        hosts.join()
    assert process.returncode == 2
    assert "node2" in errors
    assert "no sshd answers there" in errors
    assert time.monotonic() - since < 60
    wait_until(lambda: not hosts.pids(0), seconds=30, what=lambda: f"still waits: {hosts.pids(0)}")
