"""`moetrain data show`: the very batch of a step, as text."""

from __future__ import annotations

import json
import re
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stream_texts import opened, rows_of, write_rows
from tokenizers import Tokenizer

from moetrain.cli.main import main
from moetrain.cli.options import Options, corpus_of, settings
from moetrain.config.freeze import read_run
from moetrain.data.build import make_batches
from moetrain.report.batch import BORDER
from moetrain.stream.feed import streamed

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


@pytest.mark.parametrize("name", ["train.bin", "train.counted.npy", "tokenizer.json"])
def test_token_files_that_changed_are_found_before_they_are_read(place, capsys, name):
    rows = [json.dumps({"prompt": f"What is {n}?", "response": f"It is {n}."}) for n in range(40)]
    (place / "a.jsonl").write_text("\n".join(rows))
    words = [*SMALL, "data.text=a.jsonl", "data.format=instruction", "data.prepared=here"]
    shown(capsys, *words)
    assert "touched" not in shown(capsys, *words)
    time.sleep(0.01)
    path = place / "here" / name
    content = path.read_bytes()
    path.write_bytes(content)
    assert "here was touched since it was written: comparing it with its digests" in shown(capsys, *words)
    assert "touched" not in shown(capsys, *words)
    time.sleep(0.01)
    path.write_bytes(
        content.replace(b"<|endoftext|>", b"</s>") if "json" in name else content[:-1] + bytes([content[-1] ^ 1])
    )
    for _ in range(2):  # what was found once is not taken for compared
        assert main(["data", "show", *words]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data wants to know what to do: write `moetrain data show`"),
        (["shw"], "data has no verb 'shw': write `moetrain data show`"),
        (["show", "step=x"], "step is 'x', but must be a whole number from 0"),
        (["show", "step=700", *SMALL, "data.text=a.jsonl"], "step is 700, but the run has 700: use 0 to 699"),
        (["show", "--picture"], "--picture is not an option"),
        (["show", "run_dir=none"], "run_dir is none, but there is no run in it"),
        (["show", "data.fill_in_middle=0.5", *SMALL, "data.text=a.jsonl"], "has no tokens that mark the parts"),
    ],
)
def test_what_cannot_be_shown_is_told(place, capsys, words, message):
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("text:none.jsonl", "data.sources.b.text names 'none.jsonl', but there is no such file"),
        ("text:data.text", "data.sources.b.text names 'data.text', but there is no such file"),
        ("text:empty.jsonl", "data.sources.b.text holds no document at all"),
        ("text:b.jsonl,text_column:body", "set data.sources.b.text_column to the column with the text"),
        ("text:b.jsonl,prepared:foreign", "set data.sources.b.prepared to a new or an empty directory"),
        ("text:few.jsonl,format:instruction", "add some, or set a larger data.sources.b.held_out"),
    ],
)
def test_a_fault_in_one_of_several_sources_is_told_by_its_own_settings(place, capsys, source, told):
    (place / "empty.jsonl").write_text("")
    (place / "few.jsonl").write_text(json.dumps({"prompt": "What?", "response": "That."}))
    (place / "foreign").mkdir()
    (place / "foreign" / "mine").write_text("")
    words = f"data.sources={{a:{{text:a.jsonl}},b:{{{source}}}}}"
    assert main(["prepare", *SMALL, words, "prepare.workers=1"]) == 2
    assert told in capsys.readouterr().err


def test_a_fault_in_the_only_text_is_told_by_the_settings_of_all(place, capsys):
    assert main(["prepare", *SMALL, "data.text=b.jsonl", "data.text_column=body"]) == 2
    assert "set data.text_column to the column with the text" in capsys.readouterr().err


STREAM = ["data.stream=true", "data.stream_block=64", "data.stream_window=2", *SMALL]
"""Four sequences in a block, and a step in a whole window."""


def head(out: str) -> str:
    """What is told of a batch, up to its digest."""
    return next(line for line in out.splitlines() if line.startswith("step "))


def test_a_stream_is_tokenized_as_far_as_the_step_reads(place, capsys, caplog):
    out = shown(capsys, *STREAM, "data.text=a.jsonl", "step=3", "samples=0")
    texts = [json.loads(line)["text"] for line in (place / "a.jsonl").read_text().splitlines()]
    whole = [piece for line in out.splitlines() for piece in line.split(BORDER)[1:-1]]
    assert len(whole) > 4
    assert set(whole) <= set(texts)
    assert "step 3 of 700: samples 24 to 31, 8 sequences of 16 tokens" in out
    told = re.search(r"([0-9]+) sequences in an epoch", caplog.text)
    assert told is not None
    epochs = [sample // int(told[1]) for sample in range(24, 32)]
    assert epochs[0] < epochs[-1], "the text ends within the step"
    assert list(map(int, re.findall(r"\nsample [0-9]+  a, epoch ([0-9]+), ", out))) == epochs
    assert not [path for path in place.iterdir() if path.is_dir()], "nothing stays of it"


def test_the_stream_of_a_run_is_shown_as_far_as_it_is_there(place, capsys):
    text = "data.text=" + write_rows(place / "long.jsonl", rows_of(200)).name
    run, _ = settings(Options.read([*STREAM, text]))
    there = opened(replace(run, run_dir=str(place / "quick"))).blocks
    with streamed(read_run(place / "quick"), place / "quick", is_first=True) as sequences:
        assert sequences is not None
        sequences.read(np.arange(24))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in there.directory.iterdir())
    of_the_run = shown(capsys, "run_dir=quick", "step=2")
    assert head(of_the_run) == head(shown(capsys, *STREAM, text, "step=2"))
    assert main(["data", "show", "run_dir=quick", "step=600"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"the stream of quick is tokenized for its first [0-9]+ steps so far, and step 600 is not", told)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in there.directory.iterdir()) == before


def test_a_stream_has_no_token_files_to_make(place, capsys):
    assert main(["prepare", *SMALL, "data.text=a.jsonl", "data.stream=true"]) == 2
    told = capsys.readouterr().err
    assert "data.stream is true, but this needs token files" in told
    assert not (place / "prepared").exists()
