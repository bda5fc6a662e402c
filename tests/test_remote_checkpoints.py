"""A run that saves to a real S3 server, loses its machine, and goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3_server import BUCKET, serve
from test_end_to_end import STEPS, losses, place, run

from moetrain.checkpoint import store

__all__ = ["place"]  # a fixture


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
    remote = [f"checkpoint.remote=s3://{BUCKET}/runs/lost"]
    unbroken = run(place, "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    first = run(place, "lost", *remote, "schedule.steps=20", "schedule.decay_steps=null")
    assert first.returncode == 0, first.stderr
    assert "warning" not in first.stdout
    assert steps_at(remote[0].partition("=")[2]) == ["step_00000015", "step_00000020"]
    before = losses(place, "lost")
    shutil.rmtree(place / "runs/lost")
    again = run(place, "lost", *remote)
    assert again.returncode == 0, again.stderr
    assert f"copying s3://{BUCKET}/runs/lost/step_00000020 to runs/lost/checkpoints" in again.stdout
    assert "resumed from" in again.stdout
    assert len(before) == 20
    assert len(losses(place, "lost")) == STEPS - 20
