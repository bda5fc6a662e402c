"""SLURM: a job is submitted; inside it srun starts one agent on each node, and the agents start the ranks.

login node   sbatch  RUN_DIR/launch/job.sh                        submit
first node   python -m moetrain.launch.cluster.job -- …           passes the warning before the time limit on, requeues
               python -m moetrain.cli.running.job RUN_DIR         preflight, then the run: run_in_job for each
every node       srun python -m moetrain.launch.nodes.agent SPEC
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moetrain.config.launch.settings import LaunchConfig, SlurmConfig
from moetrain.errors import LaunchError
from moetrain.launch.local import Outcome
from moetrain.launch.nodes.conduct import conduct, make_spec
from moetrain.launch.nodes.environment import python_path
from moetrain.launch.nodes.spec import SPEC_FILE, in_a_word, launch_directory

JOB_FILE = "job.json"
"""In RUN_DIR/launch: ``{"job": "123"}``, the job that was submitted last."""

_OF_JOB = "moetrain.cli.running.job"
"""What the job of a run does on its first node."""
_COMMANDS = "commands.json"
_POLL_SECONDS = 2.0
_FIRST_PORT, _PORTS = 16_000, 16_000  # below the ports that Linux gives to outgoing connections


def submit(run_dir: Path, launch: LaunchConfig) -> Outcome:
    """Put the run into the queue.

    Raises:
        LaunchError: sbatch refuses.
    """
    job = _sbatch(_written(run_dir, run_script(run_dir, launch)))
    remember(run_dir, job)
    return Outcome(stopped=False, queued=f"SLURM job {job}")


def run_as_job(run_dir: Path, launch: LaunchConfig, *, module: str) -> Outcome:
    """Run another module as a job of the same kind, and wait until it is out of the queue; what it found lies in
    ``run_dir``. An interrupt takes the job along.

    Raises:
        LaunchError: sbatch refuses.
    """
    launch = replace(launch, slurm=replace(launch.slurm, requeue=False))
    job = _sbatch(_written(run_dir, run_script(run_dir, launch, module=module)))
    print(f"SLURM job {job}: waiting for it; Ctrl-C cancels it", flush=True)
    try:
        while state_of(job) is not None:
            time.sleep(_POLL_SECONDS)
    except BaseException:
        cancel(job)
        raise
    return Outcome(stopped=False)


def refuse_queued(run_dir: Path) -> None:
    """Let nobody change a run, or start it, while it waits in the queue.

    Raises:
        LaunchError: its job is there.
    """
    waiting = job_of(run_dir)
    state = None if waiting is None or waiting == os.environ.get("SLURM_JOB_ID") else state_of(waiting)
    if state is not None:
        raise LaunchError(
            f"{run_dir} is already SLURM job {waiting} ({state}): wait for it, or `moetrain cancel {run_dir}`"
        )


@dataclass(frozen=True, kw_only=True)
class Array:
    """A job array of many commands, each in an allocation of its own."""

    directory: Path
    """Gets the script, the commands, and a log for each; of this array alone."""
    slurm: SlurmConfig
    name: str
    """Of the job."""
    nodes: int = 1
    """For each command, which starts on the first of them."""
    gpus: int = 0
    """Of each node, where ``slurm.gpus_per_node`` is null."""
    at_once: int | None = None
    """How many run at a time; None: as many as SLURM lets."""
    retries: int = 0
    """How often a command that fails is started again in its place."""


def submit_array(commands: Sequence[Sequence[str]], array: Array) -> str:
    """Put many commands into the queue.

    One that ends with 75 after the warning before its time limit goes back into the queue by itself: `moetrain train
    … launch=local` does, and ``run_words``.

    Args:
        commands: each the words of a command; they start in the current working directory.
        array: how they run.

    Returns:
        Number of the job; its tasks are JOB_0, JOB_1, ….

    Raises:
        LaunchError: sbatch refuses.
    """
    directory = array.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    listed = directory / _COMMANDS
    listed.write_text(json.dumps([list(words) for words in commands], indent=1), encoding="utf-8")
    script = directory / "array.sh"
    script.write_text(array_script(len(commands), array), encoding="utf-8")
    return _sbatch(script)


def array_script(commands: int, array: Array) -> str:
    """The script of ``submit_array``, for so many commands."""
    directory, slurm = array.directory.resolve(), array.slurm
    limit = "" if array.at_once is None else f"%{array.at_once}"
    output = directory / "array-%A_%a.out"
    options = [
        f"--array=0-{commands - 1}{limit}",
        *_options(slurm, name=array.name, nodes=array.nodes, gpus=array.gpus, output=output),
    ]
    again = ["--retries", str(array.retries)] if array.retries else []
    return _script(options, slurm, [*_job_words(slurm), *again, "--array", str(directory / _COMMANDS), "--"])


def run_script(run_dir: Path, launch: LaunchConfig, *, module: str | None = None) -> str:
    """The script of a run's job; with a module, of one that runs only that."""
    run_dir = run_dir.resolve()
    options = _options(
        launch.slurm,
        name=run_dir.name,
        nodes=launch.nodes or 1,
        gpus=launch.processes or 1,
        output=run_dir / "log" / "slurm-%j.out",
    )
    words = run_words(run_dir) if module is None else [*run_words(run_dir), module]
    return _script(options, launch.slurm, [*_job_words(launch.slurm), "--", *words])


def run_words(run_dir: Path) -> list[str]:
    """The command that trains a run inside its job."""
    return [sys.executable, "-m", _OF_JOB, str(run_dir.resolve())]


