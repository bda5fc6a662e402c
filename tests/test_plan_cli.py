"""The verb plan as a user types it."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moetrain
from moetrain.cli import main as cli
from moetrain.cli.options import Options, settings
from moetrain.config.freeze import write_run

MIXTRAL = ("model=mixtral_8x7b", "cluster=h200_ib", "nodes=16", "tokens=2T", "batch.sequence_length=4096")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]):
    """The verb: exit code, what it printed, what it complained of."""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["plan", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_plan_tells_size_layouts_time_cost_and_checkpoints(plan) -> None:
    code, out, err = plan(*MIXTRAL)
    assert (code, err) == (0, "")
    for told in ("46.7 B parameters, 12.9 B active", "2.00 T tokens", "calibrated on published runs on H100",
                 "GPU-hours", "cost, USD", "MWh", "MFU", "tokens/s", "Young/Daly", "memory on one device",
                 "time of a step", "layouts do not fit", "expert gradients"):  # fmt: skip
        assert told in out, told


def test_the_written_experiment_is_one_that_train_takes_as_it_is(plan, place, capsys) -> None:
    code, out, _ = plan(*MIXTRAL, "optim.lr=3e-4", "model.moe.z_weight=0.0", "--write", "mixtral.yaml")
    assert code == 0
    path = place / "experiment" / "mixtral.yaml"
    assert "moetrain train --config-dir . experiment=mixtral" in out
    written = yaml.safe_load(path.read_text())
    run, composed = settings(Options.read(["--config-dir", str(place), "experiment=mixtral"]))
    assert composed.choices["model"] == "mixtral_8x7b"
    assert (run.launch.kind, run.launch.nodes, run.launch.processes) == ("slurm", 16, 8)
    assert run.parallel.expert_parallel == written["parallel"]["expert_parallel"]
    assert run.batch.global_batch * 4096 == pytest.approx(4e6, rel=0.5)
    assert (run.schedule.tokens, run.schedule.steps) == (2_000_000_000_000, None)
    assert (run.optim.lr, run.batch.sequence_length) == (3e-4, 4096)
    assert run.model.moe is not None
    assert run.model.moe.z_weight == 0.0
    assert cli.main(["train", "--config-dir", str(place), "experiment=mixtral", "--dry-run"]) == 0
    assert not list(place.rglob("*.partial"))


@pytest.mark.parametrize("words", [("model/moe=none",), ("experiment=expert_parallel_4",), ("model=gpt2_124m",)])
def test_what_was_chosen_goes_into_the_experiment(plan, place, words) -> None:
    assert plan(*words, "cluster=h100_ib", "tokens=10M", "--write=own.yaml")[0] == 0
    planned, _ = settings(Options.read([*words, "launch.processes=8", "batch.global_batch=8"]))
    run, _ = settings(Options.read(["--config-dir", str(place), "experiment=own"]))
    assert run.model == planned.model


def test_the_picture_is_a_png(plan, place) -> None:
    code, out, _ = plan(*MIXTRAL, "--picture", "plan.png")
    assert code == 0
    assert "plan.png" in out
    assert (place / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_cluster_of_ones_own_is_found(plan, place) -> None:
    ours = (Path(__file__).parent.parent / "configs" / "cluster" / "h100_ib.yaml").read_text()
    (place / "cluster").mkdir()
    (place / "cluster" / "lab.yaml").write_text(ours.replace("gpus_per_node: 8", "gpus_per_node: 4"))
    code, out, err = plan("cluster=lab", "nodes=2", "tokens=1B", "--config-dir", str(place))
    assert (code, err) == (0, "")
    assert "tiny on lab" in out


def test_masks_of_documents_take_room(plan) -> None:
    # 2 bytes x 65,536 x 65,536 for one sequence: 8.6 GB
    words = ("model=mixtral_8x7b", "cluster=h200_ib", "nodes=16", "tokens=2T", "batch.sequence_length=65536",
             "model.context=65536", "batch.global_batch=128", "show=1")  # fmt: skip
    sizes = {}
    for is_on in ("false", "true"):
        code, out, err = plan(*words, f"data.mask_documents={is_on}")
        assert (code, err) == (0, "")
        sizes[is_on] = float(re.search(r"activations +([0-9.]+)", out)[1])
    assert sizes["true"] - sizes["false"] == pytest.approx(8.6, abs=0.11)


def test_several_numbers_of_nodes_are_tried(plan) -> None:
    _, out, _ = plan("cluster=h100_ib", "nodes=1..5", "tokens=1B", "show=5000", "objective=gpus")
    rows = [line.split()[1] for line in out.splitlines() if line[:1].isdigit() and "Wh" in line]
    assert set(rows) == {"1", "2", "4", "5"}
    assert rows == sorted(rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "cluster is not given: use cluster=NAME, one of a100_40_ib"),
        (("cluster=h100",), "did you mean 'h100_ib'?"),
        (("cluster=h100_ib", "nodes=0"), "nodes is '0', but must be a number from 1"),
        (("cluster=h100_ib", "nodes=-3"), "nodes is '-3'"),
        (("cluster=h100_ib", "nodes=9..3"), "nodes is '9..3'"),
        (("cluster=h100_ib", "nodes=many"), "nodes is 'many'"),
        (("cluster=h100_ib", "tokens=2Q"), "tokens is '2Q', but must be a number above 0, such as 300B"),
        (("cluster=h100_ib", "tokens=0"), "tokens is '0'"),
        (("cluster=h100_ib", "tokens=nan"), "tokens is 'nan'"),
        (("cluster=h100_ib", "objective=fun"), "objective is 'fun', but must be one of time, cost, gpus"),
        (("cluster=h100_ib", "imbalance=0.5"), "imbalance is '0.5', but must be at least 1"),
        (("cluster=h100_ib", "show=1.5"), "show is '1.5', but must be a whole number"),
        (("cluster=h100_ib", "cluster.memory_gb=-1"), "'memory_gb' is -1, but must be above 0"),
        (("cluster=h100_ib", "cluster.memory=9"), "cluster.memory"),
        (("cluster=h100_ib", "model.moe.num_expert=9"), "did you mean 'model.moe.num_experts'?"),
        (("cluster=h100_ib", "model=mixtral"), "model is one of"),
        (("cluster=h100_ib", "--write", "a.txt"), "--write is 'a.txt', but must be a file whose name ends in .yaml"),
        (("cluster=h100_ib", "--write"), "--write is ''"),
        (("cluster=h100_ib", "--write", "plans/a.yaml"), "plans/experiment/a.yaml"),
        (("cluster=h100_ib", "--picture", "a.jpg"), "--picture is 'a.jpg'"),
        (("cluster=h100_ib", "--nodes"), "--nodes is not an option"),
        (("cluster=h100_ib", "cluster.memory_gb=0.1", "--write", "a.yaml"), "a.yaml is not written: no layout"),
    ],
)
def test_what_is_wrong_is_told_in_one_message(plan, place, words, told) -> None:
    code, _, err = plan(*words)
    assert code == 2
    assert err.startswith("moetrain: ")
    assert told in err, err
    assert not list(place.iterdir())


def test_all_that_is_wrong_is_told_at_once(plan) -> None:
    _, _, err = plan("nodes=0", "tokens=x", "objective=y")
    for name in ("cluster is not given", "nodes is", "tokens is", "objective is"):
        assert name in err


def test_a_model_that_is_too_large_is_a_plain_answer(plan) -> None:
    code, out, err = plan("model=gpt4_8x220b", "cluster=h100_ib", "nodes=8", "tokens=13T")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    assert "no layout that train runs fits" in flat
    assert "Even spread over all 64 devices" in flat
    assert "Tensor and pipeline parallelism" in flat


def test_a_plan_takes_two_seconds_and_no_torch() -> None:
    code = (
        "import sys; from moetrain.cli.main import main; code = main(sys.argv[1:]); "
        "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    root = str(Path(moetrain.__file__).parent.parent)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *MIXTRAL], env=os.environ | {"PYTHONPATH": root}, capture_output=True,
        text=True, check=True, timeout=60,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not set(yaml.safe_load(done.stderr)) & {"torch", "numpy", "deepspeed", "matplotlib"}
    # seconds of computing, not of waiting for a busy machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def a_run(place: Path, *, tokens_per_second: list[float]) -> Path:
    """A run directory as train leaves it."""
    directory = place / "runs" / "tiny"
    directory.mkdir(parents=True)
    run, _ = settings(Options.read(["launch.processes=2", "name=tiny"]))
    write_run(run, directory)
    lines = [{"step": 10 * n, "tokens_per_second": speed, "load": [[0.1] * 4 + [0.15] * 4, [0.125] * 8]}
             for n, speed in enumerate(tokens_per_second, start=1)]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return directory


def test_runs_are_compared_with_the_plan_and_calibrate_it(plan, place) -> None:
    a_run(place, tokens_per_second=[10.0, 8000.0, 8000.0, 9000.0])
    code, out, err = plan("compare", "runs/tiny", "cluster=cpu")
    assert (code, err) == (0, "")
    assert " 1.10 " in out, "the second of two ranks has 0.6 of the first layer's rows, half of the second layer's"
    assert " 8,000 " in out, "the median of all but the first stretch, which holds the start"
    right = re.search(r"cluster\.efficiency=([0-9.]+)", out)
    assert right is not None
    _, again, _ = plan("compare", "runs/tiny", "cluster=cpu", f"cluster.efficiency={right[1]}")
    assert re.search(r"[+-]0%", again), again


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("cluster=cpu",), "no run is named"),
        (("runs/tiny",), "cluster is not given"),
        (("runs/none", "cluster=cpu"), "runs/none/run.yaml does not exist"),
        (("runs/tiny", "cluster=cpu", "model=tiny"), "'model=tiny' is no word of plan compare"),
        (("runs/tiny", "cluster=cpu"), "has logged no two stretches of steps yet"),
    ],
)
def test_what_cannot_be_compared_is_told(plan, place, words, told) -> None:
    a_run(place, tokens_per_second=[10.0])
    code, _, err = plan("compare", *words)
    assert code == 2
    assert told in err


def test_a_cluster_is_for_the_plan_alone(capsys) -> None:
    assert cli.main(["train", "cluster=h100_ib", "--dry-run"]) == 2
    assert "'cluster=h100_ib' is for moetrain plan" in capsys.readouterr().err
    assert cli.main(["plan", "--help"]) == 0
    assert "\n  h100_ib " in capsys.readouterr().out
