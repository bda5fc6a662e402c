"""Text cut into pieces: together they hold every document once, in order, and a fault is told where it lies."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.errors import DataError
from moetrain.prepare.reading import Part, pieces_of, spool_piece, spool_task, workers_for
from moetrain.sources.files import Span
from moetrain.sources.spool import Spool, read_spool
from moetrain.sources.text import texts_of

SETTINGS = {"text_column": "text", "min_characters": 1, "max_characters": None, "shard_bytes": 100}


def lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": one}, ensure_ascii=False).encode() + b"\n" for one in documents)


def spooled(work: Path, inputs: list[Any], *, piece_bytes: int, order: int = 1) -> Spool:
    (work / "spool").mkdir(parents=True, exist_ok=True)
    pieces = list(enumerate(pieces_of(inputs, piece_bytes=piece_bytes)))
    for number, piece in pieces[::order]:
        task = json.loads(json.dumps(spool_task(work, number, piece, inputs=inputs, **SETTINGS)))
        spool_piece(work / "spool", task, tell=lambda told: None)
    return read_spool(work / "spool")


def documents_in(spool: Spool) -> Iterator[str]:
    for index in range(len(spool.shards)):
        for document in spool.texts(index, spool.rows(index)):
            yield document.decode()


rows = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(lambda text: json.dumps({"text": text}))


@settings(max_examples=200)
@given(
    rows=st.lists(
        st.one_of(rows, rows.map(lambda row: json.dumps(json.loads(row), ensure_ascii=False)), st.just("  "))
    ),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\n\n"]), min_size=1),
    is_ended=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    step=st.integers(1, 200),
)
def test_the_parts_of_a_file_of_lines_hold_its_rows_once_and_in_order(
    tmp_path_factory, rows, ends, is_ended, mark, step
):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    text = mark + "".join(row + ends[number % len(ends)] for number, row in enumerate(rows))
    path.write_bytes((text if is_ended else text.rstrip("\r\n")).encode())
    size = path.stat().st_size
    found = [
        text
        for start in range(0, size, step)
        for text in texts_of(path, text_column="text", span=Span(start, min(size, start + step)))
    ]
    assert found == [json.loads(row)["text"] for row in rows if row.strip()]


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.sampled_from([".jsonl", ".txt"]), st.integers(0, 12)), min_size=1, max_size=6),
    piece_bytes=st.integers(1, 300),
    order=st.sampled_from([1, -1]),
)
def test_pieces_hold_every_document_of_every_file_in_order_whoever_comes_first(
    tmp_path_factory, sizes, piece_bytes, order
):
    base = tmp_path_factory.mktemp("pieces")
    inputs, expected = [], []
    for number, (suffix, count) in enumerate(sizes):
        documents = [f"{number} {row} é" for row in range(count if suffix == ".jsonl" else 1)]
        path = base / f"{number}{suffix}"
        path.write_bytes(lines(documents) if suffix == ".jsonl" else documents[0].encode())
        inputs.append(path)
        expected += documents
    spool = spooled(base / "work", inputs, piece_bytes=piece_bytes, order=order)
    assert list(documents_in(spool)) == expected
    assert spool.num_documents == len(expected)
    assert spool.firsts == [sum(shard.documents for shard in spool.shards[:n]) for n in range(len(spool.shards))]


def test_small_files_share_a_piece_and_only_lines_are_cut(tmp_path):
    inputs = []
    for name, size in (("a.txt", 40), ("b.txt", 40), ("c.txt", 40), ("d.jsonl", 250), ("e.jsonl.gz", 250)):
        (tmp_path / name).write_bytes(b"x" * size)
        inputs.append(tmp_path / name)
    assert pieces_of(inputs, piece_bytes=100) == [
        [Part(0, None), Part(1, None), Part(2, None)],
        [Part(3, Span(0, 100))],
        [Part(3, Span(100, 200))],
        [Part(3, Span(200, 250)), Part(4, None)],
    ]


@pytest.mark.parametrize(
    ("name", "mib", "most", "expected"), [("a.jsonl", 15, 8, 0), ("a.jsonl", 17, 8, 8), ("a.jsonl", 17, 99, 17),
                                          ("a.jsonl.gz", 3, 99, 0), ("a.jsonl.gz", 5, 99, 20)]
)  # fmt: skip
def test_no_more_processes_are_started_than_there_can_be_shards(tmp_path, name, mib, most, expected):
    with (tmp_path / name).open("wb") as file:
        file.truncate(mib << 20)
    assert workers_for([tmp_path / name], most=most) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": 5}\n', r"rows\.jsonl, row 71 holds int in column 'text'"),
        (b'{"other": ""}\n', r"rows\.jsonl, row 71 has no column 'text'"),
        (b"[]\n", r"rows\.jsonl, row 71 is not an object"),
        (b'{"text": "\\ud800"}\n', r"rows\.jsonl, row 71 holds half of a surrogate pair"),
        (b"{\n", r"rows\.jsonl, line 71 is not JSON"),
    ],
)
def test_a_fault_is_told_with_its_line_in_the_file_whatever_piece_it_is_in(bad, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(["some text"] * 70) + bad + lines(["more text"] * 30))
    with pytest.raises(DataError, match=message):
        spooled(tmp_path / "work", [path], piece_bytes=300)


def test_a_line_longer_than_pieces_is_read_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    documents = ["short", "long " * 1000, "again"]
    path.write_bytes(lines(documents))
    assert list(documents_in(spooled(tmp_path / "work", [path], piece_bytes=64))) == documents


def test_a_file_that_is_one_piece_is_gone_on_with_where_its_shards_end(tmp_path):
    documents = [f"document {number} " + "x" * 40 for number in range(50)]
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines([*documents[:20], " ", *documents[20:30]]) + b"{\n"))
    with pytest.raises(DataError, match="line 32 is not JSON"):
        spooled(tmp_path / "work", [path], piece_bytes=1000)
    kept = {one: one.stat().st_mtime_ns for one in (tmp_path / "work/spool").glob("*.json")}
    assert len(kept) == 15
    assert read_spool(tmp_path / "work/spool").shards == []
    path.write_bytes(gzip.compress(lines([*documents[:20], " ", *documents[20:]])))
    spool = spooled(tmp_path / "work", [path], piece_bytes=1000)
    assert list(documents_in(spool)) == documents
    assert spool.passed_over == {"empty": 1}
    assert {one: one.stat().st_mtime_ns for one in kept} == kept
    unbroken = spooled(tmp_path / "unbroken", [path], piece_bytes=1000)
    assert unbroken.shards == spool.shards
