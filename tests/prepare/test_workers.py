"""Many processes, one result: whatever their number, and wherever they are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moetrain.data.corpus import Prepared, open_prepared
from moetrain.data.tokenizer import load_tokenizer, train_tokenizer
from moetrain.errors import DataError
from moetrain.parallel.pool import Pool, WorkerLost
from moetrain.prepare import encoding, reading
from moetrain.prepare.directory import prepare
from moetrain.prepare.reading import Options
from moetrain.sources import spool

pytestmark = pytest.mark.slow

WORDS = ["the", " cat", "sat ", "\n", "é", "\U0001f600", " 1984", "<|endoftext|>", "  ", "ing"]


def write_rows(path: Path, documents: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return str(path)


def some_documents(number: int, *, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{one} " + "".join(draw.choices(WORDS, k=draw.randint(1, 60))) for one in range(number)]


def run(directory: Path, *text: str, **options: Any) -> Prepared:
    return prepare(
        directory,
        text=list(text),
        text_column="text",
        held_out=0.2,
        vocab_size=400,
        tokenizer=None,
        progress=lambda stage, done, total: None,
        say=lambda line: None,
        options=Options(**options),
    )


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def tiny_shards(monkeypatch):
    monkeypatch.setattr(reading, "SMALL", 0)
    monkeypatch.setattr(spool, "SMALLEST", 2000)


def test_the_token_files_are_the_same_for_any_number_of_workers_and_either_encoder(tmp_path, tiny_shards, monkeypatch):
    text = write_rows(tmp_path / "rows.jsonl", some_documents(300))
    for workers in (1, 2, 3):
        for fast in (False, True):
            run(tmp_path / f"{workers}-{fast}", text, workers=workers, fast_encoder=fast)
    monkeypatch.setattr(reading, "SMALL", 1 << 30)
    run(tmp_path / "here", text)
    monkeypatch.setattr(spool, "SMALLEST", 1 << 20)
    run(tmp_path / "one shard", text)
    directories = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(directories) == 8
    assert all(content_of(path) == content_of(tmp_path / "here") for path in directories)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.sampled_from(WORDS), max_size=30).map("".join), min_size=2, max_size=40),
    smallest=st.integers(1, 500),
    files=st.integers(1, 3),
)
def test_every_document_comes_once_and_in_order_however_shards_fall(tmp_path_factory, documents, smallest, files):
    documents = [*documents, "one", "another"]
    base = tmp_path_factory.mktemp("once")
    paths = [write_rows(base / f"{number}.jsonl", documents[number::files]) for number in range(files)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "SMALLEST", smallest)
        prepared = run(base / "p", *paths)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    found = []
    for part in (prepared.train, prepared.held_out):
        ends = [*part.documents[1:].tolist(), part.num_tokens]
        found += [
            tokenizer.decode(part.tokens[start : end - 1].tolist(), skip_special_tokens=False)
            for start, end in zip(part.documents.tolist(), ends, strict=True)
        ]
    in_order = [one for number in range(files) for one in documents[number::files] if one.strip()]
    assert sorted(found) == sorted(in_order)
    train = found[: prepared.train.num_documents]
    assert train == [one for one in in_order if one in set(train)]


SCRIPT = """
import sys
from moetrain.prepare import reading
from moetrain.sources import spool
from moetrain.prepare.directory import prepare
from moetrain.prepare.reading import Options
from pathlib import Path
reading.SMALL, spool.SMALLEST = 0, 2000
print("started", flush=True)

def progress(stage, done, total):
    print(stage, done, total, flush=True)
    if stage == "write":
        sys.stdin.readline()

prepare(Path(sys.argv[1]), text=[sys.argv[2]], text_column="text", held_out=0.2, vocab_size=400, tokenizer=None,
        progress=progress, options=Options(workers=2))
"""


def start(directory: Path, text: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], stage: str, times: int) -> int:
    """How often the stage was told before it had been told so often, or the process ended."""
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += line.startswith(stage)
        if seen == times:
            break
    return seen


def workers_of(directory: Path) -> list[int]:
    """Processes that have a file or their tasks in the directory of work open, by what their parent was."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if b"moetrain.prepare.shards" in command and str(directory).encode() in environment:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(("stage", "times"), [("read", 1), ("tokenizer", 2), ("encode", 4), ("write", 1)])
