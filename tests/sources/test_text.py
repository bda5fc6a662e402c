"""Text in: patterns to files, files to documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moetrain
from moetrain.errors import DataError
from moetrain.sources import files
from moetrain.sources.text import BUILTIN, expand, read_documents, texts_of

# What a reader that guesses types would spoil: dates, numbers, holes; and what a reader of lines would cut in two.
DOCUMENTS = ["2020-01-01", "1984", "NA", "true", "two\nlines", 'a "quoted", one', "line\u2028separator", "\U0001f600 é"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(documents: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(documents))
    return out.getvalue()


def read(*paths: Path, text_column: str = "text") -> list[str]:
    return list(read_documents(paths, text_column=text_column))


def test_the_builtin_corpus_has_its_233_addresses():
    documents = read(*expand(["builtin:sotu"]))
    assert len(documents) == 233
    assert documents[0].startswith("Fellow-Citizens of the Senate and House of Representatives")


def test_builtin_corpora_lie_inside_the_package():
    for path in BUILTIN.values():
        assert path.is_file()
        assert path.is_relative_to(Path(moetrain.__file__).parent)


def test_a_directory_gives_what_can_be_read_in_it_and_below_but_nothing_hidden(tmp_path):
    names = ["b.txt", "a.jsonl", "below/c.csv", "below/more/d.parquet", "below/e.json.gz"]
    others = ["README.md", "below/model.bin", ".hidden.txt", ".git/f.txt", "g.parquet.gz"]
    for name in names + others:
        write(tmp_path / name, "x")
    assert expand([str(tmp_path)]) == sorted(tmp_path / name for name in names)


def test_globs_files_and_directories_that_overlap_give_each_file_once(tmp_path, monkeypatch):
    for name in ["a.txt", "b.txt", "below/c.txt"]:
        write(tmp_path / name, "x")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    assert expand(["b.txt", str(tmp_path / "*.txt"), "**/c.txt", ".", "b.txt"]) == [
        tmp_path / name for name in ["a.txt", "b.txt", "below/c.txt"]
    ]  # fmt: skip


def test_a_file_whose_name_looks_like_a_glob_is_found_and_read(tmp_path):
    write(tmp_path / "a1.txt", "the wrong one")
    path = write(tmp_path / "a[1]?*.txt", "the right one")
    assert read(*expand([str(path)])) == ["the right one"]


@pytest.mark.parametrize("pattern", ["nowhere.txt", "*.txt", "empty", "notes.md", "*.md", "builtin:sotus"])
def test_a_pattern_that_gives_nothing_is_named(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "notes.md", "x")
    with pytest.raises(DataError, match=r".*".join([pattern.replace("*", r"\*"), ""])):
        expand([pattern])


def test_no_pattern_at_all_is_refused():
    with pytest.raises(DataError, match=r"data\.text is empty"):
        expand([])


@pytest.mark.parametrize("compression", list(COMPRESS))
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".json array", ".csv"])
def test_rows_come_back_as_they_were(kind, compression, tmp_path):
    rows: list[object] = [{"id": number, "text": document} for number, document in enumerate(DOCUMENTS)]
    content = {".csv": as_csv(DOCUMENTS), ".json array": json.dumps(rows, indent=1)}.get(kind, jsonl(rows))
    path = write(tmp_path / f"rows{kind.split()[0]}{compression}", COMPRESS[compression](content.encode()))
    assert read(path) == DOCUMENTS


def test_parquet_rows_come_back_as_they_were(tmp_path):
    pq.write_table(pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == DOCUMENTS


@pytest.mark.parametrize("compression", list(COMPRESS))
def test_a_text_file_is_one_document_with_plain_line_ends(compression, tmp_path):
    content = COMPRESS[compression](b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert read(write(tmp_path / f"a.txt{compression}", content)) == ["one\n\ntwo\n"]


def test_files_are_read_in_the_order_given(tmp_path):
    paths = [write(tmp_path / f"{name}.txt", name) for name in "cab"]
    assert read(*paths) == ["c", "a", "b"]


def test_columns_that_come_late_or_change_their_type_do_no_harm(tmp_path):
    rows: list[object] = [
        {"text": "a", "meta": 1},
        {"text": "b", "meta": {"x": []}},
        {"text": "c", "type": "t", "message": {"y": 1}},
    ]
    assert read(write(tmp_path / "a.jsonl", jsonl(rows))) == ["a", "b", "c"]


def test_empty_documents_are_passed_over_and_told(tmp_path):
    blank = write(tmp_path / "a.txt", " \n\t")
    rows = write(tmp_path / "b.jsonl", jsonl([{"text": ""}, {"text": "x"}, {"text": None}]) + "\n\n")
    empty: Counter[Path] = Counter()
    documents = list(read_documents([blank, rows], text_column="text", on_empty=lambda path: empty.update([path])))
    assert documents == ["x"]
    assert empty == {blank: 1, rows: 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
        ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 text"),
        ("a.txt", b"ab\0cd", "a.txt holds NUL bytes"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl is not UTF-8 text"),
        ("a.csv", b"text\n\xff\n", "a.csv is not UTF-8 text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b\n', "a.jsonl, line 3 is not JSON"),
        ("a.json", '{\n"text": "a"\n}', "a.json, line 1 is not JSON .* or one array of objects"),
        ("a.json", '[{"text": "a"},', "a.json cannot be read as .json"),
        ("a.jsonl", '["a", "b"]\n', "a.jsonl, row 1 is not an object"),
        ("a.json", '["a", "b"]\n', "a.json, row 1 is not an object"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b", "id": 1}\n', "row 2 has no column 'text'; it has 'body', 'id'"),
        ("a.csv", "body,id\nb,1\n", "a.csv has no column 'text'; it has 'body', 'id'"),
        ("a.jsonl", '{"text": 7}\n', "row 1 holds int in column 'text', but it must be text"),
        ("a.jsonl", '{"text": "a\\ud800"}\n', "row 1 holds half of a surrogate pair"),
        ("a.parquet", b"PAR1 or not", "a.parquet cannot be read as .parquet"),
        ("a.csv", b'text\n"a', "a.csv cannot be read as .csv"),
        ("a.txt.gz", b"not compressed", "a.txt.gz cannot be read as .txt"),
        ("a.txt.xz", b"not compressed", "a.txt.xz cannot be read as .txt"),
        ("a.md", b"text", "a.md is of an unknown kind"),
        ("a.jsonl", b"", "data.text holds no document at all"),
        ("a.txt", b" \n", r"data.text holds only empty documents \(1 of them\)"),
    ],
)
def test_what_cannot_be_read_is_told_with_file_and_place(name, content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt is not a file"):
        read(tmp_path / "gone.txt")


@pytest.mark.parametrize("column", ["body", "id"])
def test_parquet_without_text_in_the_column_tells_what_it_has(column, tmp_path):
    pq.write_table(pa.table({"id": [1], "words": ["a"]}), tmp_path / "a.parquet")
    message = {"body": "no column 'body'; it has 'id', 'words'", "id": "holds int in column 'id'"}[column]
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet", text_column=column)


def test_parquet_of_no_rows_is_no_fault_beside_others(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", write(tmp_path / "b.txt", "x")) == ["x"]


@pytest.mark.parametrize("compression", [".gz", ".xz"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_a_compressed_file_that_is_cut_short_is_told(kind, compression, tmp_path):
    documents = [os.urandom(500).hex() for _ in range(40)]
    content = {".txt": "\n".join(documents), ".csv": as_csv(documents)}.get(
        kind, jsonl([{"text": document} for document in documents])
    )
    whole = COMPRESS[compression](content.encode())
    path = write(tmp_path / f"a{kind}{compression}", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"a{kind}{compression} is cut short"):
        read(path)


def test_without_a_zstd_reader_the_way_to_one_is_told(tmp_path, monkeypatch):
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs a reader of zstd: pip install 'moetrain\[zstd\]'"):
        read(write(tmp_path / "a.txt.zst", b"x"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way_and_in_several_ways(end, tmp_path):
    content = f'{{"text": "a"}}{end}{{"text": "b\u2028c"}}\r\n{end}{{"text": "d"}}\n{{"text": "e"}}{end}'
    assert read(write(tmp_path / "a.jsonl", content)) == ["a", "b\u2028c", "d", "e"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "' + "b" * 2000 + '"}\n', "a.jsonl, line 2 is longer than 0 MiB"),
        ("a.jsonl.gz", '{"text": "' + "b" * 2000 + '"}\n', "a.jsonl.gz, line 1 is longer than"),
        ("a.txt", "b" * 2000, "a.txt is one document of more than"),
        ("a.json", json.dumps([{"text": "b" * 900}] * 3), "line 1 is longer"),
        ("a.json", '[\n{"text": "a"},\n' + '{"text": "b"},\n' * 200 + "]", "a.json is an array of more than"),
    ],
)
def test_what_is_too_long_to_be_held_is_refused_before_it_is_read_whole(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST", 1024)
    monkeypatch.setattr(files, "LARGEST_ARRAY", 2048)
    data = content.encode()
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data))


def test_a_line_of_a_gigabyte_takes_no_gigabyte_of_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        file.truncate(1 << 30)  # the rest is a hole, read as NUL bytes
    script = f"""
