"""The verbs that hold the program against others and against itself: bench and verify, as a user types them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from as_typed import assert_told, everything


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestVerify:
    def test_a_dry_run_says_what_would_be_compared_and_starts_nothing(self, moetrain_in_process, place):
        done = moetrain_in_process("verify", "--dry-run", "layout=ep2_zero1,ranks4_ep2_zero2_acc2", "layout=ep1_zero1")
        assert (done.returncode, done.stderr) == (0, "")
        first, *_, layouts, last = done.stdout.splitlines()
        assert first.startswith("tiny, shrunk, 3 steps against one process: model.vocab_size 4096 -> 128, ")
        assert layouts == "  3 layouts: ep2_zero1, ranks4_ep2_zero2_acc2, ep1_zero1"
        assert last == "a dry run: nothing was started"
        assert everything(place) == {}

    def test_a_setting_that_differs_by_definition_is_told_with_its_reason(self, moetrain_in_process):
        done = moetrain_in_process("verify", "--dry-run", "model.moe.capacity_factor=1.5")
        assert "model.moe.capacity_factor=1.5 differs between layouts by definition: an expert's room" in done.stdout

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (("layout=ep2",), "layout 'ep2' is none: write [ranksN_]epN_zeroN[_accN][_bf16], e.g. ep2_zero1"),
            (("layout=",), "layout '' is none"),
            (("layout=ranks4_ep3_zero1",), "shares experts among 3 ranks, but that must divide its 4 ranks"),
            (("layout=ep3_zero1",), "shares experts among 3 ranks, but that must divide model.moe.num_experts, 8"),
            (("layout=ep2_zero9",), "has ZeRO stage 9, but must have one of 0, 1, 2"),
            (("layout=ep1_zero0_bf16",), "has ZeRO stage 0 in bf16"),
            (("layout=ranks64_ep1_zero1",), "has 64 ranks, but must have from 1 to 8"),
            (("layout=ep1_zero1_acc99",), "accumulates 99 micro-batches"),
            (("layout=ep2_zero1", "model/moe=none"), "shares experts, but the model is dense: use ep1"),
            (("steps=0",), "steps is '0', but must be a whole number from 1 to 20"),
            (("steps=²",), "steps is '²', but must be a whole number"),
            (("layuot=ep2_zero1",), "'layuot' is not a setting"),
        ],
    )
    def test_what_is_wrong_is_told_before_anything_starts(self, moetrain_in_process, words, told):
        done = moetrain_in_process("verify", *words)
        assert_told(done, told)
        assert done.stdout == ""


class TestBench:
    TINY = ("d_model=16", "d_ff=16", "experts=4", "top_k=2", "repeats=1", "device=cpu", "dtype=fp32")

    def test_the_table_is_on_stdout_and_its_numbers_in_the_file(self, moetrain_in_process, place):
        words = (*self.TINY, "tokens=16", "routing=skewed", "contestants=floor,moetrain")
        done = moetrain_in_process("bench", "layer", *words, "--json", "layer.json")
        assert done.returncode == 0
        assert "bench 20/20 runs" not in done.stdout
        found = yaml.safe_load((place / "layer.json").read_text())
        assert [row["contestant"] for row in found["rows"]] == ["dense", "floor", "moetrain"]
        for row, line in zip(found["rows"], done.stdout.splitlines()[5:], strict=False):
            told = re.search(rf" {row['contestant']} +([\d.]+) +\[-\] +([\d.]+) +([\d.]+)", line)
            assert told.groups() == (f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_mib']:.1f}")
        assert everything(place).keys() == {"layer.json"}

    def test_a_step_is_timed(self, moetrain_in_process):
        words = (*self.TINY, "layers=1", "heads=2", "vocab=32", "sequence=8", "batch=2", "contestants=moetrain")
        done = moetrain_in_process("bench", "step", *words)
        assert done.returncode == 0
        assert "bench 9/9 runs" in done.stderr
        assert " moetrain " in done.stdout

    def test_a_package_that_is_not_there_is_told_and_no_error(self, moetrain_in_process, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        words = (*self.TINY, "tokens=16", "routing=balanced", "contestants=moetrain,transformers_eager")
        done = moetrain_in_process("bench", "layer", *words)
        assert done.returncode == 0
        assert (
            "transformers is not installed, and its rows are left out: pip install 'transformers>=5,<6'" in done.stdout
        )
        assert "transformers_eager" not in done.stdout

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ((), ["'' is no benchmark: write `moetrain bench layer`, `step` or `checkpoint`"]),
            (("layers", "tokens=1"), ["'layers' is no benchmark"]),
            (("layer", "--fast", "token=1", "--json", "no/a.json"),
             ["--fast is not an option: see --help", "--json is 'no/a.json', but must be a file in a directory",
              "'token' is not a setting; did you mean 'tokens'?"]),
            (("layer", "--json"), ["--json is ''"]),
            (("step", "--json=."), ["--json is '.'"]),
        ],
    )  # fmt: skip
    def test_all_that_is_wrong_is_told_before_anything_runs(self, moetrain_in_process, place, words, told):
        done = moetrain_in_process("bench", *words)
        assert_told(done, *told)
        assert done.stderr.count("\n  - ") == len(told)
        assert everything(place) == {}

    def test_cuda_that_is_not_there_is_told(self, moetrain_in_process):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        assert_told(
            moetrain_in_process("bench", "layer", "device=cuda"), "device is 'cuda', but torch sees no CUDA GPU"
        )

    @pytest.mark.parametrize("words", [("--help",), ("layer", "--dry-run")])
    def test_help_and_plan_need_no_torch(self, words):
        code = (
            "import sys; from moetrain.cli.main import main; code = main(sys.argv[1:]); "
            "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr); sys.exit(code)"
        )
        line = [sys.executable, "-c", code, "bench", *words]
        done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
        assert not set(yaml.safe_load(done.stderr)) & {"torch", "deepspeed", "transformers", "numpy"}
