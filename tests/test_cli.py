"""The command as a user types it: what it prints, what it exits with, and that no fault shows a traceback."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from as_typed import Output, assert_told, everything

import moetrain
from moetrain.cli import main as cli
from moetrain.cli.options import Options, settings
from moetrain.cli.results import model
from moetrain.compose import compose
from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, read_run, to_dict, write_run
from moetrain.config.schema import RunConfig, SampleConfig
from moetrain.hub.generate import Written


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def command(*words: str, **environment: str) -> Output:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "moetrain.cli", *words],
        env=os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parent.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def earlier_run(place: Path, *overrides: str) -> RunConfig:
    """Leave the run.yaml of a start with these settings in runs/tiny."""
    run = freeze(compose(overrides).settings)
    run = resolve(replace(run, name="tiny"), default_processes=2)
    (place / "runs" / "tiny").mkdir(parents=True)
    write_run(run, place / "runs" / "tiny")
    return run


class TestHelp:
    @pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
    def test_help_names_every_verb(self, moetrain_in_process, words):
        done = moetrain_in_process(*words)
        assert (done.returncode, done.stderr) == (0, "")
        for verb in cli.VERBS:
            assert f"\n  {verb} " in done.stdout

    def test_help_comes_at_once_and_without_the_large_libraries(self):
        code = (
            "import sys; from moetrain.cli.main import main; code = main(['--help']); "
            "print(sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr); sys.exit(code)"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        loaded = set(yaml.safe_load(done.stderr))
        assert not loaded & {"torch", "numpy", "deepspeed", "hydra", "omegaconf", "matplotlib", "rich", "tokenizers"}
        # seconds of computing, not of waiting for a busy machine
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1

    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_each_verb_explains_itself(self, moetrain_in_process, verb):
        for words in ((verb, "--help"), (verb, "seed=1", "-h")):
            done = moetrain_in_process(*words)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(f"usage: moetrain {verb} ")

    def test_the_help_of_a_run_names_the_presets(self, moetrain_in_process):
        text = moetrain_in_process("train", "--help").stdout
        for name in ("mixtral_8x7b", "top2_8e", "expert_parallel_4"):
            assert f"\n  {name} " in text

    def test_a_narrow_terminal_alphabet_is_no_reason_to_fail(self):
        done = command("--help", PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert "moetrain VERB [key=value ?]" in done.stdout

    @pytest.mark.parametrize("word", ["--version", "version"])
    def test_the_version_is_that_of_the_package(self, moetrain_in_process, word):
        assert moetrain_in_process(word).stdout == f"moetrain {moetrain.__version__}\n"

    def test_every_example_of_the_help_is_usable(self, moetrain_in_process):
        texts = [cli.EXAMPLES, *(verb.load(name)[1] for name, verb in cli.VERBS.items())]
        lines = [
            line.split("   ")[0].strip() for text in texts for line in text.splitlines() if line[:11] == "  moetrain "
        ]
        assert len(lines) >= 12
        for line in lines:
            _, verb, *words = shlex.split(line)
            if verb in ("train", "prepare"):
                done = moetrain_in_process("train", *words, *([] if "--dry-run" in words else ["--dry-run"]))
                assert (done.returncode, done.stderr) == (0, ""), line
            elif verb in ("verify", "preflight"):
                assert moetrain_in_process(verb, *words, "--dry-run").returncode == 0, line
            elif verb in ("config", "plan"):
                assert moetrain_in_process(verb, *words).returncode == 0, line
            elif verb == "sweep" and words[0] not in ("status", "predict"):
                assert moetrain_in_process(verb, *words, "--dry-run").returncode == 0, line
            elif verb == "bench":
                done = moetrain_in_process(verb, *words, "--dry-run")
                assert (done.returncode, done.stderr) == (0, ""), line


class TestWords:
    def test_an_unknown_verb_is_told_with_those_there_are(self, moetrain_in_process):
        done = moetrain_in_process("tran")
        assert_told(done, f"there is no verb 'tran': use {', '.join(cli.VERBS)}; see moetrain --help")

    @pytest.mark.parametrize("verb", ["train", "prepare", "config", "verify"])
    def test_an_unknown_option_is_told(self, moetrain_in_process, verb):
        assert_told(moetrain_in_process(verb, "--verbose"), "--verbose is not an option: see --help")

    def test_config_has_no_dry_run(self, moetrain_in_process):
        assert_told(moetrain_in_process("config", "--dry-run"), "--dry-run is not an option")

    @pytest.mark.parametrize("words", [("--config-dir", "nowhere"), ("--config-dir=nowhere",), ("--config-dir",)])
    def test_a_directory_of_presets_must_be_there(self, moetrain_in_process, words):
        value = "nowhere" if "nowhere" in words[-1] else ""
        assert_told(moetrain_in_process("config", *words), f"--config-dir is '{value}', but must be a directory")

    @pytest.mark.parametrize("form", ["--config-dir=own", "--config-dir own"])
    def test_presets_of_ones_own(self, moetrain_in_process, place, form):
        (place / "own" / "model").mkdir(parents=True)
        (place / "own" / "model" / "mine.yaml").write_text("# Mine.\ndefaults: [_self_, {moe: none}]\nd_model: 96\n")
        text = moetrain_in_process("config", "model=mine", *form.split()).stdout
        settings = yaml.safe_load(text)
        assert (settings["model"]["d_model"], settings["name"]) == (96, "mine-dense")
        assert re.search("d_model: 96 +# model/mine.yaml", text)

    def test_every_problem_is_on_a_line_of_its_own(self, moetrain_in_process):
        done = moetrain_in_process("train", "lr=1", "model=mixtrl", "experts=4")
        assert_told(done)
        head, *lines = done.stderr.splitlines()
        assert head == "moetrain: config is not usable:"
        assert [line[:5] for line in lines] == ["  - '"] * 3

    @pytest.mark.parametrize(
        "word",
        ["optim.lr=-1", "optim.lr=abc", "model=zzz", "num_experts=4", "x", "optim.lr=1,2", "experiment=null", "~model",
         "model/moe=none model.moe.top_k=1", "launch.processes=0", "name=\udcff="],
    )  # fmt: skip
    @pytest.mark.parametrize("verb", ["train", "config", "verify"])
    def test_whatever_is_wrong_is_one_message_and_exit_code_2(self, moetrain_in_process, place, verb, word):
        assert_told(moetrain_in_process(verb, *word.split()))
        assert everything(place) == {}

    def test_the_installed_command_tells_it_too(self):
        done = command("train", "lr=1")
        assert_told(done, "'lr' is not a setting; did you mean 'optim.lr'?")
        assert done.stdout == ""


class TestConfig:
    @pytest.mark.parametrize(
        "words",
        [
            (),
            ("model=gpt2_124m",),
            ("model.moe=null", "optim.lr=1e-20", "data.tokenizer=null", "optim.clip=0"),
            ("name='a # b: [c]'", "run_dir='x\ty'", "data.text=['a b','{c}','null','1']", "data.text_column='é€😀'"),
            ("name='wait...'", "schedule.tokens=3000000000000", "schedule.steps=null", "checkpoint.every_minutes=0.5"),
        ],
    )
    def test_what_is_shown_are_the_settings(self, moetrain_in_process, words):
        done = moetrain_in_process("config", *words, "launch.processes=2")
        assert (done.returncode, done.stderr) == (0, "")
        run, _ = settings(Options.read([*words, "launch.processes=2"]))
        assert freeze(yaml.safe_load(done.stdout)) == run

    def test_each_value_says_where_it_comes_from(self, moetrain_in_process):
        words = ("experiment=expert_parallel_4", "model/moe=top2_8e", "optim={lr:3}", "data.text=a.txt", "++seed=7")
        lines = moetrain_in_process("config", *words).stdout.splitlines()
        source = {line.split(":")[0].strip(): line.split("  # ")[1] for line in lines if "  # " in line}
        assert (
            source
            | {
                "num_layers": "model/tiny.yaml",
                "num_experts": "model/moe/top2_8e.yaml",
                "z_weight": "worked out",
                "drop": "default",
                "processes": "experiment/expert_parallel_4.yaml",
                "kind": "launch/local.yaml",
                "lr": "command line",
                "text": "command line",
                "seed": "command line",
                "beta1": "default",
                "sequence_length": "worked out",
                "run_dir": "worked out",
            }
            == source
        )

    @pytest.mark.parametrize(
        ("words", "name"),
        [
            ((), "tiny"),
            (("model/moe=none",), "tiny-dense"),
            (("model.moe=null",), "tiny-dense"),
            (("model/moe=top2_8e",), "tiny-top2_8e"),
            (("model=mixtral_8x7b",), "mixtral_8x7b"),
            (("model=gpt2_124m", "model/moe=top2_8e"), "gpt2_124m-top2_8e"),
            (("experiment=expert_parallel_4",), "tiny-ep4"),
            (("name=mine",), "mine"),
        ],
    )
    def test_a_run_is_named_after_its_model(self, moetrain_in_process, words, name):
        settings = yaml.safe_load(moetrain_in_process("config", *words).stdout)
        assert (settings["name"], settings["run_dir"]) == (name, f"runs/{name}")

    @pytest.mark.parametrize("words", [("config",), ("--help",), ("train", "--dry-run")])
    def test_a_reader_that_leaves_is_no_fault(self, words):
        """As in `moetrain config | head -1`, and here it has left already."""
        reader, writer = os.pipe()
        os.close(reader)
        line = [sys.executable, "-m", "moetrain.cli", *words]
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")


class TestTrain:
    def test_a_larger_model_is_told_that_it_would_train_with_the_tiny_one_s_settings(self, moetrain_in_process):
        told = moetrain_in_process("train", "--dry-run", "model=gpt2_124m", "schedule.steps=900").stdout
        assert (
            "note: optim.lr, schedule.warmup_steps as tried out on the tiny model (run.yaml): set what gpt2_124m"
            in told
        )
        mine = ["optim.lr=6e-4", "schedule.steps=900", "schedule.warmup_steps=90"]
        assert "note" not in moetrain_in_process("train", "--dry-run", "model=gpt2_124m", *mine).stdout
        assert "note" not in moetrain_in_process("train", "--dry-run", "model/moe=none").stdout

    def test_a_dry_run_says_what_would_run_and_writes_nothing(self, moetrain_in_process, place):
        done = moetrain_in_process("train", "--dry-run", "launch.processes=4", "schedule.steps=600", "name=a")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            "runs/a: 3.94 M parameters, 1.58 M active per token (8 experts, top-2)",
            # 16 x 256 tokens a step
            f"  600 steps of 4,096 tokens: 2.46 M tokens, {flops():.2e} FLOPs",
            "  4 processes, expert parallel 4, ZeRO-1, fp32",
            "a dry run: nothing was started",
        ]
        assert everything(place) == {}

    @pytest.mark.parametrize(
        ("before", "now", "told"),
        [
            ("model.d_model=96", "", "model.d_model is 128, but runs/tiny was started with 96"),
            ("seed=5", "", "seed is 1234, but runs/tiny was started with 5"),
            ("data.tokenizer=t.json", "", "data.tokenizer is null, but runs/tiny was started with t.json"),
            ("model/moe=none", "", "model.moe is 8 experts, but runs/tiny was started with null"),
            ("", "model.moe=null", "model.moe is null, but runs/tiny was started with 8 experts"),
            ("batch.global_batch=32", "", "batch.global_batch is 16, but runs/tiny was started with 32"),
        ],
    )
    @pytest.mark.parametrize("dry", [False, True])
    def test_another_model_in_the_same_directory_is_refused(self, moetrain_in_process, place, before, now, told, dry):
        earlier = earlier_run(place, *before.split())
        (place / "runs" / "tiny" / "lock").touch()
        was = everything(place) | {"runs/tiny/lock": None}
        done = moetrain_in_process("train", "name=tiny", *now.split(), *(["--dry-run"] if dry else []))
        assert_told(done, f"{told}: set it back, or choose another name=… or run_dir=… for another run")
        assert done.stderr.count("\n  - ") == 1
        assert everything(place) | {"runs/tiny/lock": None} == was
        assert read_run(place / "runs" / "tiny") == earlier

    def test_the_way_out_of_that_leads_out(self, moetrain_in_process, place):
        earlier_run(place, "model.d_model=96")
        for way_out in ("model.d_model=96", "name=other", "run_dir=elsewhere"):
            assert moetrain_in_process("train", "--dry-run", way_out).returncode == 0

    def test_what_may_change_is_told(self, moetrain_in_process, place):
        earlier_run(place, "optim.lr=0.5")
        done = moetrain_in_process("train", "--dry-run", "launch.processes=2")
        assert done.stdout.startswith("changed since the last start: optim.lr 0.5 -> 0.003\n")

    def test_a_damaged_run_file_is_told(self, moetrain_in_process, place):
        earlier_run(place)
        (place / "runs" / "tiny" / "run.yaml").write_text("a: [")
        assert_told(moetrain_in_process("train", "--dry-run"), "runs/tiny/run.yaml cannot be read")

    @pytest.mark.parametrize("verb", ["train", "prepare"])
    def test_text_that_is_not_there_is_told(self, moetrain_in_process, verb):
        assert_told(moetrain_in_process(verb, "data.text=nowhere.txt"), "nowhere.txt")

    def test_a_place_where_nothing_can_be_written_is_told(self, moetrain_in_process, place):
        (place / "file").write_text("x")
        done = moetrain_in_process("train", "run_dir=file/run")
        assert_told(done, "file/run: Not a directory: choose another place, or mend it")


def flops() -> float:
    """Of the tiny model: 6 per active weight without the embedding's look-up, and causal attention, by hand."""
    layer = 4 * 128 * 128 + 8 * 128 + 2 * 3 * 128 * 256
    per_token = 6 * (4 * layer + 4096 * 128) + 6 * 4 * 256 * 128
    return per_token * 600 * 16 * 256


