"""Text by source: the numbers are those of a plain loop over every token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from as_typed import assert_told
from own_runs import write_own_run

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.corpus import Prepared
from moetrain.hub.generate import load_model
from moetrain.page.experts import apart
from moetrain.prepare.directory import prepare

S = 12
MODEL = ModelConfig(vocab_size=300, context=S, num_layers=4, d_model=16, num_heads=2, d_ff=24,
                    moe=MoEConfig(num_experts=3, top_k=2, d_expert=8, every=2))  # fmt: skip


def prepared(place: Path, name: str, words: str, *, tokenizer: str | None) -> Prepared:
    (place / f"{name}.txt").write_text("")
    directory = place / name / "texts"
    directory.mkdir(parents=True)
    for number in range(12):
        (directory / f"{number}.txt").write_text(f"{words} {number} " * (number + 3))
    return prepare(place / "prepared" / name, text=[str(directory / "*.txt")], text_column="text", held_out=0.4,
                   vocab_size=290, tokenizer=tokenizer, progress=lambda *_: None)  # fmt: skip


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Prepared]:
    first = prepared(tmp_path, "speeches", "the state of the union is strong", tokenizer=None)
    second = prepared(tmp_path, "sums", "1 + 12 = 13, é", tokenizer=str(first.tokenizer_path))
    return {"speeches": first, "sums": second}


@pytest.fixture
def run_dir(tmp_path: Path, sources: dict[str, Prepared]) -> Path:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sources["speeches"].tokenizer_path))
    given = {name: {"prepared": str(part.directory)} for name, part in sources.items()}
    write_own_run(tmp_path / "run", MODEL, tokenizer, sources=given)
    return tmp_path / "run"


def plainly(run_dir: Path, part: Prepared, split: str) -> tuple[float, list[list[int]]]:
    """Nats of the tokens, one by one, and how often each block chose each expert."""
    _, gpt = load_model(run_dir, warn=pytest.fail)
    ids = getattr(part, split).tokens.tolist()
    nats, counts = 0.0, [[0] * 3 for _ in range(2)]
    for at in range(1, len(ids)):
        begin = (at - 1) // S * S
        with torch.no_grad():
            output = gpt(torch.tensor([ids[begin:at]]))
        nats -= float(output.logit_BSV[0, -1].double().log_softmax(-1)[ids[at]])
        for layer, moe in enumerate(output.moe):
            for expert in moe.choice.expert_TK[-1].tolist():
                counts[layer][expert] += 1
    return nats, counts


@pytest.mark.parametrize(("split", "words"), [("held_out", ()), ("train", ("split=train",))])
def test_every_token_counts_once(run_dir, sources, moetrain_in_process, split, words):
    done = moetrain_in_process("evaluate", str(run_dir), "json=true", "micro_batch=3", *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    total_nats, total_bytes, total_tokens = 0.0, 0, 0
    for each, (name, part) in zip(told["sources"], sources.items(), strict=True):
        nats, counts = plainly(run_dir, part, split)
        text = getattr(part, split)
        assert (each["name"], each["tokens"]) == (name, text.num_tokens - 1)
        assert each["loss"] == pytest.approx(nats / each["tokens"], rel=1e-5)
        assert each["perplexity"] == pytest.approx(math.exp(each["loss"]))
        per_byte = nats / each["tokens"] * text.num_tokens / math.log(2) / text.num_bytes
        assert each["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)
        # the last token of a sequence goes in as well, and nothing is predicted from the last one of all
        for layer in range(2):
            assert each["share_LE"][layer] == pytest.approx([n / sum(counts[layer]) for n in counts[layer]], abs=0.01)
        total_nats += each["loss"] * text.num_tokens
        total_bytes, total_tokens = total_bytes + text.num_bytes, total_tokens + text.num_tokens
    assert told["all"]["loss"] == pytest.approx(total_nats / total_tokens)
    assert told["all"]["bits_per_byte"] == pytest.approx(total_nats / math.log(2) / total_bytes)


def test_any_prepared_text_is_a_source(run_dir, sources, moetrain_in_process):
    both = json.loads(moetrain_in_process("evaluate", str(run_dir), "json=true").stdout)
    one = moetrain_in_process("evaluate", str(run_dir), f"data={sources['sums'].directory}", "json=true")
    assert json.loads(one.stdout)["sources"] == both["sources"][1:]


def test_the_table_names_sources_and_their_experts(run_dir, moetrain_in_process):
    out = moetrain_in_process("evaluate", str(run_dir), "max_sequences=2").stdout
    lines = [line.split() for line in out.splitlines() if line and not line.startswith(("evaluate", "experts by"))]
    assert [line[0] for line in lines[:4]] == ["source", "speeches", "sums", "all"]
    assert [line[:2] for line in lines[-4:]] == [["0", "speeches"], ["0", "sums"], ["1", "speeches"], ["1", "sums"]]


def test_how_far_sources_are_apart():
    assert apart([0.5, 0.5, 0], [0, 0.5, 0.5]) == 0.5
    assert apart([1, 0], [0, 1]) == 1
    assert apart([0.25] * 4, [0.25] * 4) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "0 paths are given, but it takes 1 (RUN)"),
        (("nowhere",), "nowhere/run.yaml does not exist"),
        (("nowhere", "split=test", "limit=0"), "split is 'test', but must be one of held_out, train"),
        (("nowhere", "limit=3"), "limit is set, but belongs to tasks=…"),
        (
            ("nowhere", "tasks=a", "split=train"),
            "split is set, but belongs to the text, which tasks=… takes the place of",
        ),
        (("nowhere", "tasks=a", "include=nowhere"), "include is nowhere, but must be a directory"),
        (("nowhere", "max_sequences=-1"), "max_sequences is -1, but must be at least 0"),
    ],
)
def test_what_is_wrong_is_told(moetrain_in_process, words, told):
    assert_told(moetrain_in_process("evaluate", *words), told)


def test_text_that_is_named_twice_is_told(run_dir, tmp_path, moetrain_in_process):
    place = next(path.parent for path in tmp_path.rglob("meta.json"))
    words = ("evaluate", str(run_dir), f"data={place}", f"data={place}")
    assert_told(moetrain_in_process(*words), f"data names {place} more than once")


def test_text_of_another_tokenizer_is_refused(run_dir, tmp_path, moetrain_in_process):
    other = prepared(tmp_path, "other", "another text altogether, with words of its own", tokenizer=None)
    assert_told(moetrain_in_process("evaluate", str(run_dir), f"data={other.directory}"),
                "was prepared with another tokenizer than")  # fmt: skip
