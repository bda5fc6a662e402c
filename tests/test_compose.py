"""Command line and preset files to settings, where each came from, and what is told of those that do not fit."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moetrain.compose import COMMAND_LINE, compose, presets
from moetrain.config.checks import check, resolve
from moetrain.config.freeze import config_directory, flatten, freeze, setting_names, to_dict
from moetrain.config.routers import resolve_router
from moetrain.config.schema import MoEConfig, RunConfig
from moetrain.errors import ConfigError

MODELS = sorted(path.stem for path in (config_directory() / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
PRESET_FILES = {name: yaml.safe_load((config_directory() / "model" / f"{name}.yaml").read_text()) for name in MODELS}


def usable(*overrides: str, config_dir: Path | None = None) -> RunConfig:
    """The settings of a run that passes every check."""
    run = resolve(freeze(compose(overrides, config_dir=config_dir).settings), default_processes=2)
    check(run, flatten(to_dict(run)))
    return run


def problems(*overrides: str, config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        freeze(compose(overrides, config_dir=config_dir).settings)
    return caught.value.problems


@pytest.fixture
def own(tmp_path) -> Any:
    """``own("model/mine", text)`` writes a preset into a directory of the user's own, and returns the directory."""

    def write(name: str, text: str | bytes) -> Path:
        path = tmp_path / "own presets, a=b" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / "own presets, a=b"

    return write


class TestPresets:
    @pytest.mark.parametrize("moe", ["preset", "none", "top2_8e"])
    @pytest.mark.parametrize("model", MODELS)
    def test_every_model_with_all_sparse_blocks_is_usable(self, model, moe):
        run = usable(f"model={model}", f"model/moe={moe}")
        dense = {name: value for name, value in PRESET_FILES[model].items() if name not in ("defaults", "moe")}
        assert {name: getattr(run.model, name) for name in dense} == dense
        if moe == "none":
            assert run.model.moe is None
        else:
            assert run.model.moe is not None
            told = PRESET_FILES[model].get("moe", {})
            changed = {"router": "top_k", "num_experts": 8, "top_k": 2, "d_expert": None} if moe == "top2_8e" else {}
            expected = told | changed
            assert {name: getattr(run.model.moe, name) for name in expected} == expected

    @pytest.mark.parametrize("model", MODELS)
    def test_a_model_alone_is_as_its_file_says(self, model):
        run = usable(f"model={model}")
        assert (run.model.moe is None) == ("moe" not in PRESET_FILES[model])
        assert run == usable(f"model={model}", f"model/moe={'preset' if run.model.moe else 'none'}")

    @pytest.mark.parametrize("experiment", EXPERIMENTS)
    def test_every_experiment_is_usable_and_named(self, experiment):
        assert usable(f"experiment={experiment}").name, "two experiments must not share a directory"

    def test_nothing_said_is_the_tiny_model_on_the_defaults(self):
        run = usable()
        assert run == usable("model=tiny", "model/moe=preset", "launch=local")
        unset = resolve(RunConfig(), default_processes=2)
        assert (run.data, run.batch, run.parallel) == (unset.data, unset.batch, unset.parallel)

    def test_every_preset_is_listed_with_a_line(self):
        for group, names in (
            ("model", MODELS),
            ("experiment", EXPERIMENTS),
            ("model/moe", ["none", "preset", "top2_8e"]),
        ):
            listed = presets(group)
            assert sorted(listed) == names
            for title in listed.values():
                assert title[0] not in "#@"
                assert "Source" not in title
        assert presets("model")["mixtral_8x7b"] == "Mixtral 8x7B. 46.7 B parameters, 12.9 B active per token."

    def test_choices_name_the_files(self):
        chosen = compose(["model=gpt2_124m", "model/moe=top2_8e"]).choices
        assert (chosen["model"], chosen["model/moe"], chosen["launch"]) == ("gpt2_124m", "top2_8e", "local")


