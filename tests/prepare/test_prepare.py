"""From text to token files: what comes out, and what a crash, a full disk or a wrong setting leaves."""

from __future__ import annotations

import builtins
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from moetrain.data import corpus
from moetrain.data.corpus import Prepared, TokenFile, open_prepared
from moetrain.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from moetrain.errors import DataError
from moetrain.prepare import directory as prepare_module
from moetrain.prepare import shards
from moetrain.prepare.baselines import trigram_bits_per_byte, xz_bits_per_byte
from moetrain.prepare.directory import prepare, prepared_directory

DOCUMENTS = [f"Document {number}: the cat sat on mat {number * number}, é.\n" * 5 for number in range(40)]
STAGES = ["hash", "read", "tokenizer", "encode", "baselines", "write"]


class Crash(Exception):
    """The power goes."""


def write_rows(path: Path, documents: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return str(path)


def run(directory: Path, *text: str, **changed: Any) -> Prepared:
    settings: dict[str, Any] = {
        "text_column": "text",
        "held_out": 0.2,
        "vocab_size": 300,
        "tokenizer": None,
        "progress": lambda stage, done, total: None,
    }
    return prepare(directory, text=list(text), **settings | changed)


def name_of(base: Path, *text: str, **changed: Any) -> Path:
    settings: dict[str, Any] = {
        "name": "corpus",
        "text_column": "text",
        "held_out": 0.2,
        "vocab_size": 300,
        "tokenizer": None,
    }
    return prepared_directory(base, text=list(text), **settings | changed)


def documents_of(prepared: Prepared, part: TokenFile) -> list[str]:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    ends = [*part.documents[1:], part.num_tokens]
    pieces = [part.tokens[start:end].tolist() for start, end in zip(part.documents, ends, strict=True)]
    assert all(piece[-1] == 0 and 0 not in piece[:-1] for piece in pieces)
    return [tokenizer.decode(piece[:-1], skip_special_tokens=False) for piece in pieces]


def held_out_plainly(documents: list[str], share: float) -> list[str]:
    return [
        document
        for document in documents
        if int(hashlib.blake2b(document.encode(), digest_size=8).hexdigest(), 16) / 2**64 < share
    ]


def content_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", DOCUMENTS)


def test_every_document_is_in_one_of_the_two_parts_as_its_hash_tells(text, tmp_path):
    prepared = run(tmp_path / "p", text)
    held_out = held_out_plainly(DOCUMENTS, 0.2)
    assert 0 < len(held_out) < 20
    assert documents_of(prepared, prepared.held_out) == held_out
    assert documents_of(prepared, prepared.train) == [one for one in DOCUMENTS if one not in held_out]


def test_the_meta_tells_what_a_plain_count_gives(text, tmp_path):
    extra = write_rows(tmp_path / "more.jsonl", ["", " \n", "one more"])
    prepared = run(tmp_path / "p", text, extra)
    meta = prepared.meta
    assert open_prepared(tmp_path / "p", verify=True).meta == meta
    for part, split in ((prepared.train, meta.train), (prepared.held_out, meta.held_out)):
        documents = documents_of(prepared, part)
        assert split.documents == len(documents)
        assert split.bytes == part.num_bytes == sum(len(document.encode()) for document in documents)
        assert split.tokens == len(part.tokens)
        assert split.sha256 == hashlib.sha256(part.path.read_bytes()).hexdigest()
    assert meta.empty_documents == 2
    assert [(source.name, source.size, source.sha256) for source in meta.sources] == [
        (path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (Path(extra), Path(text))
    ]
    train, held_out = ("".join(documents_of(prepared, part)).encode() for part in (prepared.train, prepared.held_out))
    assert meta.baselines.xz == xz_bits_per_byte(held_out)
    assert meta.baselines.trigram == trigram_bits_per_byte(train, held_out)
    assert (meta.baselines.train_bytes, meta.baselines.held_out_bytes) == (len(train), len(held_out))
    assert not meta.baselines.truncated


def test_the_tokenizer_never_sees_the_held_out_text(text, tmp_path):
    prepared = run(tmp_path / "p", text)
    train = train_tokenizer(iter(documents_of(prepared, prepared.train)), vocab_size=300)
    assert prepared.tokenizer_path.read_text(encoding="utf-8") == train.to_str()


def test_the_baselines_of_a_large_text_use_its_beginning_and_say_so(text, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LIMITS", (1000, 500))
    prepared = run(tmp_path / "p", text)
    train, held_out = ("".join(documents_of(prepared, part)).encode() for part in (prepared.train, prepared.held_out))
    baselines = prepared.meta.baselines
    assert baselines.truncated
    assert (baselines.train_bytes, baselines.held_out_bytes) == (1000, 500)
    assert baselines.trigram == trigram_bits_per_byte(train[:1000], held_out[:500])
    assert baselines.xz == xz_bits_per_byte(held_out[:500])


def test_text_that_changes_before_its_digest_is_known_is_refused_at_once(tmp_path):
    """What had been read by then would pass, after a crash, for text with the digests of after the change."""
    text = Path(write_rows(tmp_path / "rows.jsonl", DOCUMENTS))
    stages: list[str] = []

    def change(stage: str, done: int, total: int | None) -> None:
        stages.append(stage)
        if stage == "hash":
            text.write_text(text.read_text() + '{"text": "one more"}\n')

    with pytest.raises(DataError, match=r"data\.text changed while they were read"):
        run(tmp_path / "p", str(text), progress=change)
    assert stages == ["hash"]


def test_preparing_twice_gives_the_same_bytes(text, tmp_path):
    run(tmp_path / "one", text)
    run(tmp_path / "two", text)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


def test_a_document_stays_on_its_side_whatever_stands_around_it(text, tmp_path):
    shuffled = write_rows(tmp_path / "other.jsonl", ["a new one", *reversed(DOCUMENTS), "and another", DOCUMENTS[0]])
    first, second = run(tmp_path / "one", text), run(tmp_path / "two", shuffled)
    for part in ("train", "held_out"):
        old, new = (set(documents_of(prepared, getattr(prepared, part))) for prepared in (first, second))
        assert new - {"a new one", "and another"} == old


@pytest.mark.parametrize("share", [1e-9, 0.9999])
def test_each_part_has_a_document_however_the_hashes_fall(share, tmp_path):
    prepared = run(tmp_path / "p", write_rows(tmp_path / "rows.jsonl", DOCUMENTS[:3]), held_out=share)
    assert {prepared.train.num_documents, prepared.held_out.num_documents} == {1, 2}
    assert prepared.held_out.num_documents == (1 if share < 0.5 else 2)


@pytest.mark.parametrize(
    ("documents", "message"),
    [(["alone"], "holds one document, but"), (["same"] * 3, "holds 3 documents, all the same, but")],
)
def test_a_text_that_cannot_be_divided_is_refused_with_a_way_out(documents, message, tmp_path):
    with pytest.raises(DataError, match=f"{message} .* split the text into several files or rows"):
        run(tmp_path / "p", write_rows(tmp_path / "rows.jsonl", documents))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_text_that_spells_the_end_of_text_does_not_end_there(tmp_path):
    documents = [f"{number} before{END_OF_TEXT[0]}after" for number in range(5)]
    prepared = run(tmp_path / "p", write_rows(tmp_path / "rows.jsonl", documents))
    assert sorted(documents_of(prepared, prepared.train) + documents_of(prepared, prepared.held_out)) == documents


def test_a_given_tokenizer_is_used_and_must_fit(text, tmp_path):
    path = tmp_path / "given.json"
    given = train_tokenizer(iter(["the cat sat " * 9]), vocab_size=265)
    path.write_text(given.to_str(), encoding="utf-8")
    size = given.get_vocab_size()
    prepared = run(tmp_path / "p", text, tokenizer=str(path), vocab_size=size)
    assert prepared.tokenizer_path.read_text(encoding="utf-8") == given.to_str()
    assert prepared.train.tokens[: prepared.train.documents[1] - 1].tolist() == (
        given.encode(documents_of(prepared, prepared.train)[0]).ids
    )
    with pytest.raises(
        DataError,
        match=rf"given\.json has {size} token ids, but model\.vocab_size is {size - 1}.*set model\.vocab_size={size}",
    ):
        run(tmp_path / "other", text, tokenizer=str(path), vocab_size=size - 1)


def test_what_a_given_tokenizer_would_add_to_a_text_stays_out(text, tmp_path):
    plain = train_tokenizer(iter([]), vocab_size=257)
    adding = Tokenizer.from_str(plain.to_str())
    adding.post_processor = TemplateProcessing(single=f"{END_OF_TEXT[0]} $A", special_tokens=[(END_OF_TEXT[0], 0)])
    for name, tokenizer in (("plain", plain), ("adding", adding)):
        (tmp_path / f"{name}.json").write_text(tokenizer.to_str(), encoding="utf-8")
        run(tmp_path / name, text, tokenizer=str(tmp_path / f"{name}.json"))
    assert (tmp_path / "plain" / "train.bin").read_bytes() == (tmp_path / "adding" / "train.bin").read_bytes()


def test_a_whole_directory_is_opened_and_nothing_is_done_again(text, tmp_path):
    def refuse(stage: str, done: int, total: int | None) -> None:
        raise AssertionError(stage)

    first = run(tmp_path / "p", text)
    Path(text).unlink()
    assert run(tmp_path / "p", text, progress=refuse).meta == first.meta
    with pytest.raises(DataError, match=r"p has 300 token ids, but model\.vocab_size is 299"):
        run(tmp_path / "p", text, vocab_size=299)


def test_progress_goes_through_the_stages_and_ends_at_the_total(text, tmp_path):
    seen: list[tuple[str, int, int | None]] = []
    run(tmp_path / "p", text, progress=lambda *report: seen.append(report))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == STAGES
    size = sum(len(document.encode()) for document in DOCUMENTS)
    last = {stage: (done, total) for stage, done, total in seen}
    assert last["hash"] == last["read"] == (Path(text).stat().st_size,) * 2
    assert last["tokenizer"] == last["encode"] == (size, size)
    for stage in STAGES:
        done = [done for name, done, _ in seen if name == stage]
        assert done == sorted(done)


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_leaves_nothing_that_opens_and_the_next_try_succeeds(stage, text, tmp_path):
    def crash(now: str, done: int, total: int | None) -> None:
        if now == stage:
            raise Crash

    run(tmp_path / "unbroken", text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Crash):
        run(tmp_path / "p", text, progress=crash)
    with pytest.raises(DataError, match="does not exist"):
        open_prepared(tmp_path / "p")
    with pytest.raises(DataError, match="unfinished"):
        open_prepared(tmp_path / "p.partial-0")
    run(tmp_path / "p", text)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "p"])
    assert content_of(tmp_path / "p") == content_of(tmp_path / "unbroken")


def test_work_on_other_text_is_not_gone_on_with(text, tmp_path):
    def crash(now: str, done: int, total: int | None) -> None:
        if now == "write":
            raise Crash

    with pytest.raises(Crash):
        run(tmp_path / "p", text, progress=crash)
    other = write_rows(tmp_path / "other" / "rows.jsonl", [f"x{document}" for document in DOCUMENTS])
    run(tmp_path / "p", other)
    run(tmp_path / "fresh", other)
    assert content_of(tmp_path / "p") == content_of(tmp_path / "fresh")
    assert not list(tmp_path.glob("p.partial*"))


def test_work_in_progress_elsewhere_is_left_alone(text, tmp_path):
    work = tmp_path / "p.partial-0"
    work.mkdir()
    with open(work / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (work / "half").touch()
        run(tmp_path / "p", text)
        assert (work / "half").exists()
    assert not (tmp_path / "p.partial-1").exists()


def test_an_unfinished_directory_is_made_again(text, tmp_path):
    run(tmp_path / "p", text)
    whole = content_of(tmp_path / "p")
    (tmp_path / "p" / "meta.json").unlink()
    (tmp_path / "p" / "train.bin").write_bytes(b"half")
    run(tmp_path / "p", text)
    assert content_of(tmp_path / "p") == whole


def test_a_directory_with_other_things_in_it_is_left_alone(text, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (home / "train.bin").write_text("not ours")
    with pytest.raises(DataError, match=r"other things in it, such as thesis\.tex: set data\.prepared"):
        run(home, text)
    assert (home / "thesis.tex").read_text() == "years of work"
    with pytest.raises(DataError, match="there are other things in it"):
        run(home / "thesis.tex", text)


def test_of_two_processes_at_once_the_first_to_finish_wins(text, tmp_path):
    run(tmp_path / "other", text)

    def overtake(stage: str, done: int, total: int | None) -> None:
        if stage == "baselines" and not (tmp_path / "p").exists():
            shutil.copytree(tmp_path / "other", tmp_path / "p")
            (tmp_path / "p" / "mark").touch()

    assert run(tmp_path / "p", text, progress=overtake).train.num_documents > 0
    assert (tmp_path / "p" / "mark").exists()
    assert not list(tmp_path.glob("p.partial*"))


@pytest.mark.parametrize("name", ["train.bin", "train.documents.npy", "meta.json.tmp"])
@pytest.mark.parametrize("num_documents", [3, 2000])  # the write fails at the end, or on the way
def test_a_full_disk_is_told_and_leaves_nothing(name, num_documents, tmp_path, monkeypatch):
    def full(path: Any, *arguments: Any, **options: Any) -> Any:
        return builtins.open("/dev/full" if Path(path).name == name else path, *arguments, **options)

    monkeypatch.setattr(corpus, "open", full, raising=False)
    text = write_rows(tmp_path / "rows.jsonl", DOCUMENTS[:3] + [str(number) for number in range(num_documents)])
    with pytest.raises(DataError, match=r"p cannot be written \(the disk is full\): make room, and the same"):
        run(tmp_path / "p", text)
    assert not (tmp_path / "p").exists()
    monkeypatch.undo()
    run(tmp_path / "p", text)
    run(tmp_path / "unbroken", text)
    assert content_of(tmp_path / "p") == content_of(tmp_path / "unbroken")


def test_a_place_that_cannot_be_written_is_told(text):
    with pytest.raises(DataError, match=r"rows\.jsonl/p cannot be written .*: set data\.prepared to another"):
        run(Path(text) / "p", text)


def test_text_that_changes_while_it_is_read_is_refused(text, tmp_path):
    def append(stage: str, done: int, total: int | None) -> None:
        if stage == "read":
            write_rows(Path(text), [*DOCUMENTS, "and one more"])

    with pytest.raises(DataError, match="changed while they were read"):
        run(tmp_path / "p", text, progress=append)


def test_the_directorys_name_follows_the_text_and_the_settings(text, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(iter([]), vocab_size=257).to_str(), encoding="utf-8")
    rows = write_rows(tmp_path / "below" / "rows.jsonl", DOCUMENTS)
    first = name_of(tmp_path, text)
    assert first.parent == tmp_path
    assert first.name.startswith("corpus-")
    assert len(first.name) == len("corpus-") + 8
    assert name_of(tmp_path, rows) == first  # the same text in another place
    others = [
        name_of(tmp_path, text, vocab_size=301),
        name_of(tmp_path, text, held_out=0.1),
        name_of(tmp_path, text, text_column="body"),
        name_of(tmp_path, text, tokenizer=str(tokenizer)),
        name_of(tmp_path, text, write_rows(tmp_path / "more.jsonl", ["x"])),
        name_of(tmp_path, write_rows(tmp_path / "below" / "rows.jsonl", [*DOCUMENTS[:-1], "x"])),
    ]
    assert len({first, *others}) == 7


def test_large_sources_are_told_apart_by_their_time_of_change(text, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_HASH_LIMIT", 10)
    first = name_of(tmp_path, text)
    assert name_of(tmp_path, text) == first
    os.utime(text, ns=(0, 0))
    assert name_of(tmp_path, text) != first


def test_a_name_that_is_a_path_and_a_tokenizer_that_is_missing_are_refused(text, tmp_path):
    for name in ("a/b", ""):
        with pytest.raises(DataError, match=r"data\.name is"):
            name_of(tmp_path, text, name=name)
    with pytest.raises(DataError, match=r"data\.tokenizer is 'gone\.json', which is not there"):
        name_of(tmp_path, text, tokenizer="gone.json")


def test_a_token_file_changed_later_is_found_when_asked(text, tmp_path):
    prepared = run(tmp_path / "p", text)
    content = bytearray(prepared.train.path.read_bytes())
    content[-1] ^= 1
    prepared.train.path.write_bytes(content)
    run(tmp_path / "p", text)
    with pytest.raises(DataError, match=r"train\.bin does not have the sha256 that meta\.json tells"):
        run(tmp_path / "p", text, verify=True)
