"""The main job with real processes: train, be killed, resume; other layouts; ranks that die; disks that fill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.freeze import read_run
from moetrain.plan.memory.device import memory_of
from moetrain.plan.published import layout_of
from moetrain.sources.text import expand, read_documents

pytestmark = pytest.mark.slow

STEPS = 24
SETTINGS = [
    "model.vocab_size=512", "model.context=32", "model.num_layers=2", "model.d_model=32", "model.num_heads=2",
    "model.d_ff=64", "model.moe.d_expert=32", "model.moe.num_experts=4", "batch.global_batch=8", "batch.micro_batch=4",
    f"schedule.steps={STEPS}", "schedule.warmup_steps=4", "optim.lr=3e-3", "checkpoint.every_steps=5",
    "evaluate.every_steps=8", "evaluate.max_sequences=16", "log.every_steps=4", "log.wandb=off", "launch.processes=2",
]  # fmt: skip
LIMIT_SECONDS = 150


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small corpus of real text."""
    place = tmp_path_factory.mktemp("place")
    documents = read_documents(expand(["builtin:sotu"]), text_column="text")
    rows = [json.dumps({"text": next(documents)[:3000]}) for _ in range(30)]
    (place / "corpus.jsonl").write_text("\n".join(rows))
    return place


def command(name: str, *overrides: str, verb: str = "train") -> list[str]:
    return [sys.executable, "-m", "moetrain.cli", verb, "data.text=corpus.jsonl", "data.held_out=0.2",
            f"name={name}", *SETTINGS, *overrides]  # fmt: skip


def environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "TORCH_EXTENSIONS_DIR": str(place / "torch_extensions"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }


def run(place: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(name, *overrides), cwd=place, env=environment(place), capture_output=True, text=True,
                          timeout=LIMIT_SECONDS)  # fmt: skip