class TestSources:
    def test_the_last_to_set_a_value_is_its_source(self):
        sources = compose(["experiment=expert_parallel_4", "model/moe=top2_8e", "optim.lr=1"]).sources
        assert sources["model.d_model"] == "model/tiny.yaml"
        assert sources["model.moe.num_experts"] == "model/moe/top2_8e.yaml"
        assert sources["model.moe.every"] == "model/tiny.yaml"
        assert sources["launch.processes"] == "experiment/expert_parallel_4.yaml"
        assert sources["launch.kind"] == "launch/local.yaml"
        assert sources["optim.lr"] == COMMAND_LINE
        assert "optim.beta1" not in sources

    def test_the_command_line_comes_after_every_file(self):
        composed = compose(["experiment=expert_parallel_4", "launch.processes=8"])
        assert composed.sources["launch.processes"] == COMMAND_LINE
        assert composed.settings["launch"]["processes"] == 8

    def test_a_whole_section_on_the_command_line_is_its_settings(self):
        composed = compose(["optim={lr:3,clip:0}"])
        assert composed.settings["optim"] == to_dict(RunConfig())["optim"] | {"lr": 3, "clip": 0}
        assert (composed.sources["optim.lr"], composed.sources["optim.clip"]) == (COMMAND_LINE, COMMAND_LINE)

    @pytest.mark.parametrize(
        ("override", "source"), [("model/moe=none", "model/moe/none.yaml"), ("model.moe=null", COMMAND_LINE)]
    )
    def test_no_sparse_blocks_have_a_source_too(self, override, source):
        composed = compose([override])
        assert composed.settings["model"]["moe"] is None
        assert composed.sources["model.moe"] == source

    @pytest.mark.parametrize("model", MODELS)
    def test_a_source_says_the_value_that_counts(self, model):
        composed = compose([f"model={model}"])
        flat = flatten(composed.settings)
        for name, source in composed.sources.items():
            if source == f"model/{model}.yaml" and name in flat:
                assert flat[name] == flatten({"model": PRESET_FILES[model]})[name]

    def test_an_experiment_may_change_the_model(self, own):
        directory = own(
            "experiment/mine",
            "# @package _global_\ndefaults:\n  - override /model: gpt2_124m\nmodel:\n  d_model: 96\nname: mine\n",
        )
        composed = compose(["experiment=mine"], config_dir=directory)
        assert composed.choices["model"] == "gpt2_124m"
        assert composed.sources["model.d_model"] == composed.sources["name"] == "experiment/mine.yaml"
        assert composed.sources["model.num_layers"] == "model/gpt2_124m.yaml"
        assert composed.sources["model.moe"] == "model/moe/none.yaml"


class TestOwnPresets:
    MINE = "# Mine.\ndefaults:\n  - _self_\n  - moe: preset\nd_model: 96\nmoe:\n  num_experts: 6\n"

    def test_a_model_of_ones_own(self, own):
        directory = own("model/mine", self.MINE)
        run = usable("model=mine", "model.num_layers=2", config_dir=directory)
        assert (run.model.d_model, run.model.num_layers) == (96, 2)
        assert run.model.moe == resolve_router(MoEConfig(num_experts=6))
        composed = compose(["model=mine"], config_dir=directory)
        assert composed.sources["model.moe.num_experts"] == "model/mine.yaml"
        assert composed.choices["model"] == "mine"

    def test_moetrains_presets_stay_beside_ones_own(self, own):
        assert usable("model=gpt2_124m", config_dir=own("model/mine", self.MINE)) == usable("model=gpt2_124m")

    def test_the_next_call_knows_nothing_of_them(self, own):
        usable("model=mine", config_dir=own("model/mine", self.MINE))
        assert "'model=mine' is not there" in problems("model=mine")[0]

    def test_several_experiments_lie_over_one_another(self, own):
        own("experiment/a", "# @package _global_\nname: a\noptim:\n  lr: 1.0\n")
        directory = own("experiment/b", "# @package _global_\nname: b\n")
        composed = compose(["experiment=[a,b]"], config_dir=directory)
        assert (composed.settings["name"], composed.settings["optim"]["lr"]) == ("b", 1.0)
        assert (composed.sources["name"], composed.sources["optim.lr"]) == ("experiment/b.yaml", "experiment/a.yaml")

    def test_one_with_the_name_of_ours_is_refused_rather_than_hidden(self, own):
        (problem,) = problems(config_dir=own("model/tiny", self.MINE))
        assert problem.endswith("model/tiny.yaml would be hidden by moetrain's file of this name: rename it")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("d_model: [1\n", "mine.yaml"),
            ("d_model: 64\nd_model: 32\n", "found duplicate key d_model"),
            ("- 1\n- 2\n", "In 'model/mine'"),
            ("just text\n", "mine"),
            (b"d_model: \xff\xfe\n", "is no UTF-8 text"),
            ("defaults:\n  - nope: x\nd_model: 3\n", "In 'model/mine': Could not find 'model/nope/x'"),
            ("d_model: ${nope}\n", "'model.d_model': Interpolation key 'nope' not found"),
            ("d_model: '64'\n", "'model.d_model' is '64', but must be a whole number"),
            (
                "num_expert: 3\n",
                "model/mine.yaml: 'model.num_expert' is not a setting; did you mean 'model.moe.num_experts'?",
            ),
            (
                "d_model: {wide: 3}\n",
                "model/mine.yaml: 'model.d_model.wide' is not a setting; did you mean 'model.d_model'?",
            ),
            ("hydra:\n  verbose: true\n", "model/mine.yaml: 'model.hydra.verbose' is not a setting"),
        ],
    )
    def test_a_fault_in_a_file_is_told(self, own, text, message):
        (problem,) = problems("model=mine", config_dir=own("model/mine", text))
        assert message in problem
        assert "\n" not in problem

    def test_all_unknown_settings_of_a_file_are_told(self, own):
        directory = own("experiment/mine", "# @package _global_\nsed: 1\noptim:\n  lrr: 1\n  lr: 1\n")
        assert problems("experiment=mine", config_dir=directory) == [
            "experiment/mine.yaml: 'sed' is not a setting; did you mean 'seed'?",
            "experiment/mine.yaml: 'optim.lrr' is not a setting; did you mean 'optim.lr'?",
        ]

    def test_a_file_with_nothing_in_it_changes_nothing(self, own):
        assert usable("model=mine", config_dir=own("model/mine", "")).model.d_model == RunConfig().model.d_model


