"""One entry for every launcher: the processes of a run, on whatever ``launch.kind`` names.

local        launch/local.py         processes on this machine
hostfile     nodes/hostfile.py       one agent on each host, through the deepspeed launcher; the agents start the ranks
slurm        cluster/slurm.py        a job; inside it one agent on each node, through srun
kubernetes   cluster/kubernetes.py   a manifest; in it one agent in each pod
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from moetrain.config.launch.settings import LaunchConfig
from moetrain.launch.cluster import kubernetes, slurm
from moetrain.launch.local import WORKER, Outcome, run_local
from moetrain.launch.machine.ranks import Order
from moetrain.launch.nodes.hostfile import run_hostfile
from moetrain.launch.nodes.hosts import hosts_of
from moetrain.launch.nodes.spec import requested


def start(
    run_dir: Path,
    launch: LaunchConfig,
    *,
    module: str = WORKER,
    in_job: bool = False,
    on_poll: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run ``python -m MODULE RUN_DIR`` as one process for each rank, on every node, and wait for all of them.

    Each has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (the processes of a node), MASTER_ADDR and MASTER_PORT in
    its environment, and leaves its error with ``parallel.lifeline.write_error``. Hold the run directory's ``RunLock``,
    and call it from the main thread.

    Args:
        run_dir: where run.yaml lies; on several nodes, in a file system that all of them share.
        launch: resolved: nodes and processes are numbers.
        module: what each rank runs.
        in_job: we are the SLURM job that ``launch`` asks for, on its first node.
        on_poll: called about ten times a second meanwhile.

    Returns:
        How it ended; ``queued`` is not empty where it is only handed over: a run to slurm outside a job, or to
        kubernetes. Another module than the run's own waits for the job.

    Raises:
        LaunchError: a rank failed; NodeLost: a node is gone. The culprit's error alone.
        MoetrainError: a rank met a fault that the user can mend.
    """
    if launch.kind == "slurm" and not in_job:
        return slurm.submit(run_dir, launch) if module == WORKER else slurm.run_as_job(run_dir, launch, module=module)
    if launch.kind == "kubernetes":
        return kubernetes.write(run_dir, launch, module=module)
    if launch.kind == "hostfile":
        return run_hostfile(run_dir, launch, module=module, on_poll=on_poll)
    if launch.kind == "slurm":
        return slurm.run_in_job(run_dir, launch, module=module, on_poll=on_poll)
    return run_local(
        run_dir,
        processes=launch.processes or 1,
        command=[sys.executable, "-m", module, str(run_dir)],
        bind_cores=launch.bind_cores,
        order=_once_a_second(lambda: requested(run_dir)),
        on_poll=on_poll,
    )


def handed_over(run_dir: Path, launch: LaunchConfig) -> str:
    """What ``start`` would give to SLURM or Kubernetes; empty for launchers that start processes themselves."""
    if launch.kind == "slurm":
        return slurm.run_script(run_dir, launch)
    if launch.kind == "kubernetes":
        return kubernetes.manifest_text(run_dir, launch)
    return ""


def node_names(launch: LaunchConfig, *, in_job: bool = False) -> list[str]:
    """What the launcher calls the nodes, in order; empty: it has no names for them here."""
    if launch.kind == "hostfile":
        return [host.name for host in hosts_of(launch)]
    return slurm.nodes_of_job(launch) if launch.kind == "slurm" and in_job else []


def _once_a_second(ask: Callable[[], Order]) -> Callable[[], Order]:
    last, asked = Order.GO_ON, 0.0

    def order() -> Order:
        nonlocal last, asked
        if time.monotonic() > asked + 1.0:
            last, asked = ask(), time.monotonic()
        return last

    return order
