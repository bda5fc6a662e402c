"""Sources and mixtures: the rules of their settings, and what a source takes from the others."""

from __future__ import annotations

from typing import Any

import pytest

from moetrain.config.checks import check, resolve
from moetrain.config.data import DataConfig, SourceConfig, label_of, sources_of, with_prepared
from moetrain.config.freeze import flatten, freeze, read_run, to_dict, write_run
from moetrain.config.identity import differences, is_fixed, training_digest
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

A, B = {"text": ["a.txt"]}, {"prepared": "b"}
TWO = {"a": A, "b": B}


def checked(**data: Any) -> RunConfig:
    run = resolve(freeze({"name": "a", "data": data}), default_processes=2)
    check(run, flatten(to_dict(run)))
    return run


RULES: list[tuple[dict[str, Any], str]] = [
    ({"mixture": [{}]}, "data.mixture is set, but there is one source alone"),
    ({"stream": True, "sources": TWO}, "data.stream is true, but data.sources names several sources"),
    ({"stream": True, "format": "instruction"}, "data.stream is true, but data.format is instruction"),
    ({"stream": True, "prepared": "a"}, "data.stream is true, but data.prepared is 'a', which needs no stream"),
    ({"stream": True, "max_epochs": 2}, "data.stream is true, but data.max_epochs is 2.0"),
    ({"stream_block": 0}, "data.stream_block is 0, but must be above 0"),
    ({"stream_window": -1}, "data.stream_window is -1, but must be above 0"),
    ({"sources": {}}, "data.sources is {}, but must name at least one source"),
    ({"sources": TWO, "text": ["c.txt"]}, "data.text is set, but data.sources says what is read"),
    ({"sources": TWO, "prepared": "c"}, "data.prepared is set, but data.sources says what is read"),
    ({"sources": {"a.b": A}}, "data.sources.a.b: the name of a source must be one word"),
    ({"sources": {"a": {}}}, "data.sources.a has neither text nor prepared"),
    ({"sources": {"a": A | {"held_out": 0.9}}}, "data.sources.a.held_out is 0.9, but must lie in (0, 0.5]"),
    ({"sources": {"a": A | {"weight": -1}}}, "data.sources.a.weight is -1.0, but must be at least 0"),
    ({"sources": {"a": A | {"epochs": 0}}}, "data.sources.a.epochs is 0.0, but must be above 0"),
    ({"sources": {"a": A | {"max_epochs": 0}}}, "data.sources.a.max_epochs is 0.0, but must be above 0"),
    ({"sources": {"a": A | {"weight": 1, "epochs": 2}}}, "data.sources.a has weight 1.0 and epochs 2.0, but one"),
    ({"sources": {"a": A | {"max_epochs": 1, "epochs": 2}}}, "data.sources.a.epochs is 2.0, but must be at most its"),
    ({"sources": {"a": A | {"epochs": 2}}, "max_epochs": 1}, "data.sources.a.epochs is 2.0, but must be at most its"),
    ({"sources": {"a": A | {"weight": 1}, "b": B}}, "data.sources.b.weight is null, but data.sources.a.weight is 1.0"),
    ({"sources": {"a": A | {"weight": 0}, "b": B | {"weight": 0}}}, "data.sources.a.weight is 0, and so are the"),
    ({"sources": TWO, "mixture": []}, "data.mixture is [], but must have at least one stage"),
    ({"sources": TWO, "mixture": [{"until": 0.5}]}, "data.mixture ends at 0.5, but must end at 1"),
    ({"sources": TWO, "mixture": [{"until": 0.0}, {}]}, "data.mixture[0].until is 0.0, but must be above 0.0"),
    ({"sources": TWO, "mixture": [{}, {}]}, "data.mixture[1].until is 1.0, but must be above 1.0"),
    ({"sources": TWO, "mixture": [{"weights": {"c": 1}}]}, "data.mixture[0].weights names 'c', but the sources are a"),
    ({"sources": TWO, "mixture": [{"weights": {"a": 1, "b": -1}}]}, "data.mixture[0].weights.b is -1.0, but must be"),
    ({"sources": TWO, "mixture": [{"weights": {"a": 0}}]}, "data.mixture[0].weights has nothing above 0"),
    ({"sources": {"a": A | {"epochs": 2}, "b": B}, "mixture": [{}]}, "data.sources.a.epochs is 2.0, but data.mixture"),
    ({"format": "chat"}, "data.format is 'chat', but must be one of text, instruction"),
    ({"sources": {"a": A | {"format": "x"}}}, "data.sources.a.format is 'x', but must be one of text, instruction"),
    ({"template": {"user": "{content}"}}, "data.template is set, but no text is of the format instruction"),
    ({"fill_in_middle": 1.5}, "data.fill_in_middle is 1.5, but must lie in [0, 1]"),
    ({"fill_in_middle_spm": -0.1}, "data.fill_in_middle_spm is -0.1, but must lie in [0, 1]"),
    ({"temperature": 0}, "data.temperature is 0.0, but must be above 0"),
    ({"max_epochs": -1}, "data.max_epochs is -1.0, but must be above 0"),
    ({"sources": {"a": {"txt": "a.txt"}}}, "'data.sources.a.txt' is not a setting; did you mean 'data.sources.a.text'"),
    ({"sources": {"a": A | {"weight": "x"}}}, "'data.sources.a.weight' is 'x', but must be a number or null"),
    ({"sources": ["a.txt"]}, "'data.sources' is ['a.txt'], but must be a section of settings or null"),
    ({"sources": TWO, "mixture": {"until": 1}}, "'data.mixture' is {'until': 1}, but must be a list of sections"),
    ({"sources": TWO, "mixture": [3]}, "'data.mixture[0]' is 3, but must be a section of settings"),
]


