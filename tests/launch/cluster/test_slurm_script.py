"""The script of a job, and the process in it that puts the job back into the queue."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import moetrain
from moetrain.config.launch.settings import LaunchConfig, SlurmConfig
from moetrain.launch.cluster.slurm import Array, array_script, run_script

LAUNCH = LaunchConfig(kind="slurm", nodes=4, processes=8)


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_script_asks_for_what_the_settings_say(tmp_path: Path) -> None:
    slurm = SlurmConfig(partition="gpu", account="me", qos="long", time="1-00:00:00", save_seconds=600, memory="900G",
                        cpus_per_node=96, extra=["--exclusive"], setup=["module load cuda"])  # fmt: skip
    script = run_script(tmp_path / "run", LaunchConfig(kind="slurm", nodes=4, processes=8, slurm=slurm))
    for option in ("--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96", "--mem=900G",
                   "--partition=gpu", "--account=me", "--qos=long", "--time=1-00:00:00", "--signal=B:USR1@600",
                   "--requeue", "--open-mode=append", "--exclusive", "--job-name=run"):  # fmt: skip
        assert option in options(script), option
    assert script.index("#SBATCH --exclusive") < script.index("module load cuda") < script.index("exec ")


def test_what_is_not_set_is_left_to_the_cluster(tmp_path: Path) -> None:
    script = run_script(tmp_path / "run", LaunchConfig(kind="slurm", nodes=1, processes=2,
                                                       slurm=SlurmConfig(gpus_per_node=0, requeue=False)))  # fmt: skip
    names = {option.partition("=")[0] for option in options(script)}
    assert not names & {"--gpus-per-node", "--partition", "--account", "--qos", "--time", "--mem", "--cpus-per-task"}
    assert "--no-requeue" in options(script)
    assert "--no-requeue" in shlex.split(script.splitlines()[-1])


def test_the_script_of_an_array_asks_for_the_same_of_every_command(tmp_path: Path) -> None:
    slurm = SlurmConfig(partition="gpu", setup=["module load cuda"])
    array = Array(directory=tmp_path / "array", slurm=slurm, name="a b", nodes=2, gpus=4, at_once=3, retries=1)
    script = array_script(10, array)
    for option in ("--array=0-9%3", "--job-name=a_b", "--nodes=2", "--gpus-per-node=4", "--partition=gpu"):
        assert option in options(script), option
    words = shlex.split(script.splitlines()[-1])
    assert words[-5:] == ["--retries", "1", "--array", str(tmp_path / "array" / "commands.json"), "--"]
    plain = array_script(10, Array(directory=tmp_path, slurm=SlurmConfig(), name="a"))
    assert "--array=0-9" in options(plain)
    assert "--retries" not in plain


def test_odd_names_reach_the_command_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / 'it\'s a $(touch hacked) "run" %j'
    odd.mkdir()
    monkeypatch.chdir(odd)
    script = run_script(odd / "run", LAUNCH)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    words = shlex.split(script.splitlines()[-1])
    assert str(odd / "run") in words
    # what bash makes of the last lines, with the command only printed
    lines = [line for line in script.splitlines() if not line.startswith("#SBATCH")]
    lines[-1] = lines[-1].replace("exec ", "printf '%s\\n' ", 1)
    told = subprocess.run(["bash"], input="\n".join(lines), text=True, capture_output=True, cwd=tmp_path, check=True)
    assert str(odd / "run") in told.stdout.splitlines()
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 75), (3, 3)])
def test_without_a_warning_nothing_is_requeued(code: int, expected: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moetrain.launch.cluster.job", "--", sys.executable, "-c", f"raise SystemExit({code})"],
        env=os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parents[1]), "SLURM_JOB_ID": "1", "PATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", "")
