"""Hosts reached by ssh: the deepspeed launcher starts one agent on each, the agents start the ranks.

DeepSpeed's launcher alone would start the ranks itself. It then leaves the ranks of the other hosts running when one
dies, gives a rank 30 s to save, and hands the environment over on a command line; so it starts one agent per host
(``slots=1``), and what is to be done travels by a file in RUN_DIR/launch. docs/launch.md has the measurements.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import LaunchError
from moetrain.launch.local import WORKER, Outcome
from moetrain.launch.nodes import agent
from moetrain.launch.nodes.conduct import conduct, make_spec
from moetrain.launch.nodes.environment import handed_over, of_launcher
from moetrain.launch.nodes.hosts import hosts_of
from moetrain.launch.nodes.spec import SPEC_FILE, in_a_word, launch_directory

_NODE_VARIABLE = {"pdsh": "RANK", "openmpi": "OMPI_COMM_WORLD_RANK", "mpich": "RANK", "slurm": "SLURM_PROCID"}
# what DeepSpeed and the runners set for the one process of a node; CUDA_VISIBLE_DEVICES would hide all GPUs but one
_DROPPED = ("CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
            "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


def run_hostfile(
    run_dir: Path, launch: LaunchConfig, *, module: str = WORKER, on_poll: Callable[[], None] = lambda: None
) -> Outcome:
    """Run a module as one process for each rank on the hosts of ``launch``; as ``start.start``."""
    names = [host.name for host in hosts_of(launch)]
    spec = make_spec(
        run_dir,
        replace(launch, nodes=len(names)),
        module=module,
        hosts=names,
        master_addr=launch.master_addr or names[0],
        environment=handed_over(os.environ, export=launch.export or []),
        node_variable=_NODE_VARIABLE[launch.runner],
        dropped=_DROPPED,
    )
    place = launch_directory(run_dir.resolve())
    place.mkdir(parents=True, exist_ok=True)
    hostfile = place / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names), encoding="utf-8")
    command = deepspeed_command(launch, hostfile=hostfile, spec_file=place / SPEC_FILE, master_addr=spec.master_addr)
    return conduct(spec, command, environment=of_launcher(os.environ), on_poll=on_poll)


def deepspeed_command(launch: LaunchConfig, *, hostfile: Path, spec_file: Path, master_addr: str) -> list[str]:
    """The command of the deepspeed launcher.

    Raises:
        LaunchError: the interpreter or the package lies where DeepSpeed's unquoted shell line would not find it.
    """
    script = str(Path(agent.__file__).resolve())
    for path in (sys.executable, script):
        if not re.fullmatch(r"[\w@%+=:,./-]+", path, re.ASCII):
            raise LaunchError(
                f"'{path}' goes into a shell line of the deepspeed launcher, which does not quote it: move the virtual "
                "environment to a path without spaces and signs of a shell"
            )
    # a script and not --module: the slurm runner does not know it, and the mpich runner mixes it up with its helper
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--force_multi",
             "--launcher", launch.runner, "--no_local_rank", "--master_addr", master_addr]  # fmt: skip
    if launch.runner == "slurm":
        words.append("--no_ssh_check")  # srun needs no ssh, which many clusters do not have between nodes
    if launch.ssh_port is not None:
        words += ["--ssh_port", str(launch.ssh_port)]
    if launch.runner_args:
        words.append(f"--launcher_args={shlex.join(launch.runner_args)}")
    return [*words, script, in_a_word(spec_file)]
