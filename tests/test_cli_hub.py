"""The verbs export, import and sample as a user types them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from as_typed import assert_told
from own_runs import write_tiny

from moetrain.cli.options import Options, settings
from moetrain.config.freeze import read_run
from moetrain.config.identity import unlike
from moetrain.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run and its prepared text."""
    place = tmp_path_factory.mktemp("made")
    write_tiny(place / "runs" / "tiny", place / "of tiny")
    return place


@pytest.fixture(autouse=True)
def place(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run in runs/tiny."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_goes_out_and_comes_in(moetrain_in_process, place):
    done = moetrain_in_process("export", "runs/tiny", "out=tiny-hf", "dtype=bf16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tiny-hf: MixtralForCausalLM" in done.stdout
    assert "held against our model: scores of 32 tokens differ by" in done.stdout
    done = moetrain_in_process("import", "tiny-hf", "out=runs/back", "check=false")
    assert (done.returncode, done.stderr) == (0, "")
    assert "moetrain train --config-dir runs/back/configs experiment=back data.text=…" in done.stdout
    run, _ = settings(Options.read(["--config-dir", "runs/back/configs", "experiment=back"]))
    assert unlike(read_run(place / "runs" / "tiny"), run) == []
    assert unlike(read_run(place / "runs" / "back"), run) == []
    assert (run.init.weights, run.data.tokenizer) == (str(place / "runs/back"), str(place / "runs/back/tokenizer.json"))
    assert_told(moetrain_in_process("evaluate", "runs/back"), "runs/back has no prepared text of its own: name some by")
    # other settings are refused before anything starts
    words = ("--config-dir", "runs/back/configs", "experiment=back", "model.norm=layernorm", "model.moe.num_experts=5",
             f"data.prepared={place / 'of tiny' / 'prepared'}")  # fmt: skip
    assert_told(moetrain_in_process("train", *words), "model.norm is layernorm, but rmsnorm in init.weights",
                "model.moe.num_experts is 5, but 3 in init.weights")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("export",), "0 paths are given, but it takes 1 (RUN)"),
        (("export", "runs/tiny"), "out is not given"),
        (("export", "runs/tiny", "out=a", "dtype=fp8"), "dtype is 'fp8', but must be one of fp32, bf16, fp16"),
        (("export", "runs/tiny", "out=a", "format=onnx"), "format is 'onnx', but must be one of hf, gguf"),
        (
            ("export", "runs/tiny", "out=a", "format=gguf", "shard_gb=1"),
            "shard_gb is 1.0, but format=gguf writes one file",
        ),
        (("export", "runs/tiny", "out=a", "shard_gb=0"), "shard_gb is 0.0, but must be above 0"),
        (("export", "runs/tiny", "out=a", "step=5"), "has no checkpoint of step 5: there is 7"),
        (("export", "runs/tiny", "out=a", "--fast"), "--fast is not an option"),
        (("export", "runs/tiny", "ot=a"), "'ot' is not a setting; did you mean 'out'?"),
        (("import", "nowhere", "out=a"), "nowhere/config.json does not exist"),
        (("import", "runs/tiny", "out=runs/tiny"), "out is runs/tiny, but that exists already"),
    ],
)
def test_what_is_wrong_is_told(moetrain_in_process, place, words, told):
    assert_told(moetrain_in_process(*words), told)
    assert not (place / "a").exists()


@pytest.mark.parametrize("words", [("export", "runs/tiny", "out=a"), ("sample", "runs/tiny"), ("evaluate", "runs/tiny"),
                                   ("surgery", "runs/tiny", "grow", "out=a", "num_experts=6")])  # fmt: skip
def test_another_tokenizer_than_it_was_trained_with_is_told(moetrain_in_process, place, words):
    train_tokenizer(iter(["something else"]), vocab_size=280).save("runs/tiny/tokenizer.json")
    assert_told(
        moetrain_in_process(*words), "runs/tiny/tokenizer.json is not the tokenizer that runs/tiny/checkpoints/"
    )
    assert not (place / "a").exists()


