"""What may be asked of a benchmark."""

from __future__ import annotations

import sys

import pytest

from moetrain.bench.settings import LayerSettings, StepSettings, missing, plan_text, read, shapes
from moetrain.errors import ConfigError


def told(kind: type, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(kind, words)
    return caught.value.problems


def test_no_words_are_the_defaults():
    assert read(LayerSettings, []) == LayerSettings()
    assert read(StepSettings, []) == StepSettings()


@pytest.mark.parametrize("text", ["experts=8,16", "experts=[8,16]", "experts=[8, 16]", "experts=8,16,8"])
def test_a_value_may_be_a_list(text):
    assert read(LayerSettings, [text]).experts == (8, 16)


def test_one_value_is_a_list_of_one():
    settings = read(LayerSettings, ["tokens=4096", "dtype=bf16", "routing=skewed", "top_k=2", "contestants=floor"])
    assert (settings.tokens, settings.dtype, settings.routing) == (4096, ("bf16",), ("skewed",))
    assert (settings.top_k, settings.contestants) == ((2,), ("floor",))


def test_the_default_shapes_are_those_of_the_comparison():
    assert shapes(LayerSettings()) == [(8, 2), (64, 2), (64, 8)]
    assert shapes(StepSettings()) == [(8, 2), (64, 2)]


def test_all_words_that_are_wrong_are_told_at_once():
    assert told(LayerSettings, "token=1", "zzz=1", "fast", "repeats=few", "experts=8,many") == [
        "'token' is not a setting; did you mean 'tokens'?",
        "'zzz' is not a setting: use tokens, d_model, d_ff, experts, top_k, routing, dtype, contestants, repeats, "
        "device",
        "'fast' is not a setting: write key=value, e.g. dtype=bf16",
        "'repeats' is 'few', but must be a whole number",
        "'experts' is 'many', but must be a whole number",
    ]


@pytest.mark.parametrize(
    ("kind", "words", "problem"),
    [
        (LayerSettings, "dtype=fp16", "dtype is 'fp16', but must be one of fp32, bf16"),
        (LayerSettings, "routing=uneven", "routing is 'uneven', but must be one of balanced, skewed"),
        (LayerSettings, "device=tpu", "device is 'tpu', but must be one of auto, cpu, cuda"),
        (LayerSettings, "repeats=0", "repeats is 0, but must be from 1 to 17,179,869,184"),
        (LayerSettings, "experts=", "'experts' is '', but must be a whole number"),
        (LayerSettings, "top_k=3", "d_ff is 1024, but must be a multiple of top_k, 3"),
        (LayerSettings, "d_model=32", "d_model is 32, but must be at least the number of experts, 64"),
        (StepSettings, "heads=3", "d_model is 256, but must be a multiple of 2 x heads, 6"),
        (StepSettings, "tokens=1", "'tokens' is not a setting"),
        (StepSettings, "contestants=floor", "contestants is 'floor', but must be one of dense, moetrain"),
    ],
)
def test_a_broken_rule_names_the_field_its_value_and_a_way_out(kind, words, problem):
    (found,) = told(kind, *words.split())
    assert problem in found


def test_a_dense_shape_is_no_shape():
    (problem,) = told(LayerSettings, "experts=2", "top_k=2,4")
    assert problem.startswith("experts is 2 and top_k 2,4, but one pair at least must have more experts")


def test_a_package_that_is_not_there_is_missed_only_by_those_who_want_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert missing(LayerSettings()) == {"transformers": "pip install 'transformers>=5,<6'"}
    assert missing(LayerSettings(contestants=("floor", "deepspeed_no_drop"))) == {}
    text = plan_text(LayerSettings())
    assert text.startswith("would time dense, floor, moetrain, deepspeed_capacity, deepspeed_no_drop\n")
    assert "  transformers is not installed, and its rows are left out: pip install 'transformers>=5,<6'" in text
