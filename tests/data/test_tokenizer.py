"""Byte-level BPE: every text comes back, the same documents give the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moetrain.data import tokenizer as tokenizer_module
from moetrain.data.tokenizer import (
    END_OF_TEXT,
    batch_encoder,
    encode,
    end_of_text,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from moetrain.errors import DataError
from moetrain.sources.text import expand, read_documents

DOCUMENTS = ["the cat sat on the mat", "the   dog   sat on the log"] * 3
TOKENIZER = train_tokenizer(iter(DOCUMENTS), vocab_size=300)


def save(tokenizer: Tokenizer, path: Path) -> Path:
    path.write_text(tokenizer.to_str(), encoding="utf-8")
    return path


def rename_end_of_text(name: str, path: Path) -> Path:
    path.write_text(TOKENIZER.to_str().replace(END_OF_TEXT[0], name), encoding="utf-8")
    return path


@settings(deadline=None)
@given(st.text())
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_an_entry_even_if_no_document_holds_it():
    nothing = train_tokenizer(iter([]), vocab_size=400)
    text = "".join(map(chr, range(256))) + "\U0010ffff"
    assert vocabulary_size(nothing) == 257
    assert len(nothing.encode(text).ids) == len(text.encode())
    assert nothing.decode(nothing.encode(text).ids) == text


def test_a_word_seen_often_becomes_one_token():
    assert TOKENIZER.decode(TOKENIZER.encode("the cat sat").ids[:1]) == "the"
    assert len(TOKENIZER.encode(" sat").ids) == 1


def test_the_vocabulary_is_as_large_as_asked_or_as_the_text_allows():
    assert vocabulary_size(train_tokenizer(iter(DOCUMENTS), vocab_size=260)) == 260
    assert 260 < vocabulary_size(train_tokenizer(iter(DOCUMENTS), vocab_size=10_000)) < 300


def test_training_twice_gives_the_same_tokenizer():
    assert fingerprint(train_tokenizer(iter(DOCUMENTS), vocab_size=300)) == fingerprint(TOKENIZER)
    assert fingerprint(train_tokenizer(iter(DOCUMENTS), vocab_size=270)) != fingerprint(TOKENIZER)


def test_the_end_of_text_is_id_0_and_no_text_can_spell_it():
    assert end_of_text(TOKENIZER) == 0
    ids = TOKENIZER.encode(f"a{END_OF_TEXT[0]}b").ids
    assert 0 not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT[0]}b"


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(DataError, match=r"model\.vocab_size is 256, but .* at least 257 .*: set model\.vocab_size=257"):
        train_tokenizer(iter(DOCUMENTS), vocab_size=256)


def test_a_fault_while_reading_the_documents_comes_through():
    def documents():
        yield "a"
        raise DataError("the file is broken")

    with pytest.raises(DataError, match="the file is broken"):
        train_tokenizer(documents(), vocab_size=300)


@settings(deadline=None)
@given(st.lists(st.text(max_size=60)))
def test_documents_encoded_in_pieces_and_groups_come_back_in_order(documents):
    with mock.patch.multiple(tokenizer_module, _PIECE=8, _GROUP=20):
        encoded = encode(batch_encoder(TOKENIZER), documents)
    ends = np.cumsum(encoded.lengths)
    ids = [encoded.ids[end - length : end] for end, length in zip(ends, encoded.lengths, strict=True)]
    assert [TOKENIZER.decode(one.tolist()) for one in ids] == documents


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["the", "cat", "a", "sat.", "é!"]), st.sampled_from([" ", "   ", " \n"]))))
def test_pieces_that_are_cut_at_spaces_give_the_ids_of_the_whole(words):
    document = "".join(word + space for word, space in words)
    with mock.patch.multiple(tokenizer_module, _PIECE=8, _GROUP=20):
        encoded = encode(batch_encoder(TOKENIZER), [document])
    assert encoded.ids.tolist() == TOKENIZER.encode(document).ids


def test_a_long_document_goes_to_the_library_in_pieces():
    given = []

    def record(texts):
        given.append(texts)
        return batch_encoder(TOKENIZER)(texts)

    document = "the cat " * 100_000 + "x" * 200_000
    encoded = encode(record, [document])
    assert TOKENIZER.decode(encoded.ids.tolist()) == document
    assert all(len(text) <= 65_536 for texts in given for text in texts)


def test_a_saved_tokenizer_loads_as_the_same_however_its_file_is_laid_out(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(TOKENIZER.to_str()), indent=4, sort_keys=True), encoding="utf-8")
    assert fingerprint(load_tokenizer(path)) == fingerprint(TOKENIZER)
    assert load_tokenizer(path).encode("the cat").ids == TOKENIZER.encode("the cat").ids


def test_a_loaded_tokenizer_neither_cuts_nor_pads_nor_lets_text_end_a_document(tmp_path):
    short = Tokenizer.from_str(TOKENIZER.to_str())
    short.enable_truncation(3)
    short.enable_padding(length=50)
    loaded = load_tokenizer(save(short, tmp_path / "tokenizer.json"))
    text = f"the dog sat on the log {END_OF_TEXT[0]}"
    assert loaded.encode(text).ids == TOKENIZER.encode(text).ids


@pytest.mark.parametrize("name", END_OF_TEXT)
def test_each_known_name_ends_a_text(name, tmp_path):
    assert end_of_text(load_tokenizer(rename_end_of_text(name, tmp_path / "tokenizer.json"))) == 0


def test_the_vocabulary_size_covers_ids_beyond_a_hole(tmp_path):
    content = json.loads(TOKENIZER.to_str())
    content["model"]["vocab"]["hole"] = 999
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert vocabulary_size(load_tokenizer(path)) == 1000


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json is not a file"):
        load_tokenizer(tmp_path / "gone.json")
    with pytest.raises(DataError, match="is not a file"):
        load_tokenizer(tmp_path)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"other\.json is not a tokenizer file"):
        load_tokenizer(tmp_path / "other.json")


def test_a_tokenizer_without_an_end_of_text_is_refused_with_the_names_looked_for(tmp_path):
    path = rename_end_of_text("[SEP]", tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"no end-of-text token") as caught:
        load_tokenizer(path)
    assert all(name in str(caught.value) for name in END_OF_TEXT)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_special_tokens_come_first_and_no_text_can_spell_them(kind):
    tokenizer = train_tokenizer(iter(DOCUMENTS), vocab_size=300, kind=kind, special_tokens=["<|user|>", "<|pad|>"])
    assert [tokenizer.token_to_id(name) for name in (END_OF_TEXT[0], "<|user|>", "<|pad|>")] == [0, 1, 2]
    ids = tokenizer.encode("a<|user|>b").ids
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|user|>b"
    with pytest.raises(DataError, match=r"at least 259 entries .*<\|user\|>"):
        train_tokenizer(iter(DOCUMENTS), vocab_size=258, kind=kind, special_tokens=["<|user|>", "<|pad|>"])


PROSE = next(read_documents(expand(["builtin:sotu"]), text_column="text")).split(". ")
UNIGRAM = train_tokenizer(iter(PROSE), vocab_size=400, kind="unigram")


@settings(deadline=None)
@given(st.text())
def test_every_text_comes_back_from_a_unigram_tokenizer(text):
    assert UNIGRAM.decode(UNIGRAM.encode(text).ids, skip_special_tokens=False) == text


def test_a_unigram_tokenizer_is_the_same_each_time_and_joins_what_is_frequent():
    again = [train_tokenizer(iter(PROSE), vocab_size=400, kind="unigram") for _ in range(3)]
    assert {fingerprint(one) for one in again} == {fingerprint(UNIGRAM)}
    assert len(UNIGRAM.encode(PROSE[0]).ids) < len(PROSE[0]) / 1.5
    assert 257 < vocabulary_size(UNIGRAM) <= 400