def test_a_process_killed_at_any_moment_is_gone_on_with_and_leaves_no_worker(stage, times, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path))
    text = write_rows(tmp_path / "rows.jsonl", some_documents(400))
    process = start(tmp_path / "p", text)
    assert read_until(process, stage, times) == times
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "p").exists()
    deadline = time.monotonic() + 20
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers_of(tmp_path)
    work = tmp_path / "p.partial-0"
    done = {path: path.stat().st_mtime_ns for path in work.glob("*/0*.json")}
    again = start(tmp_path / "p", text)
    assert read_until(again, "write", 1) == 1
    assert {path: path.stat().st_mtime_ns for path in done} == done  # what was done was not done again
    again.communicate("go on\n")
    assert again.returncode == 0
    monkeypatch.setattr(reading, "SMALL", 1 << 30)
    run(tmp_path / "unbroken", text)
    assert content_of(tmp_path / "p") == content_of(tmp_path / "unbroken")
    assert not work.exists()


def settings_where_fastokens_differs(tmp_path: Path, *, in_sample: bool) -> dict[str, Any]:
    # a word for tokenizers after each line end, for fastokens in the first line alone (tests/tokenization/test_fast.py)
    content = json.loads(train_tokenizer(iter([]), vocab_size=257).to_str())
    content["model"]["vocab"] |= {"ab": 257, "abc": 258}
    content["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    split = {"type": "Split", "pattern": {"Regex": "^ab"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, content["pre_tokenizer"] | {"use_regex": False}],
    }
    given_path = tmp_path / "given.json"
    given_path.write_text(json.dumps(content))
    # shards of 20 lines of 100 bytes, 64 of them; of every second one the whole is in the sample
    documents = [f"{number:04} {'x' * 78} abc" for number in range(64 * 20)]
    differing = [text.replace(" abc", "\nabc").replace("xx", "x", 1) for text in documents]
    documents = [
        other if index // 20 % 2 == (0 if in_sample else 1) else one
        for index, (one, other) in enumerate(zip(documents, differing, strict=True))
    ]
    text = write_rows(tmp_path / "rows.jsonl", documents)
    assert {len(line) for line in Path(text).read_bytes().splitlines()} == {99}
    return {
        "text": [text], "text_column": "text", "held_out": 0.2, "vocab_size": 260, "tokenizer": str(given_path),
        "progress": lambda stage, done, total: None,
    }  # fmt: skip


@pytest.mark.parametrize("in_sample", [True, False], ids=["sample", "document"])
def test_where_the_faster_encoder_differs_the_tokenizer_is_used_and_it_is_said_once(in_sample, tmp_path, tiny_shards):
    pytest.importorskip("fastokens")
    settings = settings_where_fastokens_differs(tmp_path, in_sample=in_sample)
    said: list[str] = []
    prepare(tmp_path / "p", **settings, say=said.append, options=Options(workers=2))
    assert said == ["encoding with tokenizers, not with the faster fastokens: it gives other ids"]
    prepare(tmp_path / "plain", **settings, say=said.append, options=Options(workers=2, fast_encoder=False))
    assert content_of(tmp_path / "p") == content_of(tmp_path / "plain")
    assert len(said) == 1


def test_shards_of_an_encoder_that_was_not_proved_are_not_kept(tmp_path, tiny_shards, monkeypatch):
    pytest.importorskip("fastokens")
    settings = settings_where_fastokens_differs(tmp_path, in_sample=False)
    encoded = tmp_path / "p.partial-0" / "encoded"
    written = encoding.write_json

    def end_before_it_is_known(path: Path, values: Any) -> None:
        if values == {"fast": False}:
            raise KeyboardInterrupt
        if values != {"fast": True}:  # nor is that the proof went well
            written(path, values)

    def end_before_they_are_gone(*_: Any) -> None:
        raise KeyboardInterrupt

    for name, end, shards_are_left in [
        ("_begin_with_tokenizers", end_before_they_are_gone, True),
        ("write_json", end_before_it_is_known, False),
        ("_begin_with_tokenizers", end_before_they_are_gone, True),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(encoding, name, end)
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path / "p", **settings, say=print, options=Options(workers=2))
        assert bool(list(encoded.glob("*.json"))) == shards_are_left
    (tmp_path / "p.partial-0" / "encoder.json").unlink(missing_ok=True)  # as if the proof had not ended before
    done_at_first: list[int] = []

    def note(stage: str, done: int, total: int | None) -> None:
        if stage == "encode":
            done_at_first.append(done)

    settings["progress"] = note
    prepare(tmp_path / "p", **settings, say=print, options=Options(workers=2, fast_encoder=False))
    assert done_at_first[0] == 0
    prepare(tmp_path / "plain", **settings, say=print, options=Options(workers=2, fast_encoder=False))
    assert content_of(tmp_path / "p") == content_of(tmp_path / "plain")


