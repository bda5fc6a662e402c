"""The other launchers that the deepspeed launcher offers: mpirun over ssh, srun inside an allocation."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from cluster.conftest import LIMIT_SECONDS, Place
from cluster.test_slurm import interface
from cluster.two_hosts import ADDRESSES, NAMES, Hosts
from cluster.two_node_slurm import NODES, Slurm

pytestmark = pytest.mark.cluster

RUN = ["launch=hostfile", "launch.processes=1", "parallel.expert_parallel=2", "schedule.steps=6",
       "checkpoint.every_steps=null", "preflight=skip"]  # fmt: skip


def test_mpirun_starts_the_nodes(place: Place, hosts: Hosts, wait_until: Callable[..., None]) -> None:
    if shutil.which("ompi_info") is None:
        pytest.skip("needs OpenMPI: apt-get install openmpi-bin")
    words = place.train("mpirun", *RUN, f"launch.hosts=[{','.join(NAMES)}]", "launch.runner=openmpi",
                        f"launch.master_addr={ADDRESSES[0]}", "launch.interface=eth0")  # fmt: skip
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = hosts.start(0, words, environment=place.environment | as_root, cwd=place.directory)
    wait_until(lambda: hosts.pids(1) or process.poll() is not None)
    there = hosts.pids(1)
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, errors
    assert there, "nothing ran on the other host"
    assert place.step("mpirun") == 6


def test_srun_starts_the_nodes_of_an_allocation(place: Place, slurm: Slurm) -> None:
    words = place.train("allocated", *RUN, f"launch.hosts=[{','.join(NODES)}]", "launch.runner=slurm",
                        "launch.master_addr=127.0.0.1", f"launch.interface={interface()}")  # fmt: skip
    done = place.call("salloc", "--nodes=2", "--ntasks-per-node=1", *words, **slurm.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.step("allocated") == 6
