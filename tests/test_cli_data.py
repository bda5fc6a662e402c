"""`moetrain data show`: the very batch of a step, as text."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from moetrain.cli.main import main
from moetrain.cli.options import Options, corpus_of, settings
from moetrain.data.build import make_batches
from moetrain.report.batch import BORDER

SMALL = ["model.vocab_size=300", "model.context=16", "batch.global_batch=8", "launch.processes=1"]
TWO = "data.sources={a:{text:a.jsonl,weight:1},b:{text:b.jsonl,weight:1}}"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for name, word in (("a", "apple"), ("b", "banana")):
        rows = [json.dumps({"text": f"{word} number {n}, " * (n % 4 + 1)}) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys, *words: str) -> str:
    assert main(["data", "show", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_every_sample_of_the_step_is_there_as_text(place, capsys):
    out = shown(capsys, *SMALL, TWO, "step=3", "samples=0")
    run, _ = settings(Options.read([*SMALL, TWO]))
    corpus = corpus_of(run)
    batches = make_batches(run, corpus)
    tokenizer = Tokenizer.from_file(str(corpus.first.tokenizer_path))
    for row, source in zip(batches.at(3).tokens, batches.located(3).source, strict=True):
        pieces: list[list[int]] = [[]]
        for token in row.tolist():
            pieces.append([]) if token == corpus.first.meta.end_of_text else pieces[-1].append(token)
        assert BORDER.join(map(tokenizer.decode, pieces)) + "\n" in out
        assert ("banana" if source else "apple") in tokenizer.decode(row.tolist())
    assert out.count("\nsample ") == 8
    assert f"step 3 of 700: samples 24 to 31, 8 sequences of 16 tokens, sha256 {batches.fingerprint(3)[:16]}" in out
    rows = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if line.split()[:1] in (["a"], ["b"])}
    assert rows == {"a": ["4", "64", "50.0%"], "b": ["4", "64", "50.0%"]}


def test_a_few_samples_and_a_picture(place, capsys):
    out = shown(capsys, *SMALL, TWO, "samples=1", "picture=lengths.png")
    assert out.count("\nsample ") == 1
    assert "7 more; samples=0 shows all" in out
    data = (place / "lengths.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1200, 600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data wants to know what to do: write `moetrain data show`"),
        (["shw"], "data has no verb 'shw': write `moetrain data show`"),
        (["show", "step=x"], "step is 'x', but must be a whole number from 0"),
        (["show", "step=700", *SMALL, "data.text=a.jsonl"], "step is 700, but the run has 700: use 0 to 699"),
        (["show", "--picture"], "--picture is not an option"),
        (["show", "data.fill_in_middle=0.5", *SMALL, "data.text=a.jsonl"], "has no tokens that mark the parts"),
    ],
)
def test_what_cannot_be_shown_is_told(place, capsys, words, message):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["data", "show"], ["prepare"]])
def test_a_stream_has_no_token_files_to_show_or_to_make(place, capsys, words):
    assert main([*words, *SMALL, "data.text=a.jsonl", "data.stream=true"]) == 2
    told = capsys.readouterr().err
    assert "data.stream is true, but this needs token files" in told
    assert not (place / "prepared").exists()
