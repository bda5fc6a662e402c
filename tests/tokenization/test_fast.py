"""The faster encoder: the same ids, or none at all."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moetrain.data.tokenizer import train_tokenizer
from moetrain.prepare.text import expand, read_documents
from moetrain.tokenization.fast import differs, fast_encoder, vocabulary_texts

pytest.importorskip("tiktoken")

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


@pytest.mark.parametrize("tokenizer", [TOKENIZER, split_by(CL100K)], ids=["gpt2", "cl100k"])
def test_real_text_gets_the_ids_of_the_tokenizers_library(tokenizer):
    encode = fast_encoder(tokenizer).encode
    for text, ids in zip(ADDRESSES, encode(ADDRESSES), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text).ids
    assert not differs(tokenizer, encode, vocabulary_texts(tokenizer))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.text(), st.sampled_from(["  ", "\n", "\t ", " the", "'ll", "\u2019s", "<|endoftext|>"]))))
def test_any_text_gets_the_ids_of_the_tokenizers_library(parts):
    text = "".join(parts)
    assert FAST.encode([text])[0].tolist() == TOKENIZER.encode(text).ids


def test_ids_in_another_order_than_the_merges_do_not_matter():
    vocab = json.loads(TOKENIZER.to_str())["model"]["vocab"]
    other = changed(vocab={text: id_ if id_ == 0 else len(vocab) - id_ for text, id_ in vocab.items()})
    assert not differs(other, fast_encoder(other).encode, ADDRESSES[:10])
    assert fast_encoder(other).encode([" the"])[0].tolist() == other.encode(" the").ids


def test_a_vocabulary_on_which_the_two_differ_is_found():
    # "abc" can be joined from ab + c and a + bc; tokenizers knows only the first way
    vocab = json.loads(TOKENIZER.to_str())["model"]["vocab"]
    bytes_alone = {text: id_ for text, id_ in vocab.items() if id_ <= 256}
    made = bytes_alone | {"bc": 257, "ab": 258, "abc": 259}
    tokenizer = changed(vocab=made, merges=[["b", "c"], ["a", "b"], ["ab", "c"]])
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    fast = fast_encoder(tokenizer).encode
    assert differs(tokenizer, fast, ["abc"])
    assert differs(tokenizer, fast, vocabulary_texts(tokenizer))
    assert not differs(tokenizer, fast, ["ab bc c"])


def _with_normalizer() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _with_prefix_space() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _with_added_word() -> Tokenizer:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_tokens(["moetrain"])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (_with_normalizer(), "changes the text first"),
        (_with_prefix_space(), "splits words in a way"),
        (_with_added_word(), "words of its own"),
        (changed(dropout=0.1), "BPE with dropout"),
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel, not BPE"),
        (split_by(r"\p{In_Basic_Latin}"), "does not take"),
    ],
)
def test_where_it_cannot_be_the_same_there_is_none_and_the_reason(tokenizer, reason):
    fast = fast_encoder(tokenizer)
    assert fast.encode is None
    assert reason in fast.reason


def test_without_tiktoken_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install 'moetrain[fast]'" in fast_encoder(TOKENIZER).reason
