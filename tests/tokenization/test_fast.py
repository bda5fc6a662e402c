"""The faster encoder: the same ids, or none at all."""

from __future__ import annotations

import json
import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moetrain.data.tokenizer import TokenIds, batch_encoder, train_tokenizer
from moetrain.sources.text import expand, read_documents
from moetrain.tokenization.fast import alike_texts, differs, fast_encoder, unicode_texts, vocabulary_texts

pytest.importorskip("fastokens")

ADDRESSES = [text[:20_000] for text in read_documents(expand(["builtin:sotu"]), text_column="text")][:25]
TOKENIZER = train_tokenizer(iter(ADDRESSES), vocab_size=4096)
FAST = fast_encoder(TOKENIZER)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def changed(**parts: object) -> Tokenizer:
    content = json.loads(TOKENIZER.to_str())
    content["model"] |= parts
    return Tokenizer.from_str(json.dumps(content))


def split_by(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, special_tokens=["</s>"])
    tokenizer.train_from_iterator(ADDRESSES[:5], trainer=trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def lines_apart() -> Tokenizer:
    """Takes "ab" for a word where a line begins: after each line end, says the regular expression of tokenizers;
    fastokens knows only the first line."""
    content = json.loads(train_tokenizer(iter([]), vocab_size=257).to_str())
    content["model"]["vocab"] |= {"ab": 257, "abc": 258}
    content["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    split = pre_tokenizers.Split(Regex("^ab"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize("tokenizer", [TOKENIZER, split_by(CL100K)], ids=["gpt2", "cl100k"])
def test_real_text_gets_the_ids_of_the_tokenizers_library(tokenizer):
    encode = fast_encoder(tokenizer).encode
    found = encode(ADDRESSES)
    assert found.ids.dtype == np.uint32
    for text, ids in zip(ADDRESSES, np.split(found.ids, np.cumsum(found.lengths)[:-1]), strict=True):
        assert ids.tolist() == tokenizer.encode(text).ids
    assert not differs(tokenizer, encode, vocabulary_texts(tokenizer))
    assert not differs(tokenizer, encode, unicode_texts())
    assert not differs(tokenizer, encode, alike_texts())


def test_characters_of_unicode_that_are_tried_are_of_every_kind():
    tried = set("".join(unicode_texts()))
    assert {*"é½٣αя丠가🙂\U0001d538\u0301\u200b\u00a0\u2028\x00\x85"} <= tried
    assert {unicodedata.category(one) for one in tried} >= {
        unicodedata.category(chr(code)) for code in range(sys.maxunicode) if not 0xD800 <= code < 0xE000
    } - {"Co"}


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.text(), st.sampled_from(["  ", "\n", "\t ", " the", "'ll", "\u2019s", "<|endoftext|>"]))))
def test_any_text_gets_the_ids_of_the_tokenizers_library(parts):
    text = "".join(parts)
    assert FAST.encode([text]).ids.tolist() == TOKENIZER.encode(text).ids


def test_ids_in_another_order_than_the_merges_do_not_matter():
    vocab = json.loads(TOKENIZER.to_str())["model"]["vocab"]
    other = changed(vocab={text: id_ if id_ == 0 else len(vocab) - id_ for text, id_ in vocab.items()})
    assert not differs(other, fast_encoder(other).encode, ADDRESSES[:10])
    assert fast_encoder(other).encode([" the"]).ids.tolist() == other.encode(" the").ids


def test_merges_count_in_the_order_in_which_they_were_learnt():
    # "abc" can be joined from ab + c and a + bc; the merges know only the first way, and come to the second
    vocab = json.loads(TOKENIZER.to_str())["model"]["vocab"]
    bytes_alone = {text: id_ for text, id_ in vocab.items() if id_ <= 256}
    made = bytes_alone | {"bc": 257, "ab": 258, "abc": 259}
    tokenizer = changed(vocab=made, merges=[["b", "c"], ["a", "b"], ["ab", "c"]])
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    assert not differs(tokenizer, fast_encoder(tokenizer).encode, ["abc", "ab bc c"])


def test_text_on_which_the_two_differ_is_found():
    tokenizer = lines_apart()
    assert tokenizer.encode("x\nabc").tokens == ["x", "\u010a", "ab", "c"]
    fast = fast_encoder(tokenizer).encode
    assert differs(tokenizer, fast, ["x\nabc"])
    assert differs(tokenizer, fast, ["some", "x\nabc"])
    assert not differs(tokenizer, fast, ["abc", "x abc", "x\nbc"])


def with_part(name: str, part: object) -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    setattr(tokenizer, name, part)
    tokenizer.encode_special_tokens = True
    return tokenizer


def with_added_word(word: AddedToken) -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_tokens([word])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_part("normalizer", normalizers.NFC()),
        with_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        with_added_word(AddedToken("Congress", lstrip=True)),
    ],
    ids=["normalizer", "prefix space", "added word"],
)
def test_what_else_a_tokenizer_may_do_is_done(tokenizer):
    texts = [*ADDRESSES, "e\u0301 and <|endoftext|> of  Congress,", ""]
    assert not differs(tokenizer, fast_encoder(tokenizer).encode, texts)
    assert differs(TOKENIZER, fast_encoder(tokenizer).encode, texts), "the setting does nothing here"


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (changed(dropout=0.1), "BPE with dropout"),
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "does not take the tokenizer .*WordLevel"),
        (split_by(r"\p{In_Basic_Latin}"), "does not take the tokenizer .*regex"),
    ],
)
def test_where_it_cannot_be_the_same_there_is_none_and_the_reason(tokenizer, reason):
    fast = fast_encoder(tokenizer)
    assert fast.encode is None
    assert re.search(reason, fast.reason)


def test_without_fastokens_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert "pip install fastokens" in fast_encoder(TOKENIZER).reason


def test_an_encoder_that_keeps_too_much_of_the_text_before_is_found():
    """As fastokens 0.3.2 did: what two texts begin with is taken to end, as words do, where they part."""
    before = ""

    def keeping(texts: list[str]) -> TokenIds:
        nonlocal before
        found = []
        for text in texts:
            pairs = enumerate(zip(before, text, strict=False))
            common = next((place for place, (one, other) in pairs if one != other), min(len(before), len(text)))
            parts = [text[:common], text[common:]] if 4096 <= common < len(text) else [text]
            found.append(np.concatenate([batch_encoder(TOKENIZER)([part]).ids for part in parts]))
            before = text
        return TokenIds(np.concatenate(found), np.array([len(each) for each in found], dtype=np.int64))

    assert not any(differs(TOKENIZER, keeping, [text, ""]) for text in alike_texts())
    assert not differs(TOKENIZER, keeping, ADDRESSES[:3])
    assert differs(TOKENIZER, keeping, alike_texts())
