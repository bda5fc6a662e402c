"""A sweep on two hosts: each run on both, or two runs at a time on one each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from cluster.conftest import LIMIT_SECONDS, Place
from cluster.two_hosts import ADDRESSES, NAMES, Hosts

pytestmark = pytest.mark.cluster

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(hosts: Hosts, place: Place) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        started.append(hosts.start(0, words, environment=place.environment, cwd=place.directory))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("name", "words", "used"),
    [
        ("in_turn", [f"launch.hosts=[{','.join(NAMES)}]", f"launch.master_addr={ADDRESSES[0]}", "jobs=1"],
         {"".join(f"{host} slots=1\n" for host in NAMES)}),
        # names of nodes that meet each other must be known to all: here they are addresses
        ("shared", [f"launch.hosts=[{','.join(ADDRESSES)}]", "jobs=2"], {f"{host} slots=1\n" for host in ADDRESSES}),
    ],
    ids=["in_turn", "shared"],
)  # fmt: skip
def test_a_grid_on_two_hosts(place: Place, start: Start, name: str, words: list[str], used: set[str]) -> None:
    train = place.train("each", "launch=hostfile", "launch.interface=eth0", "launch.processes=1", *words,
                        "schedule.steps=5", "checkpoint.every_steps=null", "parallel.expert_parallel=1")  # fmt: skip
    process = start(*train[:3], "sweep", f"name={name}", "optim.weight_decay=0.1,0.2", *train[5:])
    output, errors = process.communicate(timeout=3 * LIMIT_SECONDS)
    assert process.returncode == 0, output + errors
    assert "2 runs: 2 done" in output
    assert {path.read_text() for path in (place.directory / "sweeps" / name).glob("runs/*/launch/hostfile")} == used