class TestMessages:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("num_experts=16", "'num_experts' is not a setting; did you mean 'model.moe.num_experts'?"),
            ("model.num_experts=16", "'model.num_experts' is not a setting; did you mean 'model.moe.num_experts'?"),
            ("moe.num_experts=16", "'moe.num_experts' is not a setting; did you mean 'model.moe.num_experts'?"),
            ("+moe.num_expert=16", "'moe.num_expert' is not a setting; did you mean 'model.moe.num_experts'?"),
            ("experts=4", "'experts' is not a setting; did you mean 'model.moe.num_experts'?"),
            ("lr=1", "'lr' is not a setting; did you mean 'optim.lr'?"),
            ("experiments=a", "'experiments' is not a setting; did you mean 'experiment'?"),
            ("++foo=1", "'foo' is not a setting; see `moetrain config` for those there are"),
            ("hydra.mode=MULTIRUN", "'hydra.mode' is not a setting"),
            ("hydra/launcher=basic", "'hydra/launcher' is not a setting"),
            ("defaults=[]", "'defaults' is not a setting"),
            ("=", "'' is not a setting"),
            ("+=", "'' is not a setting"),
            ("model/moee=none", "'model/moee' is not a setting; did you mean 'model/moe'?"),
            ("model=mixtrl", "did you mean 'mixtral_8x7b'?"),
            ("model=mixtral_8x7b.yaml", "did you mean 'mixtral_8x7b'?"),
            ("model=zzz", f"'model=zzz' is not there: model is one of {', '.join(MODELS)}"),
            ("model=null", "'model=null' is not there: model is one of"),
            ("model=8", "'model=8' is not there: model is one of"),
            ("model={a:1}", "'model={a:1}' is not there: model is one of"),
            ("model=[tiny,gpt2_124m]", "'model=[tiny,gpt2_124m]' is not there: model is one of"),
            ("model=${name}", "'model=${name}' is not there: model is one of"),
            ("model/moe=dense", "'model/moe=dense' is not there: model/moe is one of none, preset, top2_8e"),
            ("launch=cloud", "'launch=cloud' is not there: launch is one of hostfile, kubernetes, local, slurm"),
            ("experiment=null", "'experiment=null' is not there: experiment is one of"),
            ("experiment=[zzz]", "'experiment=[zzz]' is not there: experiment is one of"),
            ("+experiment=expert_parallel_4", "write experiment=expert_parallel_4, without the +"),
            ("model@pkg=tiny", "'model@pkg=tiny' names a package, but a preset has one place: write model=NAME"),
            ("optim.lr=1,2", "'optim.lr=1,2' gives several values, but a run has one of each: use moetrain sweep"),
            ("data.text=a,b", "write 'data.text=[a,b]'"),
            ("model=tiny,gpt2_124m", "'model=tiny,gpt2_124m' gives several values"),
            ("optim.lr=choice(1,2)", "'optim.lr=choice(1,2)' gives several values"),
            ("~optim.lr", "'~optim.lr' takes a setting away, but a run has all of them: give it a value, or null"),
            ("~model", "'~model' takes a setting away"),
            ("+optim.lr=1", "Could not append to config. An item is already at 'optim.lr'. Either remove + prefix"),
            ("tiny", "'tiny' is not an override: write key=value"),
            ("name=a, b]", "'name=a, b]' is not an override: write key=value; quote values with"),
            ("", "'' is not an override"),
            ("seed=" + 5000 * "1", "is not an override"),
            ("name=" + 3000 * "[", "is not an override"),
            ("optim.lr=abc", "'optim.lr' is 'abc', but must be a number"),
            ("optim.lr=", "'optim.lr' is '', but must be a number"),
            ("optim.lr=${nope}", "'optim.lr': Interpolation key 'nope' not found"),
            ("optim.lr=???", "'optim.lr': Missing mandatory value"),
            ("optim.lr.x=1", "'optim.lr.x' is not a setting"),
            ("optim=3", "'optim' is 3, but must be a section of settings"),
            ("name=2024", "'name' is 2024, but must be text or null: on the command line, 'name=\"2024\"' is text"),
            ("model.moe=3", "'model.moe' is 3, but must be a section of settings"),
        ],
    )  # fmt: skip
    def test_a_slip_is_told_in_a_line(self, override, message):
        (problem,) = problems(override)
        assert message in problem
        assert "\n" not in problem

    @pytest.mark.parametrize("dense", ["model/moe=none", "model=gpt2_124m", "model.moe=null"])
    def test_a_setting_of_experts_on_a_dense_model_is_told_with_two_ways_out(self, dense):
        assert problems(dense, "model.moe.top_k=1") == [
            "'model.moe.top_k' is set, but the model is dense (model.moe is null): choose model/moe=top2_8e, or leave "
            "the setting out"
        ]
        chosen = "model/moe=top2_8e"
        overrides = [dense, chosen] if dense.startswith("model=") else [chosen]
        assert usable(*overrides, "model.moe.top_k=3").model.moe.top_k == 3
        usable(dense)

    def test_all_unknown_settings_are_told_at_once(self):
        told = problems("lr=1", "model=zzz", "seed=1", "optim.lr=1,2", "~seed", "foo.bar=2")
        assert [problem.split()[0] for problem in told] == [
            "'lr'",
            "'model=zzz'",
            "'optim.lr=1,2'",
            "'~seed'",
            "'foo.bar'",
        ]

    def test_all_words_that_are_no_overrides_are_told_at_once(self):
        assert [problem.split()[0] for problem in problems("a", "optim.lr=1", "b")] == ["'a'", "'b'"]

    def test_text_as_the_message_says_is_taken(self):
        assert usable('name="2024"').name == "2024"
        assert usable("data.text=[a,b]").data.text == ["a", "b"]
        assert usable("name='a, b'").name == "a, b"
        assert usable("++optim.lr=3").optim.lr == 3.0


NAMES = sorted(setting_names() | {"model/moe", "launch", "experiment", "hydra.mode", "hydra", "defaults", "schema"})
KEYS = st.one_of(st.sampled_from(NAMES), st.text(max_size=8))
VALUES = st.one_of(
    st.sampled_from(
        ["1", "null", "1e3", "a,b", "[a,b]", "{a:1}", "${seed}", "${x", "'", '"a"', "glob(*)", "\\", "tiny"]
    ),
    st.text(max_size=8),
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.builds(
        "{}{}{}{}".format, st.sampled_from(["", "+", "++", "~"]), KEYS, st.sampled_from(["=", "@p=", ""]), VALUES
    ),
)


@settings(max_examples=150)
@example(["model.moe=null", "+model.moe.top_k=1"])
@example(["+model/moe=none", "model/moe=none"])
@example(["experiment=[expert_parallel_4]", "experiment=expert_parallel_4"])
@given(st.lists(WORDS, max_size=3))
def test_whatever_is_typed_only_a_config_error_comes_out(words):
    with suppress(ConfigError):
        usable(*words)