class TestSample:
    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ((), "runs/tiny/run.yaml does not exist: name the directory of a run, e.g. run_dir=runs/tiny"),
            (("run_dir=a=b, c",), "a=b, c/run.yaml does not exist"),
            (("hello",), "hello/run.yaml does not exist: name the directory of a run"),
            (("promt=a",), "'promt' is not a setting; did you mean 'prompt'?"),
            (
                ("zzz=a",),
                "'zzz' is not a setting: use run_dir, step, prompt, max_tokens, temperature, top_k, top_p, seed, stop",
            ),
            (("max_tokens=ten",), "'max_tokens' is 'ten', but must be a whole number"),
            (("max_tokens=1.5",), "'max_tokens' is 1.5, but must be a whole number"),
            (("temperature=[",), "'temperature' is '[', but must be a number"),
            (("temperature=",), "'temperature' is '', but must be a number"),
            (("temperature=nan",), "temperature is nan, but must be from 0 to"),
            (("temperature=-1",), "temperature is -1.0, but must be from 0 to"),
            (("max_tokens=0", "top_k=-1"), "max_tokens is 0, but must be from 1 to"),
            (("seed=99999999999999999999",), "seed is 99999999999999999999, but must be from 0 to"),
        ],
    )
    def test_what_is_wrong_is_told_before_anything_is_written(self, moetrain_in_process, words, told):
        done = moetrain_in_process("sample", *words)
        assert_told(done, told)
        assert done.stdout == ""

    @pytest.mark.parametrize("prompt", ["a b", "x=1, y=2", "", "null", "12", "'quoted'", "it's: [1]\n#", "-h?", "é😀"])
    def test_a_prompt_is_any_text(self, moetrain_in_process, monkeypatch, prompt):
        asked: list[SampleConfig] = []

        def answer(wanted: SampleConfig) -> tuple[None, list[Written]]:
            asked.append(wanted)
            return None, [Written(row=0, text=" and"), Written(row=0, text=" so on")]

        monkeypatch.setattr(model, "write", answer)
        words = ("run_dir=runs/a b", f"prompt={prompt}", "temperature=1e-1", "max_tokens=7", "seed=3")
        done = moetrain_in_process("sample", *words)
        assert (done.returncode, done.stdout) == (0, f"{prompt} and so on\n")
        given = {"run_dir": "runs/a b", "prompt": [prompt], "max_tokens": 7, "temperature": 0.1, "seed": 3}
        assert asked == [SampleConfig(**given)]

    def test_a_run_that_has_not_trained_is_told(self, moetrain_in_process, place):
        earlier_run(place)
        assert_told(moetrain_in_process("sample"), "runs/tiny has no whole checkpoint yet: train it first")


def test_settings_of_the_defaults_are_those_written_to_a_run(place):
    run = earlier_run(place)
    assert freeze(to_dict(run)) == read_run(place / "runs" / "tiny")
