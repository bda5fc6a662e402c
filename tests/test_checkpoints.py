"""Checkpoints of whole runs: certificates that do not hold, saves that fail, kills at any moment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_end_to_end import environment, losses, metrics, place, run

from moetrain.checkpoint import state, store
from moetrain.checkpoint.state import Fragment
from moetrain.cli import main as cli

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.slow
ALONE = ["launch.processes=1", "batch.micro_batch=8", "checkpoint.keep=9", "schedule.steps=12"]


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run of one process, saved at 5, 10 and 12."""
    done = run(place, "trained", *ALONE, "checkpoint.keep_best=1", "evaluate.every_steps=10")
    assert done.returncode == 0, done.stderr
    return place / "runs/trained"


def copy_of(trained: Path, name: str, *, newest: int) -> Path:
    """Another run directory with the same checkpoints, up to a step; run.yaml may say something else later."""
    copy = Path(shutil.copytree(trained, trained.with_name(name), ignore=shutil.ignore_patterns("run.yaml")))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= newest))
    for directory in store.whole_checkpoints(copy / "checkpoints"):
        if int(directory.name.removeprefix("step_")) > newest:
            shutil.rmtree(directory)
    return copy


def tensor_of(directory: Path, name: str) -> torch.Tensor:
    numel = state.read_index(directory).state_dict_metadata[name].size.numel()
    found = torch.zeros(numel)
    state.load(directory, [Fragment(name, found, 0, numel)], group=None)
    return found


def change_manifest(directory: Path, **changes: Any) -> None:
    path = directory / store.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_two_experts(directory: Path) -> None:
    """Their weights trade places in the file, whose digest is made to fit: as a faulty reshard would leave it."""
    names = [f"blocks.0.feed_forward.experts.{each}/fp32" for each in ("w_in", "w_out")]
    for name in names:
        tensor = tensor_of(directory, name)
        raw, size = tensor.numpy().tobytes(), tensor.numel() // 4  # 4 experts
        (shard,) = (each for each in directory.glob("*.distcp") if raw in each.read_bytes())
        content = bytearray(shard.read_bytes())
        at, expert = content.index(raw), 4 * size
        content[at : at + 2 * expert] = raw[expert : 2 * expert] + raw[:expert]
        shard.write_bytes(content)
        assert torch.equal(tensor_of(directory, name)[:size], tensor[size : 2 * size])
    files = [store.digest_file(path) for path in directory.iterdir() if path.name != store.MANIFEST]
    change_manifest(directory, files=[vars(each) for each in files])
    store.verify(directory)


def test_swapped_experts_are_refused_though_every_digest_is_right_and_trust_overrides(place, trained):
    copy = copy_of(trained, "swapped", newest=10)
    swap_two_experts(copy / "checkpoints/step_00000010")
    done = run(place, "swapped", *ALONE)
    assert done.returncode == 2
    assert "step_00000010 does not resume as it was saved: the probe loss is" in done.stderr
    assert "resume.trust=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert "next batch" not in done.stderr
    trusted = run(place, "swapped", *ALONE, "resume.trust=true")
    assert trusted.returncode == 0, trusted.stderr
    assert "going on all the same (resume.trust)" in trusted.stdout
    assert losses(place, "swapped")[:10] == losses(place, "trained")[:10]
    assert losses(place, "swapped")[10:] != losses(place, "trained")[10:]


def test_another_order_of_the_data_is_refused_though_the_manifest_knows_nothing_of_it(place, trained):
    copy = copy_of(trained, "seeded", newest=10)
    newest = copy / "checkpoints/step_00000010"
    change_manifest(newest, seed=77, run=store.read_manifest(newest).run | {"seed": 77})
    done = run(place, "seeded", *ALONE, "seed=77")
    assert done.returncode == 2
    assert "the next batch has the digest" in done.stderr
    assert "the random generator of the next step has the digest" in done.stderr
    assert "the probe loss" not in done.stderr