def start(place: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(name, *overrides), cwd=place, env=environment(place), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def metrics(place: Path, name: str) -> list[dict[str, Any]]:
    path = place / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(place: Path, name: str) -> list[float]:
    return [loss for line in metrics(place, name) for loss in line.get("step_losses", [])]


def final(place: Path, name: str) -> dict[str, Any]:
    return next(line for line in reversed(metrics(place, name)) if line.get("final"))


def wait_for_step(place: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not any(line["step"] >= step for line in metrics(place, name)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def workers(place: Path, name: str) -> dict[int, int]:
    """Rank -> process id of the workers of a run, read from /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            where = Path(os.readlink(entry / "cwd"))
        except OSError:
            continue
        if b"moetrain.train.worker" in words and where == place and f"runs/{name}".encode() in words:
            rank = next(each for each in variables if each.startswith(b"RANK="))
            found[int(rank.split(b"=")[1])] = int(entry.name)
    return found


@pytest.fixture(scope="module")
def unbroken(place: Path) -> subprocess.CompletedProcess[str]:
    """A run that nothing disturbed."""
    done = run(place, "unbroken")
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_learns_and_says_what_it_reached(place, unbroken):
    assert losses(place, "unbroken")[-1] < losses(place, "unbroken")[0] - 0.5
    assert len(losses(place, "unbroken")) == STEPS
    for text in ("is finished", "bits per byte", "byte trigram", "xz -9e", "fullest expert", "a sample", "next",
                 "moetrain sample runs/unbroken"):  # fmt: skip
        assert text in unbroken.stdout
    assert "Traceback" not in unbroken.stdout + unbroken.stderr
    for file in ("run.yaml", "origin.json", "loss.png", "expert_load.png", "checkpoints/step_00000024/manifest.json"):
        assert (place / "runs/unbroken" / file).is_file()


def test_a_run_holds_the_plan_against_what_it_measures(place, unbroken):
    told = json.loads((place / "runs" / "unbroken" / "plan.json").read_text())
    settings = read_run(place / "runs" / "unbroken")
    memory = memory_of(settings.model, layout_of(settings), sequence_length=32, device="cpu").total
    pace = [line["tokens_per_second"] for line in metrics(place, "unbroken") if "tokens_per_second" in line]
    assert told["memory_bytes"] == memory
    assert told["measured_step_seconds"] == pytest.approx(8 * 32 / statistics.median(pace[1:3]))
    for text in (f"planned for cpu {told['step_seconds']:,.3g} s", f"measured {told['measured_step_seconds']:,.3g} s",
                 f"planned {memory / 1e9:,.2f} GB of tensors, resident at most"):  # fmt: skip
        assert text in " ".join(unbroken.stdout.split())


def test_a_finished_run_is_not_trained_again(place, unbroken):
    before = metrics(place, "unbroken")
    again = run(place, "unbroken")
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert metrics(place, "unbroken") == before


def test_a_run_killed_half_way_ends_with_the_same_losses_bit_for_bit(place, unbroken):
    for kill_at in (9, 17):
        process = start(place, "killed")
        wait_for_step(place, "killed", kill_at, process)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 10
        while workers(place, "killed"):
            assert time.monotonic() < deadline, "workers outlive their launcher"
            time.sleep(0.05)
    done = run(place, "killed")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert losses(place, "killed") == losses(place, "unbroken")
    assert final(place, "killed")["held_out_loss"] == final(place, "unbroken")["held_out_loss"]


def test_one_rank_gives_the_losses_of_two(place):
    longer = ["schedule.steps=50", "checkpoint.every_steps=null", "evaluate.every_steps=null"]
    for name, own in (("two", []), ("one", ["launch.processes=1", "batch.micro_batch=8"])):
        done = run(place, name, *longer, *own)
        assert done.returncode == 0, done.stderr
    assert len(losses(place, "one")) == 50
    assert losses(place, "one") == pytest.approx(losses(place, "two"), rel=1e-5)
    assert final(place, "one")["held_out_loss"] == pytest.approx(final(place, "two")["held_out_loss"], rel=1e-5)


def test_a_rank_that_dies_takes_the_run_down_within_seconds_and_is_named(place):
    process = start(place, "dies", "schedule.steps=100000", "checkpoint.every_steps=null")
    wait_for_step(place, "dies", 4, process)
    os.kill(workers(place, "dies")[1], signal.SIGKILL)
    since = time.monotonic()
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert time.monotonic() - since < 15
    assert process.returncode == 2
    assert "rank 1" in errors
    assert "SIGKILL" in errors
    assert "Traceback" not in errors
    assert not workers(place, "dies")


def test_a_request_to_stop_saves_and_the_same_command_goes_on(place, unbroken):
    process = start(place, "stopped")
    wait_for_step(place, "stopped", 4, process)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 75, errors
    assert "saved at step" in output
    assert "stopped on request; the same command goes on" in output
    done = run(place, "stopped")
    assert done.returncode == 0, done.stderr
    assert losses(place, "stopped") == losses(place, "unbroken")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(place, unbroken):
    process = start(place, "damaged")
    wait_for_step(place, "damaged", 17, process)
    process.kill()
    process.communicate()
    newest = sorted((place / "runs/damaged/checkpoints").glob("step_????????"))[-1]
    shard = sorted(newest.glob("*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run(place, "damaged")
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is damaged" in done.stdout
    assert losses(place, "damaged") == losses(place, "unbroken")


def test_a_run_directory_can_be_moved_and_sampled_from(place, unbroken, tmp_path):
    shutil.copytree(place / "runs/unbroken", tmp_path / "elsewhere")
    line = [sys.executable, "-m", "moetrain.cli", "sample", "run_dir=elsewhere", "prompt=Fellow", "max_tokens=5"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(place), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Fellow")


def test_a_run_begins_where_another_one_has_ended(place, unbroken):
    """With a learning rate of next to nothing it stays there."""
    overrides = ("init.weights=runs/unbroken", "schedule.steps=1", "schedule.warmup_steps=0", "optim.lr=1e-12")
    done = run(place, "begun", *overrides, "parallel.expert_parallel=1")
    assert done.returncode == 0, done.stderr
    assert "weights from runs/unbroken/checkpoints/" in done.stdout
    held_out = [final(place, name)["held_out_loss"] for name in ("begun", "unbroken")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-6)


def test_text_that_changed_since_the_checkpoint_is_refused(place, unbroken):
    """Its tokens would come in another order, and with another tokenizer mean something else."""
    corpus = place / "corpus.jsonl"
    was = corpus.read_text()
    try:
        corpus.write_text(was.replace("the", "THE"))
        done = run(place, "unbroken", f"schedule.steps={STEPS + 2}")
    finally:
        corpus.write_text(was)
    assert done.returncode == 2
    assert "was trained on other data: training text, held-out text, tokenizer has changed since" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_of_another_model_is_refused_even_without_its_run_file(place, unbroken):
    copy = place / "runs/foreign"
    shutil.copytree(place / "runs/unbroken", copy)
    (copy / "run.yaml").unlink()
    (copy / "metrics.jsonl").unlink()
    done = run(place, "foreign", "model.rope_theta=77", f"schedule.steps={STEPS + 2}")
    assert done.returncode == 2
    assert "has model.rope_theta 10000.0, the run 77.0" in done.stderr


def test_weights_and_biases_offline_is_the_default(place):
    settings = [each for each in SETTINGS if not each.startswith(("log.wandb", "schedule.steps"))]
    line = [sys.executable, "-m", "moetrain.cli", "train", "data.text=corpus.jsonl", "data.held_out=0.2",
            "name=wandb", *settings, "schedule.steps=6", "checkpoint.every_steps=null",
            "checkpoint.every_minutes=0.0001"]  # fmt: skip
    quiet = {name: value for name, value in environment(place).items() if not name.startswith("WANDB_")}
    done = subprocess.run(line, cwd=place, env=quiet | {"NETRC": str(place / "none")}, capture_output=True, text=True,
                          timeout=LIMIT_SECONDS)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((place / "runs/wandb/wandb").glob("offline-run-*/run-*.wandb"))
    # by the clock, a checkpoint was due after every step; the newest two stay
    names = sorted(path.name for path in (place / "runs/wandb/checkpoints").iterdir())
    assert names == ["step_00000005", "step_00000006"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_the_checkpoint_before_stays_whole(place):
    disk = place / "runs/full/checkpoints"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = run(place, "full", "checkpoint.keep=100", "model.d_ff=256", "model.moe.d_expert=128")
        assert done.returncode == 2
        assert "could not be written" in done.stderr
        assert "MiB are free on that disk" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in disk.glob("*")] in ([], ["step_00000005"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_token_files_of_another_vocabulary_are_refused(place, unbroken):
    prepared = next((place / "prepared").glob("corpus-*"))
    done = run(place, "mismatch", "model.vocab_size=300", f"data.prepared={prepared}")
    assert done.returncode == 2
    assert "model.vocab_size" in done.stderr
    assert "300" in done.stderr


def test_an_installed_wheel_works_in_any_directory(tmp_path):
    root = Path(__file__).parent.parent
    pytest.importorskip("build")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root)],
                   check=True, capture_output=True, timeout=LIMIT_SECONDS)  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"),
                    str(wheel)], check=True, capture_output=True, timeout=LIMIT_SECONDS)  # fmt: skip
    script = (
        "import moetrain, sys; from moetrain.cli.main import main; "
        "print(moetrain.__file__); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "config", "model=mixtral_8x7b"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
        timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "d_model: 4096" in done.stdout
    assert (tmp_path / "site/moetrain/sources/corpora/sotu.jsonl.xz").is_file()


def test_a_mixture_of_text_and_conversations_resumes_on_another_layout(place, tmp_path):
    """Two sources, two stages, masked documents, loss on what the assistant says: as the unbroken run, to rounding."""
    rows = [{"prompt": f"What comes after {n}?", "response": f"After {n} comes {n + 1}."} for n in range(60)]
    (place / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixed = [
        "data.sources={speech:{text:corpus.jsonl,weight:2},chat:{text:chat.jsonl,format:instruction,weight:1}}",
        "data.mixture=[{until:0.5},{weights:{chat:1}}]", "data.mask_documents=true", "data.held_out=0.2",
    ]  # fmt: skip

    def train(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "moetrain.cli", "train", f"name={name}", *SETTINGS, *mixed, *more]
        return subprocess.run(line, cwd=place, env=environment(place), capture_output=True, text=True,
                              timeout=LIMIT_SECONDS)  # fmt: skip

    whole = train("mixed")
    assert whole.returncode == 0, whole.stderr
    assert "speech   33.3% of the sequences" in whole.stdout
    by_source = final(place, "mixed")["held_out_loss_by_source"]
    assert set(by_source) == {"speech", "chat"}
    # from the checkpoint of step 20 on one process instead of two, with as many rows in a pass
    shutil.copytree(place / "runs" / "mixed", place / "runs" / "again")
    shutil.rmtree(place / "runs" / "again" / "checkpoints" / f"step_{STEPS:08d}")
    lines = [json.dumps(line) for line in metrics(place, "mixed") if line["step"] <= 20]
    (place / "runs" / "again" / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    again = train("again", "launch.processes=1")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    assert losses(place, "again")[20:] == pytest.approx(losses(place, "mixed")[20:], rel=1e-4)
    assert final(place, "again")["held_out_loss_by_source"] == pytest.approx(by_source, rel=1e-3)