import re
from pathlib import Path
from moetrain.errors import DataError
from moetrain.sources.text import read_documents
try:
    list(read_documents([Path({str(path)!r})], text_column="text"))
except DataError as error:
    assert "line 1 is longer than 256 MiB" in str(error), error
    # not ru_maxrss, which begins with what the parent held
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    done = run_apart(script, tmp_path=tmp_path)
    assert int(done.stdout) < 700_000, done.stderr  # KiB; the line held once and a half


def test_a_reader_is_told_how_far_in_the_file_it_is(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"text": "x" * 500}] * 1000))
    told: list[int] = []
    assert len(list(texts_of(path, text_column="text", tell=told.append))) == 1000
    assert told == sorted(told)
    assert len(told) > 10
    assert told[-1] == path.stat().st_size


@pytest.mark.parametrize("cut", [False, True])
def test_zstd_is_read_whole_or_not_at_all(cut, tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    document = os.urandom(50_000).hex()
    frames = zstd.compress(document[:1000].encode()) + zstd.compress(document[1000:].encode())
    path = write(tmp_path / "a.txt.zst", frames[:-100] if cut else frames)
    if cut:
        with pytest.raises(DataError, match="cut short"):
            read(path)
    else:
        assert read(path) == [document]


def run_apart(script: str, *, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh Python with its own home and nothing of Hugging Face's settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "USE_", "LC_"))}
    own = {name: str(tmp_path / name) for name in ("HOME", "TMPDIR")}
    for directory in own.values():
        Path(directory).mkdir()
    kept |= own | {"PYTHONPATH": str(Path(moetrain.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run([sys.executable, "-c", script], env=kept, capture_output=True, text=True, check=False)


def test_reading_leaves_nothing_behind_prints_nothing_asks_no_network_and_needs_no_torch(tmp_path):
    script = """
import socket, sys
def refuse(*arguments, **_):
    print("network:", arguments)
    raise OSError("no network here")
socket.getaddrinfo = socket.socket.connect = socket.create_connection = refuse
from moetrain.sources.text import expand, read_documents
assert len(list(read_documents(expand(["builtin:sotu"]), text_column="text"))) == 233
assert "torch" not in sys.modules, "torch was imported"
from pathlib import Path
from moetrain.errors import DataError
try:
    list(read_documents([Path("BROKEN")], text_column="text"))
except DataError:
    sys.exit(7)
"""
    broken = write(tmp_path / "broken.csv", b"text\n\xff\n")
    done = run_apart(script.replace("BROKEN", str(broken)), tmp_path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    assert [*(tmp_path / "HOME").iterdir(), *(tmp_path / "TMPDIR").iterdir()] == []


def test_text_is_never_decoded_with_the_machines_locale(tmp_path):
    script = f"""
from pathlib import Path
from moetrain.sources.text import read_documents
from moetrain.errors import DataError
for name in ["a.txt", "a.jsonl", "a.csv", "a.csv.gz", "a.txt.gz", "a.jsonl.xz"]:
    try:
        documents = list(read_documents([Path({str(tmp_path)!r}) / name], text_column="text"))
        print(name, documents == [chr(0xE9)])
    except DataError as error:
        print(name, error)
"""
    contents = {"a.txt": "é", "a.jsonl": '{"text": "é"}', "a.csv": "text\né\n"}
    for name, content in contents.items():
        write(tmp_path / name, content)
        for suffix in (".gz", ".xz"):
            write(tmp_path / f"{name}{suffix}", COMPRESS[suffix](content.encode()))
    done = run_apart(script, tmp_path=tmp_path, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.stdout.split() == [
        word for name in ["a.txt", "a.jsonl", "a.csv", "a.csv.gz", "a.txt.gz", "a.jsonl.xz"] for word in (name, "True")
    ], done.stderr
