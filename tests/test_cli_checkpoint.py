"""`moetrain checkpoint …` as a user types it, on the runs of real engines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moetrain
from moetrain.checkpoint import store
from moetrain.cli import main as cli
from moetrain.launch.lock import RunLock

Output = subprocess.CompletedProcess[str]


@pytest.fixture(autouse=True)
def place(real_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs/tiny, and runs/dp2 on another layout."""
    (real_runs / "ep2").rename(real_runs / "tiny")
    monkeypatch.chdir(real_runs.parent)
    return real_runs.parent


@pytest.fixture
def checkpoint(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Output]:
    def run(line: str) -> Output:
        code = cli.main(["checkpoint", *line.split()])
        captured = capsys.readouterr()
        return Output(line, code, captured.out, captured.err)

    return run


ROOT = Path("runs/tiny/checkpoints")


def everything() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}


def steps(root: Path = ROOT) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


class TestLs:
    def test_a_line_for_each_with_its_held_out_loss(self, checkpoint):
        lines = [{"step": 2, "held_out_loss": 4.25}, {"step": 3, "loss": 1.0}, {"step": 3, "held_out_loss": 4.125},
                 {"step": 3, "held_out_loss": 4.0625, "final": True}]  # fmt: skip
        Path("runs/tiny/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        done = checkpoint("ls")
        assert (done.returncode, done.stderr) == (0, "")
        head, *rows = [line.split() for line in done.stdout.splitlines()]
        assert head[:7] == ["step", "tokens", "size", "age", "ranks", "EP", "ZeRO"]
        kept = [[row[0], row[1], *row[-5:]] for row in rows]
        assert kept == [
            ["0", "0", "2", "2", "1", "-", "whole"],
            ["2", "256", "2", "2", "1", "4.2500", "whole"],
            ["3", "384", "2", "2", "1", "4.0625", "whole"],
        ]
        assert float(rows[0][2]) == pytest.approx(size(ROOT / "step_00000000") / 1000, rel=0.01)
        assert rows[0][3] == "KB"

    def test_sizes_are_looked_at_and_digests_on_request(self, checkpoint):
        os.truncate(ROOT / "step_00000002" / "__0_0.distcp", 7)
        path = ROOT / "step_00000003" / "__1_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        (ROOT / "step_00000000" / "manifest.json").unlink()
        rows = checkpoint("ls runs/tiny").stdout.splitlines()[1:]
        assert "DAMAGED: " in rows[0]
        assert "manifest.json cannot be read" in rows[0]
        assert "__0_0.distcp has 7 bytes" in rows[1]
        assert rows[2].endswith("  whole")
        rows = checkpoint("ls runs/tiny --digests").stdout.splitlines()[1:]
        assert "__1_0.distcp has changed" in rows[2]

    def test_what_a_crash_left_is_named(self, checkpoint):
        (ROOT / "step_00000004.partial").mkdir()
        assert f"left by a crash: {ROOT}/step_00000004.partial (0 B)" in checkpoint("ls").stdout

    def test_json_says_the_same(self, checkpoint):
        found = json.loads(checkpoint("ls run_dir=runs/dp2 --json").stdout)
        assert [(row["step"], row["expert_parallel"], row["zero_stage"], row["problem"], row["held_out_loss"])
                for row in found["checkpoints"]] == [(step, 1, 2, "", None) for step in (0, 2, 3)]  # fmt: skip
        assert found["checkpoints"][0]["bytes"] == size(Path("runs/dp2/checkpoints/step_00000000"))
        assert found["leftovers"] == []

    def test_a_run_without_any_says_so_and_a_damaged_metrics_file_is_a_warning(self, checkpoint):
        Path("runs/tiny/metrics.jsonl").write_text("{}\n{}\n")
        done = checkpoint("ls")
        assert done.returncode == 0
        assert "warning: runs/tiny/metrics.jsonl, line 1, is not a JSON object" in done.stderr
        shutil.rmtree(ROOT)
        assert checkpoint("ls").stdout == "runs/tiny has no checkpoint yet\n"


class TestShow:
    def test_the_newest_or_the_one_of_a_step(self, checkpoint):
        assert checkpoint("show").stdout.startswith("runs/tiny/checkpoints/step_00000003\n")
        done = checkpoint("show runs/tiny step=2")
        assert (done.returncode, done.stderr) == (0, "")
        for text in ("step        2, after 256 tokens", "ranks 2, expert parallel 2, ZeRO-1", "4 experts, top-2",
                     "holds       fp32 weights and both Adam moments", "files       5, "):  # fmt: skip
            assert text in done.stdout
        # 2 blocks: 4 experts of 3 x 32 x 32, a router of 4 x 32, 4 attention maps of 32 x 32, 2 norms of 32
        experts, router = 2 * 4 * 3 * 32 * 32, 2 * 4 * 32
        dense = 2 * (4 * 32 * 32 + 2 * 32) + 32 + 128 * 32
        parts = json.loads(checkpoint("show --json").stdout)["parameters"]
        assert parts == {"total": dense + router + experts, "dense": dense, "router": router, "experts": experts}

    def test_tensors_on_request(self, checkpoint):
        done = checkpoint("show --tensors")
        assert "\n52 tensors\n" in done.stdout
        assert " blocks.0.feed_forward.experts.w_in/exp_avg_sq\n" in done.stdout
        found = json.loads(checkpoint("show --tensors --json").stdout)["tensors"]
        assert found["norm.weight/fp32"] == {"elements": 32, "dtype": "float32", "bytes": 128, "intervals": 1}

    @pytest.mark.parametrize("words", [("ls",), ("show",), ("prune", "runs/tiny", "keep=1")])
    def test_a_login_node_needs_no_torch(self, words):
        code = (
            "import sys; sys.modules['torch'] = None; from moetrain.cli.main import main; "
            f"sys.exit(main(['checkpoint', *{list(words)}]))"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parent.parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


class TestDoctor:
    def test_whole(self, checkpoint):
        done = checkpoint("doctor")
        assert (done.returncode, done.stderr) == (0, "")
        head, *lines, last = done.stdout.splitlines()
        assert (head, last) == ("runs/tiny/checkpoints/step_00000003", "whole")
        assert [line[:8] for line in lines] == ["  pass  "] * 12 + ["    -   "]

    def test_not_whole(self, checkpoint):
        (ROOT / "step_00000002" / "__1_0.distcp").unlink()
        done = checkpoint(f"doctor {ROOT}/step_00000002")
        assert done.returncode == 1
        assert "  FAIL  files             runs/tiny/checkpoints/step_00000002/__1_0.distcp is missing" in done.stdout
        assert done.stdout.endswith("NOT whole: 2 of 13 checks failed\n")
        found = json.loads(checkpoint("doctor step=2 --json").stdout)
        assert found["whole"] is False
        assert [each["name"] for each in found["checks"] if each["passed"] is False] == ["files", "values"]
        assert checkpoint("doctor").returncode == 0


class TestDiff:
    def test_equal(self, checkpoint):
        shutil.copytree("runs/tiny", "runs/copy")
        done = checkpoint("diff runs/tiny runs/copy")
        assert done.returncode == 0
        assert done.stdout.splitlines()[2:] == ["all 52 tensors are bit-equal"]

    def test_different(self, checkpoint):
        done = checkpoint(f"diff {ROOT}/step_00000002 runs/dp2")
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        assert lines[2:7] == ["  step: 2 -> 3", "  tokens: 256 -> 384", "  expert parallel: 2 -> 1",
                              "  parallel.expert_parallel: 2 -> 1", "  parallel.zero_stage: 1 -> 2"]  # fmt: skip
        experts = next(line for line in lines if line.startswith("experts  weights")).split()
        assert experts[2:4] == ["4", "4"]
        # a step of Adam with lr 0.01 moves a weight by about 0.01
        assert 0.005 < float(experts[4]) < 0.02
        found = json.loads(checkpoint(f"diff {ROOT}/step_00000002 runs/dp2 --json").stdout)
        assert found["equal"] is False
        assert found["settings"]["step"] == [2, 3]
        assert len(found["tensors"]) == 52

    def test_tensors_that_only_one_has(self, checkpoint):
        assert checkpoint("reshard runs/tiny runs/light moments=false").returncode == 0
        done = checkpoint("diff runs/tiny runs/light")
        assert done.returncode == 1
        assert "only in the first: blocks.0.attention.out.weight/exp_avg, " in done.stdout
        assert " and 29 more" in done.stdout


class TestReshard:
    def test_other_files_the_same_tensors(self, checkpoint):
        Path("runs/tiny/tokenizer.json").write_text("{}")
        done = checkpoint("reshard runs/tiny runs/new files=4 step=2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("runs/new/checkpoints/step_00000002: ")
        assert len(list(Path("runs/new/checkpoints/step_00000002").glob("*.distcp"))) == 4
        assert checkpoint("diff runs/tiny/checkpoints/step_00000002 runs/new").returncode == 0
        assert checkpoint("doctor runs/new").returncode == 0
        # what sampling from it needs
        assert steps(Path("runs/new")) == ["checkpoints", "run.yaml", "tokenizer.json"]


class TestPrune:
    def test_a_dry_run_says_what_would_go_and_nothing_goes(self, checkpoint):
        was = everything()
        (ROOT / "step_00000004.partial").mkdir()
        done = checkpoint("prune run_dir=runs/tiny keep=1 --dry-run")
        assert (done.returncode, done.stderr) == (0, "")
        names = [line.split()[2].rpartition("/")[2] for line in done.stdout.splitlines()[:-1]]
        assert names == ["step_00000000", "step_00000002", "step_00000004.partial"]
        assert done.stdout.endswith("in all; checkpoints that stay: 1\n")
        assert everything() == was

    def test_the_newest_and_those_of_each_multiple_stay(self, checkpoint):
        done = checkpoint("prune run_dir=runs/tiny keep=1 every=4")
        assert done.returncode == 0
        assert f"removed {ROOT}/step_00000002 (" in done.stdout
        assert steps() == ["step_00000000", "step_00000003"]

    def test_the_last_whole_one_does_not_go(self, checkpoint):
        for step in (2, 3):
            os.truncate(ROOT / f"step_{step:08d}" / "__0_0.distcp", 7)
        done = checkpoint("prune run_dir=runs/tiny keep=2")
        assert done.returncode == 2
        assert "nothing was removed: no checkpoint that would stay is whole (" in done.stderr
        assert steps() == ["step_00000000", "step_00000002", "step_00000003"]
        assert checkpoint("prune run_dir=runs/tiny keep=3").returncode == 0

    def test_a_run_that_is_training_is_left_alone(self, checkpoint):
        with RunLock(Path("runs/tiny")):
            done = checkpoint("prune run_dir=runs/tiny keep=1")
        assert done.returncode == 2
        assert "runs/tiny is in use by process" in done.stderr
        assert len(steps()) == 3


FAULTS: dict[str, str] = {
    "": "checkpoint wants to know what to do: use ls, show, doctor, diff, reshard, prune; see moetrain checkpoint",
    "doc": "checkpoint has no verb 'doc': use ls,",
    "ls nowhere": "nowhere does not exist: name the directory of a run, e.g. run_dir=runs/tiny, or of one of its",
    "ls run_dir=nowhere": "nowhere does not exist",
    "show runs/tiny/run.yaml": "runs/tiny/run.yaml is a file: name the directory of a run",
    "doctor runs": "runs is neither a run nor a checkpoint: it holds no run.yaml, checkpoints/ or manifest.json",
    "doctor runs/tiny step=7": "runs/tiny has no checkpoint of step 7: use 0, 2, 3",
    "doctor runs/tiny step=x": "'step' is 'x', but must be a whole number",
    "doctor runs/tiny step=-1": "step is -1, but must be at least 0",
    "show runs/tiny/checkpoints/step_00000003 step=3": "step=3 chooses among the checkpoints of a run, but",
    "show runs/tiny run_dir=runs/dp2": "both runs/tiny and run_dir=runs/dp2 are given: name one",
    "show runs/tiny runs/dp2": "show takes 0 or 1 paths, but was given 2",
    "ls --all": "--all is not an option of ls",
    "prune runs/tiny keep=1 --json": "--json is not an option of prune",
    "diff runs/tiny": "diff takes 2 paths, but was given 1",
    "diff runs/tiny runs/dp2 step=3": "diff has no settings, but was given step",
    "reshard runs/tiny runs/new files=0": "files is 0, but must be at least 1",
    "reshard runs/tiny runs/new moments=no": "'moments' is 'no', but must be true or false",
    "reshard runs/tiny runs/dp2": "runs/dp2/checkpoints/step_00000003 exists already",
    "reshard runs/tiny runs/tiny/run.yaml": "runs/tiny/run.yaml",
    "prune runs/tiny": "prune removes for good, so it wants to hear which run and how many stay",
    "prune keep=1": "prune removes for good",
    "prune runs/tiny keep=0": "keep is 0, but must be at least 1",
    "prune runs/tiny keep=1 evry=2": "'evry' is not a setting; did you mean 'every'?",
    "prune runs/tiny keep=1 every=0": "every is 0, but must be at least 1",
}


@pytest.mark.parametrize("line", FAULTS)
def test_what_is_wrong_is_one_message_and_nothing_changes(checkpoint, line):
    was = everything()
    done = checkpoint(line)
    assert done.returncode == 2
    assert done.stderr.startswith("moetrain: ")
    assert FAULTS[line] in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert everything() == was


@pytest.mark.parametrize("verb", ["show", "doctor", "diff runs/tiny", "reshard"])
def test_a_manifest_that_cannot_be_read_is_told(checkpoint, verb):
    (ROOT / "step_00000003" / store.MANIFEST).write_text("{}")
    done = checkpoint(f"{verb} runs/tiny" + (" runs/new" if verb == "reshard" else ""))
    assert done.returncode == (1 if verb == "doctor" else 2)
    assert "manifest.json cannot be read: KeyError" in done.stdout + done.stderr


def test_settings_of_another_version_are_told(checkpoint):
    path = ROOT / "step_00000003" / store.MANIFEST
    content: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"run": content["run"] | {"wings": 2}}))
    done = checkpoint("show")
    assert done.returncode == 2
    assert "the settings in the manifest of step 3 cannot be read: " in done.stderr
    assert "'wings' is not a setting" in done.stderr
    assert checkpoint("ls").returncode == 0