def nodes_of_job(launch: LaunchConfig) -> list[str]:
    """The nodes of the job that we are in, as SLURM calls them; ``launch.nodes`` of them.

    Raises:
        LaunchError: it has fewer.
    """
    named = _told(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
    nodes = launch.nodes or 1
    if len(named) < nodes:
        raise LaunchError(f"launch.nodes is {nodes}, but the SLURM job has {len(named)} nodes: ask for as many")
    return named[:nodes]


def run_in_job(
    run_dir: Path, launch: LaunchConfig, *, module: str, on_poll: Callable[[], None] = lambda: None
) -> Outcome:
    """Run a module as one process for each rank on the nodes of the job that we are in; as ``start.start``."""
    job = int(os.environ["SLURM_JOB_ID"])
    hosts = nodes_of_job(launch)
    nodes = len(hosts)
    launch = replace(launch, master_port=launch.master_port or _FIRST_PORT + job % _PORTS)
    # SLURM hands our environment to every task by itself
    environment = {"PYTHONPATH": python_path(os.environ)}
    spec = make_spec(run_dir, launch, module=module, hosts=hosts, master_addr=launch.master_addr or hosts[0],
                     environment=environment, node_variable="SLURM_PROCID")  # fmt: skip
    # a step that binds its task to cores gives it one of them, unless --cpus-per-task says otherwise once more
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none",
             "--kill-on-bad-exit=0", f"--nodelist={','.join(hosts)}"]  # fmt: skip
    if "SLURM_CPUS_PER_TASK" in os.environ:
        words.append(f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}")
    spec_file = launch_directory(run_dir.resolve()) / SPEC_FILE
    words += [*(launch.runner_args or []), sys.executable, "-m", "moetrain.launch.nodes.agent", in_a_word(spec_file)]
    return conduct(spec, words, environment={**os.environ, **environment}, in_job=True, on_poll=on_poll)


def job_of(run_dir: Path) -> str | None:
    """The job that was submitted last for a run."""
    try:
        return str(json.loads((launch_directory(run_dir) / JOB_FILE).read_text(encoding="utf-8"))["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(run_dir: Path, job: str) -> None:
    """Write down which job is the run's."""
    path = launch_directory(run_dir) / JOB_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # a job of an array may have started, and writes it too
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"job": job}), encoding="utf-8")
    os.replace(partial, path)


def state_of(job: str) -> str | None:
    """What squeue says of a job (PENDING, RUNNING, …); None: it is not in the queue, or there is no SLURM here."""
    try:
        return states_of([job]).get(job)
    except LaunchError:
        return None


def states_of(jobs: Collection[str]) -> dict[str, str]:
    """What squeue says of those that are in the queue; an element of an array is JOB_TASK, or its own number.

    Raises:
        LaunchError: squeue does not answer, or is not here.
    """
    if not jobs:
        return {}
    words = ["squeue", "--noheader", "--array", "--format=%A %i %T", f"--jobs={','.join(sorted(set(jobs)))}"]
    try:
        lines = _told(words).splitlines()
    except LaunchError as error:
        if "Invalid job id" not in str(error):
            raise
        return {}  # of a single job that SLURM has forgotten
    found = {}
    for own, shown, state in (line.split()[:3] for line in lines if len(line.split()) >= 3):
        found[own] = found[shown] = state
    return {job: found[job] for job in jobs if job in found}


def cancel(job: str) -> None:
    """Take a job out of the queue, or end it."""
    _told(["scancel", job])


def _written(run_dir: Path, text: str) -> Path:
    place = launch_directory(run_dir)
    place.mkdir(parents=True, exist_ok=True)
    (run_dir / "log").mkdir(exist_ok=True)
    script = place / "job.sh"
    script.write_text(text, encoding="utf-8")
    return script


def _options(slurm: SlurmConfig, *, name: str, nodes: int, gpus: int, output: Path) -> list[str]:
    gpus = gpus if slurm.gpus_per_node is None else slurm.gpus_per_node
    told = {
        "job-name": re.sub(r"[^\w.-]", "_", name, flags=re.ASCII),
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus or None,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.save_seconds}",
        "open-mode": "append",
        "output": _quoted(output),
    }
    return [
        *(f"--{option}={value}" for option, value in told.items() if value is not None),
        "--requeue" if slurm.requeue else "--no-requeue",
        *(slurm.extra or []),
    ]


def _quoted(path: Path) -> str:
    """A path in an #SBATCH line, whose file name may hold SLURM's own patterns (%j)."""
    directory = str(path.parent).replace("%", "%%")
    text = f"{directory}/{path.name}"
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _job_words(slurm: SlurmConfig) -> list[str]:
    requeue = [] if slurm.requeue else ["--no-requeue"]
    return [sys.executable, "-m", "moetrain.launch.cluster.job", *requeue]


def _script(options: Sequence[str], slurm: SlurmConfig, body: Sequence[str]) -> str:
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), *(slurm.setup or [])]
    lines += [
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f"export PYTHONPATH={shlex.quote(python_path(os.environ))} PYTHONSAFEPATH=1",
        f"exec {shlex.join(body)}",
    ]
    return "\n".join(lines) + "\n"


def _sbatch(script: Path) -> str:
    return _told(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]


def _told(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} is not installed here: launch=slurm must be given on a node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} has not answered for 120 s: is SLURM's controller up (sinfo)?") from None
    if done.returncode:
        raise LaunchError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