@pytest.mark.parametrize(("data", "message"), RULES, ids=[message[:60] for _, message in RULES])
def test_a_broken_rule_is_told(data, message):
    with pytest.raises(ConfigError) as caught:
        checked(**data)
    (problem,) = caught.value.problems
    assert problem.startswith(message)


def test_what_is_said_of_sources_and_stages_can_be_used():
    checked(sources={"a": A | {"weight": 2}, "b": B | {"epochs": 3}})
    checked(sources={"a": A, "b": B}, temperature=3, max_epochs=4)
    checked(sources=TWO, mixture=[{"until": 0.9}, {"weights": {"b": 1}}])


def test_a_source_takes_over_what_is_said_for_all():
    data = checked(sources={"a": A, "b": B | {"text_column": "body", "held_out": 0.1, "max_epochs": 9}},
                   text_column="content", held_out=0.2, max_epochs=4).data  # fmt: skip
    found = sources_of(data)
    assert found["a"] == SourceConfig(text=["a.txt"], text_column="content", format="text", held_out=0.2, max_epochs=4)
    assert found["b"] == SourceConfig(prepared="b", text_column="body", format="text", held_out=0.1, max_epochs=9)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (["builtin:sotu"], "sotu"), (["a/notes.jsonl.gz", "b.txt"], "notes"), (["/data/my corpus/"], "my-corpus"),
        (["books/*.txt"], "books"), (["**/*.txt"], "text"), ([], "text"), (["hf:owner/name@train"], "name"),
    ],
)  # fmt: skip
def test_a_corpus_without_a_name_is_called_as_the_first_of_its_text(text, label):
    assert label_of(DataConfig(text=text)) == label
    assert label_of(DataConfig(text=text, name="mine")) == "mine"


def test_text_alone_is_one_source():
    data = checked(text=["a.txt"], name="mine").data
    assert sources_of(data) == {"mine": SourceConfig(text=["a.txt"], text_column="text", format="text", held_out=0.05)}


def test_sources_come_back_from_the_file_of_the_run(tmp_path):
    run = checked(sources={"a": A | {"weight": 2}, "b": B | {"weight": 1}}, mixture=[{"until": 0.5}, {}])
    write_run(run, tmp_path)
    assert read_run(tmp_path) == run


def test_where_the_token_files_lie_is_no_part_of_what_a_run_is():
    run = checked(sources=TWO)
    moved = RunConfig(**vars(run) | {"data": with_prepared(run.data, {"a": "/x/a", "b": "/x/b"})})
    changed = differences(run, moved)
    assert set(changed) == {"data.sources.a.prepared", "data.sources.b.prepared"}
    assert not any(map(is_fixed, changed))
    assert training_digest(run) == training_digest(moved)


def test_other_sources_or_weights_are_another_run():
    run = checked(sources=TWO)
    for other in (
        checked(sources={"a": A}),
        checked(sources={"a": A | {"epochs": 1}, "b": B}),
        checked(),
        checked(sources={"b": B, "a": A}),
    ):
        assert any(map(is_fixed, differences(run, other)))
        assert training_digest(run) != training_digest(other)


def test_a_stream_cannot_look_for_duplicates():
    run = resolve(freeze({"name": "a", "data": {"stream": True}, "prepare": {"duplicates": "exact"}}),
                  default_processes=2)  # fmt: skip
    with pytest.raises(ConfigError, match=r"data\.stream is true, but prepare\.duplicates is 'exact'"):
        check(run, flatten(to_dict(run)))
