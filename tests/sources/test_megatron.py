"""Megatron's token files: written by its format, and by its own builder where that is installed."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.data.tokenizer import train_tokenizer
from moetrain.errors import DataError
from moetrain.prepare.directory import prepare
from moetrain.prepare.reading import Options
from moetrain.sources.megatron import documents
from moetrain.sources.text import inputs

DOCUMENTS = [[5, 256, 7], [8], [255, 9, 10, 11], [], [6]]
KINDS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def write(prefix: Path, sequences: list[list[int]], *, ends: list[int] | None = None, kind: int = 4) -> Path:
    """Files as megatron/core/datasets/indexed_dataset.py (_IndexWriter) writes them; ends counts sequences."""
    data = [np.array(sequence, dtype=KINDS[kind]).tobytes() for sequence in sequences]
    Path(f"{prefix}.bin").write_bytes(b"".join(data))
    starts = [0, *(ends if ends is not None else range(1, len(sequences) + 1))]
    places = [sum(map(len, data[:number])) for number in range(len(data))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, kind, len(sequences), len(starts))
    index += np.array([len(sequence) for sequence in sequences], dtype=np.int32).tobytes()
    index += np.array(places, dtype=np.int64).tobytes() + np.array(starts, dtype=np.int64).tobytes()
    path = Path(f"{prefix}.idx")
    path.write_bytes(index)
    return path


def read(index: Path) -> list[list[int]]:
    return [ids.tolist() for ids in documents(index)]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_back_whatever_the_width_of_the_ids(kind, tmp_path):
    small = [[token % 100 for token in document] for document in DOCUMENTS]
    assert read(write(tmp_path / "a", small, kind=kind)) == small


def test_a_document_of_several_sequences_is_one(tmp_path):
    assert read(write(tmp_path / "a", [[1, 2], [3], [4, 5], [6]], ends=[2, 2, 4])) == [[1, 2, 3], [], [4, 5, 6]]


def test_what_megatrons_own_builder_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for document in DOCUMENTS[:3]:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    assert read(tmp_path / "a.idx") == DOCUMENTS[:3]


@pytest.mark.parametrize("name", ["a.idx", "a.bin", "a", "*.idx", "."])
def test_the_files_are_found_by_either_name_or_what_both_have_in_common(name, tmp_path, monkeypatch):
    index = write(tmp_path / "a", DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    assert inputs([name]) == [index]


def test_text_and_token_files_do_not_mix(tmp_path):
    (tmp_path / "b.txt").write_text("x")
    write(tmp_path / "a", DOCUMENTS)
    with pytest.raises(DataError, match=r"token files .*a\.idx.* and text .*b\.txt.*: prepare them as two sources"):
        inputs([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.idx", lambda content: b"TNTIDX" + content, r"a\.idx is no index of Megatron's"),
        ("a.idx", lambda content: content[:20], r"a\.idx is no index"),
        ("a.idx", lambda content: content[:-8], r"a\.idx has .* bytes, but tells of .*: it is cut short"),
        ("a.idx", lambda content: content[:9] + b"\2" + content[10:], "has version 2"),
        ("a.idx", lambda content: content[:17] + b"\7" + content[18:], "numbers of kind 7"),
        ("a.idx", lambda content: content[:-8] + b"\xff" * 7 + b"\x7f", r"a\.idx is damaged"),
        ("a.bin", lambda content: content[:-4], r"a\.bin has 32 bytes, fewer than a\.idx tells of"),
    ],
)
def test_damaged_files_are_told(name, change, message, tmp_path):
    index = write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        read(index)


def test_a_missing_bin_is_told(tmp_path):
    index = write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"needs a\.bin beside it"):
        read(index)


def prepare_tokens(directory: Path, index: Path, **changed: Any) -> Any:
    settings: dict[str, Any] = {"tokenizer": str(directory.parent / "tokenizer.json"), "options": Options()}
    return prepare(
        directory, text=[str(index)], text_column="text", held_out=0.3, vocab_size=300,
        progress=lambda *_: None, **settings | changed,
    )  # fmt: skip


def test_tokens_are_taken_as_they_are_and_their_text_is_counted(tmp_path):
    texts = [f"document {number} of some" for number in range(30)]
    tokenizer = train_tokenizer(iter(texts), vocab_size=300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    ids = [tokenizer.encode(text).ids for text in texts]
    ids[4] = tokenizer.encode("d", add_special_tokens=False).ids + tokenizer.encode("ocument").ids  # not its own way
    with_end = [[*one, 0] if number % 2 else one for number, one in enumerate(ids)]
    prepared = prepare_tokens(tmp_path / "p", write(tmp_path / "a", [*with_end, []], kind=8))
    found = [
        piece.tolist()
        for part in (prepared.train, prepared.held_out)
        for piece in np.split(part.tokens, part.documents[1:])
    ]
    assert sorted(found) == sorted([*one, 0] for one in ids)
    assert prepared.train.num_bytes + prepared.held_out.num_bytes == sum(
        len(tokenizer.decode(one).encode()) for one in ids
    )
    assert prepared.meta.empty_documents == 1
    assert [source.name for source in prepared.meta.sources] == ["a.idx", "a.bin"]


def test_tokens_of_another_tokenizer_and_settings_for_text_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(iter([]), vocab_size=257).to_str())
    index = write(tmp_path / "a", [[1, 2], [3, 257]])
    with pytest.raises(DataError, match=r"the token id 257, but data\.tokenizer has ids below 257"):
        prepare_tokens(tmp_path / "p", index)
    with pytest.raises(DataError, match=r"so data\.tokenizer must name the tokenizer that made them"):
        prepare_tokens(tmp_path / "p", index, tokenizer=None)
    with pytest.raises(DataError, match=r"token ids, not text: leave prepare\.min_characters"):
        prepare_tokens(tmp_path / "p", index, options=Options(max_characters=9))
