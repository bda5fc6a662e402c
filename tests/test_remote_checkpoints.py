"""A run that saves to a real S3 server, loses its machine, and goes on from there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from s3_server import BUCKET, serve
from test_end_to_end import environment, final, losses, place, run, start, wait_for_step, workers

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.slow
ALONE = ["launch.processes=1", "batch.micro_batch=8", "schedule.steps=12"]


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with serve() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()
        yield environment


def steps_at(url: str) -> list[str]:
    files, path = fsspec.url_to_fs(url)
    files.invalidate_cache()
    return sorted(each.split("/")[-2] for each in files.glob(f"{path}/step_*/manifest.json"))


def test_a_run_whose_machine_is_lost_goes_on_from_its_copy_with_equal_losses(place: Path, s3):
    unbroken = run(place, "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    url = f"s3://{BUCKET}/runs/lost"
    process = start(place, "lost", f"checkpoint.remote={url}")
    wait_for_step(place, "lost", 12, process)
    process.kill()  # its ranks die with it
    process.communicate()
    wait_until_gone(place, "lost")
    newest = int(steps_at(url)[-1].removeprefix("step_"))
    assert newest >= 5
    shutil.rmtree(place / "runs/lost")
    again = run(place, "lost", f"checkpoint.remote={url}")
    assert again.returncode == 0, again.stderr
    assert f"copying {url}/step_{newest:08d} to runs/lost/checkpoints" in again.stdout
    assert f"at step {newest}" in again.stdout
    assert losses(place, "lost") == losses(place, "unbroken")[newest:]
    assert final(place, "lost")["held_out_loss"] == final(place, "unbroken")["held_out_loss"]
    assert steps_at(url) == ["step_00000020", "step_00000024"]
    listed = subprocess.run(
        [sys.executable, "-m", "moetrain.cli", "checkpoint", "ls", "runs/lost", "--remote"],
        cwd=place, env=environment(place), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.findall(r"^copied: (\S+) \(\d", listed.stdout, flags=re.MULTILINE) == [
        f"{url}/step_00000020", f"{url}/step_00000024"
    ]  # fmt: skip
    other = run(place, "other", f"checkpoint.remote={url}", "seed=5")
    assert other.returncode == 2
    assert f"{url}/step_00000024 has seed" in other.stderr
    assert "another checkpoint.remote" in other.stderr
    assert not (place / "runs/other/checkpoints").exists()


def wait_until_gone(place: Path, name: str) -> None:
    deadline = time.monotonic() + 30
    while workers(place, name):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["stop", "go_on"])
def test_copies_that_fail_are_told_and_the_same_command_makes_up_for_them(place: Path, s3, how: str):
    name, bucket = f"gone_{how}", f"gone-{how.replace('_', '-')}"
    settings = [f"checkpoint.remote=s3://{bucket}/run", f"checkpoint.on_failure={how}", *ALONE, "schedule.steps=150",
                "checkpoint.every_steps=25", "evaluate.every_steps=null"]  # fmt: skip
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    process = start(place, name, *settings)
    remove_after_the_first_copy(client, bucket)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    # the terminal's lines end where they are full
    told = re.findall(
        r"warning: step (\d+) is saved, but not all copies are; the next save tries again: "
        rf"rank 0: s3://{bucket}/run/\S+ cannot be written: \w+: The specified bucket does not exist",
        " ".join(output.split()),
    )
    assert told, output
    assert told[-1] == "150", "training went on to its end"
    said = errors if how == "stop" else output
    assert f"checkpoints of runs/{name} are saved, but their copies are not: s3://{bucket}/run" in said
    assert process.returncode == (2 if how == "stop" else 0)
    if how == "go_on":
        return
    client.create_bucket(Bucket=bucket)
    again = run(place, name, *settings)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    assert steps_at(f"s3://{bucket}/run") == ["step_00000125", "step_00000150"]


def remove_after_the_first_copy(client: Any, bucket: str) -> None:
    """As somebody may who tidies up: the bucket goes while the run is at work."""
    deadline = time.monotonic() + 60
    while not any(each["Key"].endswith("manifest.json") for each in contents(client, bucket)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while True:
        for each in contents(client, bucket):
            client.delete_object(Bucket=bucket, Key=each["Key"])
        try:
            client.delete_bucket(Bucket=bucket)
            return
        except client.exceptions.ClientError:  # another file has come meanwhile
            assert time.monotonic() < deadline


def contents(client: Any, bucket: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return found


def test_a_bucket_that_is_not_there_ends_the_run_before_it_begins(place: Path, s3):
    done = run(place, "nowhere", *ALONE, "checkpoint.remote=s3://nobody/runs/a")
    assert done.returncode == 2
    assert "s3://nobody/runs/a cannot be" in done.stderr
    assert "The specified bucket does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "runs/nowhere/run.yaml").exists()
