"""Blocks and the order in which they are read."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stream_texts import counted_blocks

from moetrain.errors import DataError, LaunchError
from moetrain.stream.blocks import Blocks, End, Fault, Position, Shape
from moetrain.stream.sequences import StreamedSequences

SMALL = Shape(sequence_length=4, sequences=3, window=4)


def reader(blocks: Blocks, *, seed: int = 1, together: int = 1, want=lambda blocks: None) -> StreamedSequences:
    return StreamedSequences(blocks, seed=seed, together=together, want=want, say=lambda line: None)


@given(window=st.integers(1, 70), sequences=st.integers(1, 5), count=st.integers(1, 400))
def test_windows_take_the_blocks_in_order_growing_to_their_size(window, sequences, count):
    shape = Shape(sequence_length=8, sequences=sequences, window=window)
    expected, number, size = [], 0, 1
    while len(expected) < count:
        expected += [number] * size
        number, size = number + 1, min(2 * size, window)
    assert [shape.window_of(block * sequences) for block in range(count)] == expected[:count]
    assert [shape.window_of(block * sequences + sequences - 1) for block in range(count)] == expected[:count]
    assert [shape.first_block(each) for each in range(expected[count - 1] + 1)] == [
        expected.index(each) for each in range(expected[count - 1] + 1)
    ]


@settings(max_examples=25)
@given(
    length=st.integers(1, 5), sequences=st.integers(1, 4), window=st.integers(1, 5), tokens=st.integers(6, 120),
    seed=st.integers(0, 3), together=st.integers(1, 9),
)  # fmt: skip
@example(length=5, sequences=4, window=5, tokens=6, seed=0, together=9)
def test_every_token_is_a_target_once_in_each_epoch(length, sequences, window, tokens, seed, together):
    shape = Shape(length, sequences, window)
    total = (tokens - 1) // length
    with tempfile.TemporaryDirectory() as place:
        read = reader(counted_blocks(Path(place), tokens=tokens, shape=shape), seed=seed, together=together)
        epochs = [read.read(np.arange(epoch * total, (epoch + 1) * total)) for epoch in range(3)]
    for rows in epochs:
        assert (np.diff(rows, axis=1) == 1).all()
        assert sorted(rows[:, 1:].ravel().tolist()) == list(range(1, total * length + 1))
    # a window is read before the next one begins
    windows = [shape.window_of(row[0] // length) for row in epochs[0].tolist()]
    assert windows == sorted(windows)


def test_the_order_is_shuffled_and_another_one_in_each_window_epoch_and_seed(tmp_path):
    shape = Shape(sequence_length=2, sequences=32, window=1)
    blocks = counted_blocks(tmp_path, tokens=2 * 96 + 1, shape=shape)
    places = reader(blocks).places(np.arange(192))
    orders = [tuple(places[:32]), tuple(places[32:64] - 32), tuple(places[64:96] - 64), tuple(range(32)),
              tuple(reader(blocks, seed=2).places(np.arange(32)))]  # fmt: skip
    assert len(set(orders)) == 5
    assert not (places[96:128] < 32).all()  # later epochs know no windows


def test_any_sample_can_be_asked_for_first_and_is_the_same(tmp_path):
    blocks = counted_blocks(tmp_path, tokens=150, shape=SMALL)
    whole = reader(blocks).read(np.arange(100))
    for index in ([99], [5, 40, 3], [0], [36, 37, 38]):
        assert (reader(blocks, together=7).read(np.array(index)) == whole[index]).all()


def test_a_window_is_waited_for_and_gives_what_it_gives_to_one_who_comes_later(tmp_path):
    whole = counted_blocks(tmp_path / "whole", tokens=150, shape=SMALL)
    blocks = Blocks(tmp_path / "growing", shape=SMALL, dtype=whole.dtype)
    blocks.directory.mkdir(parents=True)
    asked: list[int] = []
    found: list[np.ndarray] = []
    thread = threading.Thread(
        target=lambda: found.append(reader(blocks, together=8, want=asked.append).read(np.arange(4))), daemon=True
    )
    for number in range(3):
        blocks.path(number).write_bytes(whole.path(number).read_bytes())
        if number == 0:
            thread.start()
        if number < 2:
            # samples 0 to 7 are read together, and reach into the second window, blocks 1 and 2
            thread.join(timeout=0.2)
            assert thread.is_alive()
    thread.join(timeout=20)
    assert (found[0] == reader(whole).read(np.arange(4))).all()
    assert asked == [7]  # the window after these, too


def test_of_two_threads_that_ask_the_one_that_wants_less_is_not_the_last(tmp_path):
    """The producer would stop there, and the other one would wait for ever."""
    blocks, asks, has_asked = counted_blocks(tmp_path, tokens=150, shape=SMALL), threading.Event(), threading.Event()
    (blocks.directory / "end.json").unlink()
    asked: list[int] = []

    def want(number: int) -> None:
        if number == 3:  # that of the first window, and of the next one
            asks.set()
            has_asked.wait(timeout=0.5)
        blocks.want(number)
        asked.append(number)
        has_asked.set()

    read = reader(blocks, want=want)
    first, second = (threading.Thread(target=read.places, args=(np.array([sample]),)) for sample in (0, 25))
    first.start()
    assert asks.wait(timeout=20)
    second.start()
    for thread in (first, second):
        thread.join(timeout=20)
    assert asked == [3, 15]
    assert blocks.wanted() == 15


@pytest.mark.parametrize(
    ("kind", "error"), [("data", DataError), ("lost", LaunchError), ("crash", RuntimeError)]
)  # fmt: skip
def test_whoever_waits_is_told_why_there_will_be_no_more_blocks(tmp_path, kind, error):
    blocks = counted_blocks(tmp_path, tokens=150, shape=SMALL)
    (blocks.directory / "end.json").unlink()
    blocks.write_fault(Fault(kind, "row 3 is bad"))
    read = reader(blocks)
    read.read(np.arange(9))  # what is there is read
    with pytest.raises(error, match="row 3 is bad"):
        read.read(np.array([150]))


def test_a_damaged_block_is_told_and_not_read(tmp_path):
    blocks = counted_blocks(tmp_path, tokens=150, shape=SMALL)
    content = bytearray(blocks.path(2).read_bytes())
    content[5] ^= 1
    blocks.path(2).write_bytes(content)
    blocks.read(0)
    with pytest.raises(DataError, match=r"block_000002\.bin was damaged"):
        blocks.read(2 * SMALL.sequences)


def test_a_position_comes_back_only_with_all_the_blocks_before_it(tmp_path):
    blocks = counted_blocks(tmp_path, tokens=150, shape=SMALL)
    waiting = np.arange(5, dtype=blocks.dtype)
    position = Position(blocks=4, source=1, row=7, documents=9, bytes=99, held_out=2, left_out={"empty": 1})
    blocks.write_position(position, waiting)
    found, ids = blocks.read_position()
    assert found == position
    assert (ids == waiting).all()
    path = blocks.directory / "position"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert blocks.read_position()[0] == Position(), "the ids that wait were damaged"
    path.write_bytes(content)
    blocks.path(1).unlink()
    assert blocks.read_position()[0] == Position()


def test_the_end_is_told_once_with_what_is_in_the_text(tmp_path):
    blocks = counted_blocks(tmp_path, tokens=150, shape=SMALL)
    blocks.write_end(End(37, 150, documents=12, bytes=500, left_out={"empty": 3}))
    said: list[str] = []
    read = StreamedSequences(blocks, seed=1, together=1, want=lambda _: None, say=said.append)
    for index in (36, 37, 80):
        read.read(np.array([index]))
    assert said == [
        "the text is read to its end: 12 documents, 150 tokens, 37 sequences in an epoch; left out: 3 empty"
    ]