def test_a_killed_worker_is_told_and_the_next_start_goes_on(tmp_path, tiny_shards, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path))
    text = write_rows(tmp_path / "rows.jsonl", some_documents(4000))

    def kill(stage: str, done: int, total: int | None) -> None:
        if stage == "encode" and done:
            for pid in workers_of(tmp_path):
                os.kill(pid, signal.SIGKILL)

    settings: dict[str, Any] = {
        "text": [text], "text_column": "text", "held_out": 0.2, "vocab_size": 400, "tokenizer": None,
        "say": lambda line: None, "options": Options(workers=2),
    }  # fmt: skip
    with pytest.raises(WorkerLost, match=r"SIGKILL \(often out of memory: set prepare\.workers lower\)"):
        prepare(tmp_path / "p", progress=kill, **settings)
    done = list((tmp_path / "p.partial-0" / "encoded").glob("*.json"))
    assert done
    prepare(tmp_path / "p", progress=lambda *_: None, **settings)
    open_prepared(tmp_path / "p", verify=True)


def test_a_fault_in_a_worker_comes_through_as_what_it_is(tmp_path):
    def run_one(**task: Any) -> None:
        list(pool.run([{"directory": str(tmp_path), **task}]))

    pool = Pool("moetrain.prepare.shards", workers=1)
    try:
        with pytest.raises(FileNotFoundError):
            run_one(what="spool", piece=0, parts=[], shard_bytes=1)
        (tmp_path / "spool").mkdir()
        with pytest.raises(RuntimeError, match="KeyError: 'what'"):
            run_one()
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer file"):
            run_one(what="encode", cut=1, fast=False, shard=0)
    finally:
        pool.close()


def documents_in(prepared: Prepared) -> list[str]:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    return [
        tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False)
        for part in (prepared.train, prepared.held_out)
        for piece in np.split(part.tokens, part.documents[1:])
    ]


@pytest.mark.parametrize("workers", [None, 2])
def test_duplicates_and_lengths_are_left_out_and_counted(workers, tmp_path, monkeypatch):
    pytest.importorskip("rensa")
    if workers:
        monkeypatch.setattr(reading, "SMALL", 0)
    monkeypatch.setattr(spool, "SMALLEST", 3000)
    long_ones = [" ".join(f"w{(seed * 7919 + n * n) % 9973}" for n in range(200)) for seed in range(12)]
    similar = [f"{text} and a word more" for text in long_ones[:5]]
    documents = [*long_ones, "x", *long_ones[3:9], *similar, "long " * 1000, " "]
    text = write_rows(tmp_path / "rows.jsonl", documents)
    limits = {"min_characters": 2, "max_characters": 4000, "workers": workers}
    counts = {"min_characters": 1, "max_characters": 1}
    for mode, expected, dropped in (
        ("keep", [*long_ones, *long_ones[3:9], *similar], {}),
        ("exact", [*long_ones, *similar], {"exact_duplicates": 6}),
        ("near", long_ones, {"exact_duplicates": 6, "near_duplicates": 5}),
    ):
        prepared = run(tmp_path / mode, text, duplicates=mode, **limits)
        assert sorted(documents_in(prepared)) == sorted(expected)
        assert prepared.meta.dropped == counts | dropped
        assert prepared.meta.empty_documents == 1


def test_filters_that_leave_nothing_are_named(tmp_path):
    text = write_rows(tmp_path / "rows.jsonl", some_documents(5))
    with pytest.raises(DataError, match=r"holds 5 documents, but the filters of prepare\.min_characters"):
        run(tmp_path / "p", text, min_characters=10_000)


@pytest.mark.parametrize(
    ("name", "stage"), [("spool/000000-000000.text", "read"), ("encoded/000000.bin", "write")], ids=["spool", "encoded"]
)
def test_work_that_was_damaged_meanwhile_is_found(name, stage, tmp_path, tiny_shards):
    text = write_rows(tmp_path / "rows.jsonl", some_documents(300))

    def stop(at: str, done: int, total: int | None) -> None:
        if at == stage and done == total:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {
        "text": [text], "text_column": "text", "held_out": 0.2, "vocab_size": 400, "tokenizer": None,
        "options": Options(workers=2),
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "p", progress=stop, **settings)
    path = tmp_path / "p.partial-0" / name
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="was damaged since it was written"):
        prepare(tmp_path / "p", progress=lambda *_: None, **settings)
    assert not (tmp_path / "p").exists()
    run(tmp_path / "p", text)