def test_a_model_goes_out_for_llama_cpp(moetrain_in_process, place, monkeypatch):
    pytest.importorskip("gguf", reason="needs gguf: pip install 'moetrain[gguf]'")
    done = moetrain_in_process("export", "runs/tiny", "out=a", "format=gguf", "dtype=fp16")
    assert (done.returncode, done.stderr) == (0, "")
    assert "a: MixtralForCausalLM" in done.stdout
    assert "not held against our model (format=gguf)" in done.stdout
    assert sorted(path.name for path in (place / "a").iterdir()) == ["README.md", "model.gguf"]
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_told(moetrain_in_process("export", "runs/tiny", "out=b", "format=gguf"), "pip install 'moetrain[gguf]'")


@pytest.mark.parametrize("verb", ["export", "import"])
def test_without_transformers_it_says_what_to_install(moetrain_in_process, monkeypatch, verb):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_told(moetrain_in_process(verb, "runs/tiny", "out=a"), "pip install 'moetrain[hf]'")


class TestSample:
    def test_a_prompt_is_shown_with_what_follows(self, moetrain_in_process):
        out = moetrain_in_process("sample", "prompt=the state", "max_tokens=5", "temperature=0").stdout
        assert out.startswith("the state")
        assert len(out) > len("the state") + 3

    def test_the_run_may_stand_first(self, moetrain_in_process, place):
        words = ("prompt=the", "max_tokens=5", "temperature=0")
        before = moetrain_in_process("sample", *words).stdout
        (place / "runs" / "tiny").rename(place / "other")
        assert moetrain_in_process("sample", "other", "step=7", *words).stdout == before
        assert moetrain_in_process("sample", "run_dir=other", *words).stdout == before

    def test_several_prompts_come_one_after_the_other(self, moetrain_in_process):
        words = ("max_tokens=5", "seed=2")
        together = moetrain_in_process("sample", "prompt=the", "prompt=", "prompt=is", *words).stdout
        alone = [moetrain_in_process("sample", f"prompt={prompt}", "max_tokens=5", f"seed={2 + number}").stdout
                 for number, prompt in enumerate(["the", "", "is"])]  # fmt: skip
        assert together == "\n".join(alone)

    def test_a_stop_may_be_a_line_break(self, moetrain_in_process):
        whole = moetrain_in_process("sample", "prompt=the", "max_tokens=12", "temperature=0").stdout
        letter = whole[len("the") + 4]
        cut = moetrain_in_process("sample", "prompt=the", "max_tokens=12", "temperature=0", f"stop={letter}").stdout
        assert cut == "the" + whole[3:].partition(letter)[0] + "\n"
        assert moetrain_in_process("sample", "max_tokens=2", r"stop=\n").returncode == 0

    def test_the_experts_are_counted(self, moetrain_in_process):
        out = moetrain_in_process("sample", "prompt=the", "max_tokens=8", "colour=experts", "layer=0").stdout
        shares = out.splitlines()[-1]
        assert shares.startswith("first choices:")
        assert sum(int(word[:-1]) for word in shares.split() if word.endswith("%")) in range(98, 103)

    def test_a_router_that_sees_others_is_told(self, moetrain_in_process, place):
        path = place / "runs" / "tiny" / "run.yaml"
        content = yaml.safe_load(path.read_text())
        content["model"]["moe"]["evaluation_capacity_factor"] = 1.0
        path.write_text(yaml.safe_dump(content))
        done = moetrain_in_process("sample", "max_tokens=3")
        assert done.returncode == 0
        assert "model.moe.evaluation_capacity_factor is set" in done.stderr

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (("top_p=0",), "top_p is 0.0, but must lie in (0, 1]"),
            (("top_p=1.5",), "top_p is 1.5, but must lie in (0, 1]"),
            (("colour=red",), "colour is 'red', but must be one of none, experts"),
            (("stop=",), "stop is empty"),
            (("layer=1",), "layer is 1, but belongs to colour=experts"),
            (("runs/tiny", "runs/other"), "'runs/other' is not a setting"),
            (("runs/tiny", "step=3"), "has no checkpoint of step 3: there is 7"),
            (("--fast",), "'--fast' is not a setting"),
            (("colour=experts", "layer=2"), "layer is 2, but tiny has 2 MoE blocks: use 0 to 1"),
        ],
    )
    def test_what_is_wrong_is_told(self, moetrain_in_process, words, told):
        assert_told(moetrain_in_process("sample", *words), told)
