"""From text to blocks: the same tokens as prepared text has, however often and with however many processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stream_texts import all_tokens, opened, rows_of, run_of, write_rows

import moetrain
from moetrain.config.schema import RunConfig
from moetrain.data.corpus import open_prepared
from moetrain.errors import DataError, LaunchError
from moetrain.prepare.directory import prepare
from moetrain.stream.blocks import Stream
from moetrain.stream.feed import streamed
from moetrain.stream.opening import open_stream, request_of
from moetrain.stream.produce import produce

ALL = 1 << 30


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    """Three files, with a document that says nothing in the middle."""
    rows = [*rows_of(60)[:30], {"text": " "}, *rows_of(60)[30:]]
    return [write_rows(tmp_path / f"{number}.jsonl", rows[20 * number : 20 * number + 20 + number])
            for number in range(3)]  # fmt: skip


def produce_all(run: RunConfig, stream: Stream, *, workers: int = 0) -> None:
    stream.blocks.want(ALL)
    produce(stream.blocks, request_of(run), sizes=stream.sizes, cut=stream.cut, tokenizer=stream.tokenizer,
            workers=workers)  # fmt: skip


def files_of(stream: Stream) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stream.blocks.directory.glob("*.bin")}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stream_has_the_tokens_of_prepared_text(tmp_path, text):
    run = run_of(text, tmp_path / "run")
    stream = opened(run)
    produce_all(run, stream)
    prepared = prepare(tmp_path / "prepared", text=run.data.text, text_column="text", held_out=0.2, vocab_size=400,
                       tokenizer=None, progress=lambda *_: None)  # fmt: skip
    end = stream.blocks.end()
    assert end is not None
    tokens = all_tokens(stream.blocks)
    assert (tokens == prepared.train.tokens[: len(tokens)]).all()
    assert prepared.train.num_tokens - len(tokens) < 32
    assert (end.tokens, end.documents, end.bytes) == (
        prepared.train.num_tokens, prepared.train.num_documents, prepared.train.num_bytes,
    )  # fmt: skip
    assert end.left_out == {"empty": prepared.meta.empty_documents} == {"empty": 1}
    opening = open_prepared(stream.blocks.directory / "opening", verify=True)
    assert opening.meta.tokenizer_fingerprint == prepared.meta.tokenizer_fingerprint
    assert (opening.held_out.tokens == prepared.held_out.tokens).all()
    for name in ("xz", "trigram"):
        assert getattr(opening.meta.baselines, name) == getattr(prepared.meta.baselines, name)


def test_worker_processes_and_restarts_change_no_byte(tmp_path, text):
    one, many = (run_of(text, tmp_path / name) for name in ("one", "many"))
    whole, stream = opened(one), opened(many)
    produce_all(one, whole)
    thread = threading.Thread(target=produce_all, args=(many, stream), kwargs={"workers": 2}, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert files_of(stream) == files_of(whole)
    # as if it had been killed between a block and the position after it, and training had wanted no more for a while
    last = max(files_of(whole))
    for blocks_there in (1, 5, len(files_of(whole)) - 1):
        with pytest.raises(InterruptedError):
            _stopped_after(blocks_there, one, whole)
        (whole.blocks.directory / last).unlink(missing_ok=True)
        produce_all(one, whole)
        assert files_of(whole) == files_of(stream)


def _stopped_after(count: int, run: RunConfig, stream: Stream) -> None:
    """Begin anew, and stop as a full disk would stop it."""
    for name in (*files_of(stream), "position", "end.json"):
        (stream.blocks.directory / name).unlink(missing_ok=True)
    write = stream.blocks.write_position

    def stop(position, waiting):
        if position.blocks >= count:
            raise InterruptedError
        write(position, waiting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.blocks, "write_position", stop)
        produce_all(run, stream)


def test_the_producer_stays_a_bounded_number_of_blocks_ahead(tmp_path):
    run = run_of([write_rows(tmp_path / "a.jsonl", rows_of(400))], tmp_path / "run")
    stream = opened(run)
    with streamed(run, tmp_path / "run", is_first=True) as sequences:
        assert sequences is not None
        for sample, wanted in ((0, 3), (20, 7), (40, 11)):
            sequences.read(np.array([sample]))
            until(lambda wanted=wanted: len(files_of(stream)) >= wanted)
            time.sleep(0.3)
            # a chunk has about two blocks here, and documents are taken whole
            assert wanted <= len(files_of(stream)) <= wanted + 3
    assert stream.blocks.end() is None


def test_a_killed_producer_is_named_and_the_next_start_goes_on(tmp_path):
    run = run_of([write_rows(tmp_path / "a.jsonl", rows_of(200))], tmp_path / "run")
    stream = opened(run)
    last = np.array([399])
    with streamed(run, tmp_path / "run", is_first=True) as sequences:
        assert sequences is not None
        sequences.read(np.array([0]))
        os.kill(_producer_of(tmp_path / "run"), signal.SIGKILL)
        with pytest.raises(LaunchError, match=r"ended with SIGKILL.*the same command goes on"):
            sequences.read(last)
    with (
        streamed(run, tmp_path / "run", is_first=True) as first,
        streamed(run, tmp_path / "run", is_first=False) as other,
    ):
        assert first is not None
        assert other is not None
        assert (first.read(last) == other.read(last)).all()
    assert stream.blocks.fault() is None


def _producer_of(run_dir: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"moetrain.stream.produce" in words and str(run_dir).encode() in words:
            return int(entry.name)
    raise AssertionError("no producer")


def test_the_producer_dies_with_the_process_that_started_it(tmp_path):
    run = run_of([write_rows(tmp_path / "a.jsonl", rows_of(60))], tmp_path / "run")
    opened(run)
    code = (
        "import sys, time; from pathlib import Path; from moetrain.config.freeze import read_run; "
        "from moetrain.stream.feed import streamed\n"
        "with streamed(read_run(Path(sys.argv[1])), Path(sys.argv[1]), is_first=True) as s: time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parent.parent)},
    )

    def is_there() -> bool:
        try:
            return bool(_producer_of(tmp_path / "run"))
        except AssertionError:
            return False

    try:
        until(is_there)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not is_there())


@pytest.mark.parametrize(
    ("bad", "message"),
    [('{"other": 1}', r"a\.jsonl, row 51 has no column 'text'"), ("{", "line 51 is not JSON"),
     ('{"text": "\\ud800"}', "row 51 holds half of a surrogate pair")],
)  # fmt: skip
def test_bad_text_is_told_when_training_comes_to_it(tmp_path, bad, message):
    path = write_rows(tmp_path / "a.jsonl", rows_of(50))
    run = run_of([path], tmp_path / "run")
    stream = opened(run)
    path.write_text(f"{path.read_text()}\n{bad}\n")
    stream = Stream(stream.blocks, stream.tokenizer, stream.cut, [path.stat().st_size])
    with pytest.raises(DataError, match=message):
        produce_all(run, stream)
    assert stream.blocks.is_full(3)
    assert stream.blocks.end() is None


def test_text_that_makes_no_sequence_is_refused(tmp_path):
    run = run_of([write_rows(tmp_path / "a.jsonl", rows_of(2, words=2))], tmp_path / "run")
    stream = opened(run)
    with pytest.raises(DataError, match=r"tokens, but one sequence takes 33 .*add text"):
        produce_all(run, stream)


class TestOpening:
    def again(self, run: RunConfig, tmp_path: Path, *, is_begun: bool) -> None:
        open_stream(run, tmp_path / "run", is_begun=is_begun, progress=lambda *_: None)

    def test_text_that_changed_is_refused_once_there_are_checkpoints_and_begun_anew_before(self, tmp_path, text):
        run = run_of(text, tmp_path / "run")
        stream = opened(run)
        produce_all(run, stream)
        text[1].write_text(text[1].read_text().replace("w1", "W1"))
        with pytest.raises(DataError, match=r"was trained on other data: the text \(1\.jsonl\) changed since"):
            self.again(run, tmp_path, is_begun=True)
        assert files_of(stream)
        self.again(run, tmp_path, is_begun=False)
        assert not files_of(stream)

    def test_what_is_there_stays_unless_a_block_is_missing(self, tmp_path, text):
        run = run_of(text, tmp_path / "run")
        stream = opened(run)
        produce_all(run, stream)
        before = files_of(stream)
        self.again(run, tmp_path, is_begun=True)
        assert files_of(stream) == before
        stream.blocks.path(len(before) - 1).unlink()  # the shorter last one alone
        self.again(run, tmp_path, is_begun=True)
        assert stream.blocks.end() is None
        produce_all(run, stream)
        assert files_of(stream) == before
        stream.blocks.path(2).unlink()
        self.again(run, tmp_path, is_begun=True)
        assert not files_of(stream)
        produce_all(run, stream)
        assert files_of(stream) == before

    def test_a_file_that_grows_while_it_is_streamed_is_refused(self, tmp_path, text):
        run = run_of(text, tmp_path / "run")
        stream = opened(run)
        write_rows(text[2], rows_of(80))
        with pytest.raises(DataError, match=r"2\.jsonl has .* bytes, but had"):
            produce_all(run, stream)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [([], "no document at all"), ([{"text": " "}], "only empty documents"), (rows_of(1), "holds one document"),
         (rows_of(1) * 3, "3 documents, all the same")],
    )  # fmt: skip
    def test_text_that_cannot_be_divided_is_refused(self, tmp_path, rows, message):
        run = run_of([write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "run")
        with pytest.raises(DataError, match=message):
            opened(run)
        assert not (tmp_path / "run" / "stream" / "opening").exists()

    def test_documents_that_a_filter_leaves_out_are_counted(self, tmp_path):
        rows = [*rows_of(40), {"text": "short"}, {"text": "tiny"}]
        run = run_of([write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "run", prepare={"min_characters": 20})
        stream = opened(run)
        produce_all(run, stream)
        end = json.loads((stream.blocks.directory / "end.json").read_text())
        assert end["left_out"] == {"min_characters": 2}
