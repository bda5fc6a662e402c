"""What the terminal shows: the settings, the end of a run."""

from __future__ import annotations

import json
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.checks import resolve
from moetrain.config.freeze import flatten, freeze, to_dict
from moetrain.config.identity import training_digest
from moetrain.config.schema import MoEConfig, RunConfig, ScheduleConfig
from moetrain.report import screen
from moetrain.report.screen import Baselines, config_text, is_finished, last_screen, recorded_dense

RUN = resolve(
    freeze({"name": "a", "schedule": {"steps": 20}, "model": {"moe": {"d_expert": 512}}}), default_processes=2
)
DENSE = replace(RUN, model=replace(RUN.model, moe=None))
STEP = {"step": 20, "tokens": 81_920, "tokens_per_second": 1000.0, "flops_per_second": 2e9, "mfu": None}
FINAL = {
    "step": 20, "tokens": 81_920, "final": True, "held_out_loss": 5.0, "perplexity": 148.4, "bits_per_byte": 2.5,
    "held_out_load": [[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]], "held_out_max_over_mean": [1.5, 1.8],
}  # fmt: skip


def with_metrics(directory: Path, *lines: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@given(name=st.text(), text=st.lists(st.text(), min_size=1), lr=st.floats(allow_nan=False))
def test_the_settings_shown_are_yaml_of_a_line_each(name, text, lr):
    run = replace(RUN, name=name, data=replace(RUN.data, text=text), optim=replace(RUN.optim, lr=lr))
    shown = config_text(run, composed=to_dict(run), sources={"optim.lr": "model/a.yaml"})
    assert freeze(yaml.safe_load(shown)) == run
    sections = [value for value in vars(run).values() if is_dataclass(value)]
    sections += [value for section in sections for value in vars(section).values() if is_dataclass(value)]
    assert len(shown.split("\n")) == len(flatten(to_dict(run))) + len(sections)


def test_a_value_left_to_be_worked_out_says_so():
    composed = to_dict(replace(RUN, run_dir=None))
    lines = config_text(RUN, composed=composed, sources={}).splitlines()
    assert [line.split("  # ")[1] for line in lines if line.startswith(("run_dir:", "seed:"))] == [
        "worked out",
        "default",
    ]


@pytest.mark.parametrize(
    ("lines", "finished"),
    [
        ([], False),
        ([STEP], False),
        ([{**FINAL, "step": 10}], False),
        ([STEP, FINAL], True),
        ([{**FINAL, "step": 10}, FINAL], True),
    ],
)
def test_a_run_is_finished_when_its_last_step_was_evaluated(tmp_path, lines, finished):
    assert is_finished(RUN, with_metrics(tmp_path, *lines)) == finished


def test_a_run_that_has_not_begun_is_not_finished(tmp_path):
    assert not is_finished(RUN, tmp_path)


def test_a_run_made_longer_is_not_finished(tmp_path):
    with_metrics(tmp_path, STEP, FINAL)
    assert not is_finished(replace(RUN, schedule=ScheduleConfig(steps=21)), tmp_path)
    in_tokens = ScheduleConfig(steps=None, tokens=20 * 16 * 256)
    assert is_finished(replace(RUN, schedule=in_tokens), tmp_path)


def show(capsys: pytest.CaptureFixture[str], run: RunConfig, run_dir: Path) -> str:
    last_screen(
        run,
        run_dir=run_dir,
        baselines=Baselines(trigram=2.75, xz=2.9),
        opening="My fellow",
        sample="[bold]once[/bold] [x]",
    )
    return capsys.readouterr().out


def test_the_end_of_a_run_says_what_it_reached_and_what_next(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run_dir = with_metrics(tmp_path / "run [a] b", STEP, FINAL)
    text = show(capsys, RUN, run_dir)
    for expected in (
        f"{run_dir} is finished: 20 steps, 81.9 K tokens",
        "this model (8 experts, top-2)",
        "2.5000",
        "byte trigram",
        "2.7500",
        "2.9000",
        "fullest expert 1.80x the mean (MoE layer 1); 1 experts without a token",
        "[bold]once[/bold] [x]",  # a model may write anything: none of it is ours to interpret
        f"moetrain sample '{run_dir}' prompt=",
        "1,000 tokens/s, 2 GFLOP/s",
    ):
        assert expected in text, expected


def test_a_dense_run_says_nothing_of_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    final = {name: value for name, value in FINAL.items() if "load" not in name and "max_over" not in name}
    text = show(capsys, DENSE, with_metrics(tmp_path / "run", STEP, final))
    assert "dense model" in text
    assert "expert load" not in text
    assert "same active size" not in text


def test_the_recorded_dense_twin_is_found_by_what_decides_the_training(tmp_path, monkeypatch):
    recorded = tmp_path / "recorded.json"
    recorded.write_text(json.dumps({"dense_bits_per_byte": {training_digest(DENSE): 2.25}}))
    monkeypatch.setattr(screen, "RECORDED", recorded)
    assert recorded_dense(RUN) == 2.25
    assert recorded_dense(replace(RUN, model=replace(RUN.model, moe=MoEConfig(num_experts=64, d_expert=512)))) == 2.25
    assert recorded_dense(replace(RUN, model=replace(RUN.model, moe=MoEConfig(top_k=4, d_expert=512)))) is None
    assert recorded_dense(replace(RUN, seed=2)) is None
