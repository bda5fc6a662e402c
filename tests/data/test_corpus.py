"""Token files: what is written opens again, and what is damaged does not."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import corpus
from moetrain.data.corpus import (
    FORMAT_VERSION,
    META,
    Baselines,
    Meta,
    RoundTrip,
    SourceFile,
    SplitWriter,
    mark_compared,
    open_prepared,
    was_touched,
    write_meta,
)
from moetrain.data.tokenizer import fingerprint, train_tokenizer
from moetrain.errors import DataError

TRAIN = [[5, 256, 7, 0], [8, 0], [255, 9, 10, 11, 0]]
HELD_OUT = [[3, 0]]


def write_directory(
    directory: Path, *, train: list[list[int]] = TRAIN, held_out: list[list[int]] = HELD_OUT, vocab_size: int = 300
) -> Path:
    directory.mkdir(parents=True)
    splits = {}
    for split, documents in {"train": train, "held_out": held_out}.items():
        with SplitWriter(directory, split=split, vocab_size=vocab_size) as writer:
            for ids in documents:
                writer.add(ids, num_bytes=10 * len(ids))
            splits[split] = writer.finish()
    tokenizer = train_tokenizer(iter([]), vocab_size=257)
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    meta = Meta(
        format_version=FORMAT_VERSION,
        vocab_size=vocab_size,
        end_of_text=0,
        tokenizer_fingerprint=fingerprint(tokenizer),
        empty_documents=4,
        dropped={"exact_duplicates": 2},
        round_trip=RoundTrip(tried=3, same=2),
        train=splits["train"],
        held_out=splits["held_out"],
        sources=(SourceFile(name="a.txt", size=1, sha256="0"),),
        baselines=Baselines(xz=2.0, trigram=3.0, train_bytes=1, held_out_bytes=1, truncated=False),
    )
    write_meta(directory, meta=meta)
    return directory


def documents_of(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
    return [piece.tolist() for piece in np.split(tokens, starts[1:])]


def test_what_was_written_is_what_opens(tmp_path):
    prepared = open_prepared(write_directory(tmp_path / "p"), verify=True)
    assert documents_of(prepared.train.tokens, prepared.train.documents) == TRAIN
    assert documents_of(prepared.held_out.tokens, prepared.held_out.documents) == HELD_OUT
    assert (prepared.train.num_tokens, prepared.train.num_documents, prepared.train.num_bytes) == (11, 3, 110)
    assert (prepared.vocab_size, prepared.meta.empty_documents) == (300, 4)
    assert prepared.meta.sources == (SourceFile(name="a.txt", size=1, sha256="0"),)
    assert prepared.tokenizer_path.is_file()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 65_535), min_size=1), min_size=1))
def test_any_documents_come_back(tmp_path_factory, documents):
    directory = write_directory(tmp_path_factory.mktemp("corpus") / "p", train=documents, vocab_size=65_536)
    train = open_prepared(directory, verify=True).train
    assert documents_of(train.tokens, train.documents) == documents
    shutil.rmtree(directory.parent)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.lists(st.integers(0, 299), min_size=1), max_size=4), max_size=6))
def test_documents_written_many_at_once_are_the_same_files(tmp_path_factory, groups):
    directory = tmp_path_factory.mktemp("corpus")
    with (
        SplitWriter(directory, split="one", vocab_size=300) as one,
        SplitWriter(directory, split="many", vocab_size=300) as many,
    ):
        for group in groups:
            for ids in group:
                one.add(ids, num_bytes=len(ids))
            tokens = np.array([token for ids in group for token in ids], dtype=np.uint16)
            lengths = np.array([len(ids) for ids in group], dtype=np.int64)
            many.add_many(tokens, lengths=lengths, num_bytes=len(tokens))
        assert one.finish() == many.finish()
    starts = np.load(directory / "many.documents.npy")
    flat = [ids for group in groups for ids in group]
    assert starts.tolist() == [sum(map(len, flat[:number])) for number in range(len(flat))]
    shutil.rmtree(directory)


def test_a_disk_that_fails_while_others_are_written_is_told(tmp_path, monkeypatch):
    synced: list[int] = []

    def fail_once(file: int) -> None:
        synced.append(file)
        if len(synced) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(corpus, "_SYNC_EVERY", 100)
    monkeypatch.setattr(corpus.os, "fsync", fail_once)
    with SplitWriter(tmp_path, split="train", vocab_size=300) as writer:
        writer.add([1] * 60, num_bytes=60)
        with pytest.raises(OSError, match="Input/output error"):
            writer.finish()


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_ids_take_two_bytes_as_long_as_they_fit(vocab_size, width, tmp_path):
    directory = write_directory(tmp_path / "p", train=[[vocab_size - 1, 0]], vocab_size=vocab_size)
    assert (directory / "train.bin").read_bytes() == (vocab_size - 1).to_bytes(width, "little") + bytes(width)
    assert open_prepared(directory).train.tokens[0] == vocab_size - 1


def test_the_token_files_cannot_be_changed_by_accident(tmp_path):
    with pytest.raises(ValueError, match="read-only"):
        open_prepared(write_directory(tmp_path / "p")).train.tokens[0] = 1


def test_a_directory_without_meta_is_told_to_be_unfinished(tmp_path):
    directory = write_directory(tmp_path / "p")
    (directory / META).unlink()
    with pytest.raises(DataError, match="is an unfinished one"):
        open_prepared(directory)
    with pytest.raises(DataError, match="gone does not exist"):
        open_prepared(tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta | {"format_version": 99}, "format version 99, but this moetrain reads version 2"),
        (lambda meta: {}, "meta.json is damaged"),
        (lambda meta: [], "meta.json is damaged"),
        (lambda meta: meta | {"other": 1}, "meta.json is damaged"),
        (lambda meta: meta | {"train": {}}, "meta.json is damaged"),
        (lambda meta: {key: meta[key] for key in meta if key != "sources"}, "meta.json is damaged"),
        (lambda meta: meta | {"vocab_size": 70_000}, r"train\.bin has 22 bytes, but meta\.json tells 44"),
    ],
)
def test_a_meta_that_does_not_fit_is_refused(change, message, tmp_path):
    path = write_directory(tmp_path / "p") / META
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        open_prepared(tmp_path / "p")


def test_a_meta_that_is_cut_short_is_refused(tmp_path):
    path = write_directory(tmp_path / "p") / META
    path.write_text(path.read_text()[:50])
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        open_prepared(tmp_path / "p")


@pytest.mark.parametrize(
    "name", ["train.bin", "held_out.bin", "train.documents.npy", "held_out.documents.npy", "tokenizer.json"]
)
def test_a_missing_file_is_named(name, tmp_path):
    (write_directory(tmp_path / "p") / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_prepared(tmp_path / "p")


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "train.documents.npy", "held_out.documents.npy"])
def test_a_file_cut_short_is_named(name, tmp_path):
    path = write_directory(tmp_path / "p") / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"{name} (has|is damaged)"):
        open_prepared(tmp_path / "p")


def test_starts_of_another_corpus_are_refused(tmp_path):
    other = write_directory(tmp_path / "other", train=[[1, 0]])
    shutil.copy(other / "train.documents.npy", write_directory(tmp_path / "p"))
    with pytest.raises(DataError, match=r"train\.documents\.npy holds int64 \(1,\), but meta\.json tells 3 documents"):
        open_prepared(tmp_path / "p")


@pytest.mark.parametrize("name", ["train.bin", "held_out.bin", "train.documents.npy", "held_out.documents.npy"])
def test_one_changed_bit_is_found_when_verifying_and_only_then(name, tmp_path):
    path = write_directory(tmp_path / "p") / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_prepared(tmp_path / "p")
    with pytest.raises(DataError, match=f"{name} does not have the sha256"):
        open_prepared(tmp_path / "p", verify=True)


def test_a_directory_is_touched_when_a_file_changes_until_it_is_compared(tmp_path):
    directory = write_directory(tmp_path / "p")
    assert not was_touched(tmp_path / "none")
    assert not was_touched(directory)
    time.sleep(0.01)  # file systems tell times apart by their kernel's tick
    shutil.copystat(directory / "meta.json", directory / "train.bin")  # as a program that sets the times back
    assert was_touched(directory)
    mark_compared(directory)
    assert not was_touched(directory)


def test_another_tokenizer_is_found_when_verifying(tmp_path):
    directory = write_directory(tmp_path / "p")
    other = train_tokenizer(iter(["aa aa"]), vocab_size=258)
    (directory / "tokenizer.json").write_text(other.to_str(), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer that made the tokens"):
        open_prepared(directory, verify=True)