def test_the_certificate_holds_on_another_layout(place, trained):
    copy_of(trained, "moved", newest=10)
    done = run(place, "moved", *ALONE, "launch.processes=2", "batch.micro_batch=2", "parallel.zero_stage=2",
               "model.dtype=bf16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout


class TestTheDoctorTakesTheCertificateAgain:
    @pytest.fixture
    def doctor(self, place, monkeypatch, capsys) -> Callable[..., tuple[int, dict[str, Any]]]:
        """Directory, flags -> exit code and the check of the certificate; every other check has passed."""
        monkeypatch.chdir(place)

        def ask(directory: Path, *flags: str) -> tuple[int, dict[str, Any]]:
            code = cli.main(["checkpoint", "doctor", str(directory), *flags, "--json"])
            *others, last = json.loads(capsys.readouterr().out)["checks"]
            assert [each["name"] for each in others if each["passed"] is False] == []
            assert last["name"] == "certificate"
            return code, last

        return ask

    def test_it_holds(self, doctor, trained):
        code, found = doctor(trained)
        assert (code, found["passed"]) == (0, True)

    def test_it_sees_experts_that_traded_places(self, doctor, trained):
        copy = copy_of(trained, "traded", newest=10)
        swap_two_experts(copy / "checkpoints/step_00000010")
        code, found = doctor(copy)
        assert (code, found["passed"]) == (1, False)
        # so small a model says nearly the same, but sends its tokens elsewhere
        assert "in MoE layer 1" in found["detail"]
        assert "are not those that were saved" in found["detail"]
        code, found = doctor(copy, "--no-certificate")
        assert (code, found["passed"]) == (0, None)

    def test_it_sees_another_seed(self, doctor, trained):
        newest = copy_of(trained, "sown", newest=10) / "checkpoints/step_00000010"
        change_manifest(newest, seed=77, run=store.read_manifest(newest).run | {"seed": 77})
        code, found = doctor(newest)
        assert (code, found["passed"]) == (1, False)
        assert "the next batch has the digest" in found["detail"]
        assert "the probe loss" not in found["detail"]

    def test_without_the_data_it_is_not_held(self, doctor, trained):
        newest = copy_of(trained, "alone", newest=10) / "checkpoints/step_00000010"
        settings = store.read_manifest(newest).run
        change_manifest(newest, run=settings | {"data": settings["data"] | {"prepared": "elsewhere"}})
        code, found = doctor(newest)
        assert (code, found["passed"]) == (0, None)
        assert found["detail"].startswith(
            "it needs the data of the run: the prepared directory elsewhere does not exist"
        )


def test_a_checkpoint_knows_the_held_out_loss_of_its_step_alone(trained):
    manifests = {m.step: m for m in map(store.read_manifest, store.whole_checkpoints(trained / "checkpoints"))}
    assert sorted(manifests) == [5, 10, 12]
    evaluated = [line for line in metrics(trained.parent.parent, "trained") if "held_out_loss" in line]
    assert (manifests[5].held_out_loss, manifests[12].held_out_loss) == (None, None)
    assert manifests[10].held_out_loss == evaluated[0]["held_out_loss"]
    assert evaluated[0]["step"] == 10


@pytest.mark.parametrize("how", ["go_on", "stop"])
def test_a_save_that_fails_ends_the_run_or_not_as_the_user_says(place, trained, how):
    name = f"fails_{how}"
    in_the_way = place / f"runs/{name}/checkpoints/step_00000005.partial"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file where a directory must be")
    done = run(place, name, *ALONE, f"checkpoint.on_failure={how}", f"checkpoint.asynchronous={how == 'stop'}")
    steps = [int(path.name.removeprefix("step_")) for path in store.whole_checkpoints(in_the_way.parent)]
    assert "Traceback" not in done.stderr
    if how == "go_on":
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("warning: step 5 is not saved") == 1
        assert "File exists" in done.stdout
        assert steps == [10, 12]
        assert losses(place, name) == losses(place, "trained")
    else:
        assert done.returncode == 2
        assert "could not be written" in done.stderr
        assert "File exists" in done.stderr
        assert steps == []
        reached = metrics(place, name)[-1]["step"]
        assert reached < 10, "it does not train on for long"


def test_killed_at_any_moment_nothing_is_lost(place):
    script = Path(__file__).parent.parent / "scripts/torture.py"
    line = [sys.executable, str(script), "--rounds", "2", "--directory", str(place / "torture"), "--seed", "5"]
    done = subprocess.run(line, env=environment(place), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout
    assert "bit-equal" in done.stdout
