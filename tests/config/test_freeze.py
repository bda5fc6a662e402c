"""Dicts to settings and back; what is told of those that do not fit."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config import data, schema
from moetrain.config.freeze import (
    RUN_FILE,
    flatten,
    freeze,
    freeze_section,
    is_setting,
    read_run,
    setting_names,
    suggest,
    to_dict,
    write_run,
)
from moetrain.config.launch import settings
from moetrain.config.schema import RunConfig, SampleConfig
from moetrain.errors import ConfigError

VALUES = {
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: st.text(),
    type(None): st.none(),
}


def instances(section: type) -> st.SearchStrategy[Any]:
    """Any values of the right types, sense or nonsense."""
    hints = typing.get_type_hints(section)
    return st.builds(section, **{each.name: values(hints[each.name]) for each in dataclasses.fields(section)})


def values(hint: Any) -> st.SearchStrategy[Any]:
    kind, inside = typing.get_origin(hint), typing.get_args(hint)
    if kind is list:
        return st.lists(values(inside[0]), max_size=3)
    if kind is dict:
        return st.dictionaries(st.text(), values(inside[1]), max_size=3)
    options = inside
    if options:
        return st.one_of([values(option) for option in options])
    return instances(hint) if dataclasses.is_dataclass(hint) else VALUES[hint]


RUNS = instances(RunConfig)


def problems(settings: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        freeze(settings)
    return caught.value.problems


@given(RUNS)
def test_a_run_survives_the_way_through_a_dict(run):
    assert freeze(to_dict(run)) == run


@given(run=RUNS)
def test_a_run_survives_the_way_through_its_file(run, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp()
    write_run(run, directory)
    assert read_run(directory) == run
    assert [path.name for path in directory.glob("run.yaml*")] == [RUN_FILE], "no temporary file stays"


def test_no_settings_are_the_defaults():
    assert freeze({}) == RunConfig()


def test_a_section_in_part_keeps_its_other_defaults():
    run = freeze({"optim": {"lr": 0.5}, "model": {"moe": {"top_k": 1}}})
    assert run.optim == schema.OptimConfig(lr=0.5)
    assert run.model == schema.ModelConfig(moe=schema.MoEConfig(top_k=1))


def test_a_whole_number_serves_as_a_number():
    lr = freeze({"optim": {"lr": 1}}).optim.lr
    assert (lr, type(lr)) == (1.0, float)


def test_one_text_serves_as_a_list_of_one():
    assert freeze({"data": {"text": "a.txt"}}).data.text == ["a.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1.5}, "'seed' is 1.5, but must be a whole number"),
        ({"seed": True}, "'seed' is true, but must be a whole number"),
        ({"seed": None}, "'seed' is null, but must be a whole number"),
        ({"optim": {"lr": "3e-4"}}, "'optim.lr' is '3e-4', but must be a number"),
        ({"optim": {"lr": False}}, "'optim.lr' is false, but must be a number"),
        ({"optim": {"lr": 10**400}}, "but must be a number"),
        ({"checkpoint": {"every_minutes": "ten"}}, "'checkpoint.every_minutes' is 'ten', but must be a number or null"),
        ({"model": {"bias": 1}}, "'model.bias' is 1, but must be true or false"),
        ({"model": {"bias": "yes"}}, "'model.bias' is 'yes', but must be true or false"),
        ({"model": {"norm": None}}, "'model.norm' is null, but must be text"),
        ({"name": 2024}, "'name' is 2024, but must be text or null: on the command line, 'name=\"2024\"' is text"),
        ({"name": ["a"]}, "'name' is ['a'], but must be text or null"),
        ({"data": {"text": ["a", 1]}}, "'data.text' is ['a', 1], but must be a list of texts"),
        ({"data": {"text": None}}, "'data.text' is null, but must be a list of texts"),
        ({"model": {"moe": {"top_k": "2"}}}, "'model.moe.top_k' is '2', but must be a whole number"),
        ({"optim": 3}, "'optim' is 3, but must be a section of settings"),
        ({"optim": None}, "'optim' is null, but must be a section of settings"),
        ({"model": {"moe": [1]}}, "'model.moe' is [1], but must be a section of settings"),
    ],
)
def test_a_wrong_type_is_told_with_the_right_one(settings, message):
    (problem,) = problems(settings)
    assert message in problem


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("modle", "model"),
        ("sed", "seed"),
        ("optmi", "optim"),
        ("num_experts", "model.moe.num_experts"),
        ("moe", "model.moe"),
        ("model.num_experts", "model.moe.num_experts"),
        ("model.moe.num_expert", "model.moe.num_experts"),
        ("experts", "model.moe.num_experts"),
        ("lr", "optim.lr"),
        ("model.lr", "optim.lr"),
        ("optim.lrr", "optim.lr"),
        ("steps", "schedule.steps"),
        ("max_steps", "schedule.steps"),
        ("model.layers", "model.num_layers"),
        ("optim.beta_1", "optim.beta1"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("evaluate.every_step", "evaluate.every_steps"),
        ("run-dir", "run_dir"),
    ],
)
def test_an_unknown_name_gets_the_right_suggestion(name, meant):
    settings: Any = 1
    for part in reversed(name.split(".")):
        settings = {part: settings}
    assert f"; did you mean '{meant}'?" in problems(settings)[0]


def test_a_name_like_no_other_gets_no_suggestion():
    assert problems({"zzz": 1}) == ["'zzz' is not a setting; see `moetrain config` for those there are"]


@given(st.text())
def test_a_suggestion_names_a_setting_that_is(name):
    hint = suggest(name, setting_names())
    assert hint == "" or hint.removeprefix("; did you mean '").removesuffix("'?") in setting_names()


def test_all_problems_are_told_at_once_in_the_order_of_the_schema():
    told = problems({"log": {"every_steps": "x"}, "nope": 1, "seed": "s", "model": {"moe": {"topk": 1}, "bias": 0}})
    named = [problem.split("'")[1] for problem in told]
    assert named == ["nope", "seed", "model.bias", "model.moe.topk", "log.every_steps"]


def test_an_unknown_setting_of_a_verb_is_told_with_those_it_has():
    with pytest.raises(ConfigError) as caught:
        freeze_section(SampleConfig, {"zzz": 1, "promt": "a"})
    names = [each.name for each in dataclasses.fields(SampleConfig)]
    assert caught.value.problems == [
        f"'zzz' is not a setting: use {', '.join(names)}",
        "'promt' is not a setting; did you mean 'prompt'?",
    ]


def test_a_directory_without_a_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/run.yaml does not exist: name the directory of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- 1\n", b"", b"a: 1\n", b"seed: x\n"])
def test_a_damaged_run_file_is_told_with_its_path(tmp_path, content):
    (tmp_path / RUN_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/run.yaml"):
        read_run(tmp_path)


def test_a_run_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_run(RunConfig(seed=1), tmp_path)

    def crash(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="Input/output"):
        write_run(RunConfig(seed=2), tmp_path)
    assert read_run(tmp_path).seed == 1


@given(RUNS)
def test_flat_names_are_those_of_the_settings(run):
    flat = flatten(to_dict(run))
    assert all(is_setting(name) for name in flat)
    assert flat["optim.lr"] == run.optim.lr


def test_every_setting_has_a_line_of_meaning_below_it():
    trees = [ast.parse(Path(inspect.getfile(module)).read_text()) for module in (schema, data, settings)]
    sections = {node.name: node.body for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    checked = 0
    for name, body in sections.items():
        for statement, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.annotation) not in sections:
                explained = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                assert explained, f"{name}.{ast.unparse(statement.target)}"
                checked += 1
    classes = {
        value for each in (schema, data, settings) for value in vars(each).values() if dataclasses.is_dataclass(value)
    }
    fields = [each for section in classes for each in dataclasses.fields(section)]
    sub_sections = [each for each in fields if each.type in sections]
    assert checked == len(fields) - len(sub_sections), "and none was overlooked"
