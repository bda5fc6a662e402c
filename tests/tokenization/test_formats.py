"""Tokenizers of other makes: the ids are those of the library that each comes from."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest

from moetrain.data.tokenizer import END_OF_TEXT, end_of_text, fingerprint, train_tokenizer, vocabulary_size
from moetrain.errors import DataError
from moetrain.prepare.directory import prepare
from moetrain.prepare.reading import Options
from moetrain.sources.text import expand, read_documents
from moetrain.tokenization.fast import fast_encoder
from moetrain.tokenization.formats import TIKTOKEN, read_tokenizer, tokenizer_files

ADDRESSES = [text[:20_000] for text in read_documents(expand(["builtin:sotu"]), text_column="text")][:20]
ODD = [
    "  two  spaces\n\n\tand a tab  ",
    "café naïve 你好 привет 😀 1234567 ﬁ ①",
    "I'LL don't HTTPServer x_y/z\r\n\r\nend",
    "",
]
TRAINED = train_tokenizer(iter(ADDRESSES), vocab_size=1000)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def ranks_of_trained() -> dict[bytes, int]:
    """As a tiktoken file has them: bytes first, then merges, from 0."""
    content = json.loads(TRAINED.to_str())
    decoded = {id_: TRAINED.decoder.decode([text]) for text, id_ in content["model"]["vocab"].items() if id_ > 256}
    texts = [bytes([byte]) for byte in range(256)]
    texts += [decoded[id_].encode() for id_ in sorted(decoded) if "\ufffd" not in decoded[id_]]
    return {text: rank for rank, text in enumerate(dict.fromkeys(texts))}


def write_tiktoken(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(text) + f" {rank}\n".encode() for text, rank in ranks.items()))
    return path


@pytest.mark.parametrize("name", TIKTOKEN)
def test_a_tiktoken_file_gives_the_ids_of_tiktoken(name, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = ranks_of_trained()
    path = write_tiktoken(tmp_path / (f"{name}.model" if name == "tokenizer" else f"{name}.tiktoken"), ranks)
    tokenizer = read_tokenizer(path)
    theirs = tiktoken.Encoding(name, pat_str=TIKTOKEN[name][0], mergeable_ranks=ranks, special_tokens={})
    for text in [*ADDRESSES, *ODD]:
        assert ids(tokenizer, text) == theirs.encode_ordinary(text)
    assert tokenizer.id_to_token(end_of_text(tokenizer)) == TIKTOKEN[name][1]
    assert end_of_text(tokenizer) == TIKTOKEN[name][2]


@pytest.mark.parametrize("name", [name for name in TIKTOKEN if name != "tokenizer"])
def test_words_are_split_as_tiktoken_splits_them_for_that_name(name, tmp_path, monkeypatch):
    tiktoken, openai = pytest.importorskip("tiktoken"), pytest.importorskip("tiktoken_ext.openai_public")
    # their definitions, without the download of the ranks
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *_, **__: {})
    theirs = getattr(openai, name)()
    assert theirs["special_tokens"][TIKTOKEN[name][1]] == TIKTOKEN[name][2]
    ranks = ranks_of_trained()
    tokenizer = read_tokenizer(write_tiktoken(tmp_path / f"{name}.tiktoken", ranks))
    encoding = tiktoken.Encoding(name, pat_str=theirs["pat_str"], mergeable_ranks=ranks, special_tokens={})
    for text in [*ADDRESSES, *ODD]:
        assert ids(tokenizer, text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mine.tiktoken", b"YQ== 0\n", r"does not tell how words are split.*cl100k_base\.tiktoken"),
        ("cl100k_base.tiktoken", b"YQ== 0\n", "some single bytes have no rank"),
        ("cl100k_base.tiktoken", b"YQ== 0\n!! 1\n", "is damaged"),
        ("cl100k_base.tiktoken", b"YQ== 0\nYg==\n", "is damaged"),
    ],
)
def test_a_tiktoken_file_that_cannot_be_read_is_told(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path / name)


def train_sentencepiece(directory: Path, **options: object) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for text in ADDRESSES[:8] for line in text.split(".") if line.strip()]
    (directory / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text.txt"), model_prefix=str(directory / "spm"), vocab_size=600, minloglevel=2, **options
    )
    return directory / "spm.model"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"byte_fallback": True, "add_dummy_prefix": False},
    ],
    ids=["default", "like llama", "no prefix"],
)
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(kind, options, tmp_path):
    path = train_sentencepiece(tmp_path, model_type=kind, **options)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = read_tokenizer(path)
    for text in [*ADDRESSES[10:14], *(text.lstrip(" ") for text in ODD)]:
        assert ids(tokenizer, text) == processor.encode(text)
        if processor.unk_id() not in processor.encode(text):
            decoded = tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False)
            assert decoded == processor.decode(processor.encode(text))
    assert tokenizer.id_to_token(end_of_text(tokenizer)) == "</s>"


def test_what_is_no_sentencepiece_model_is_told(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    (tmp_path / "a.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(DataError, match=r"a\.model is no sentencepiece model"):
        read_tokenizer(tmp_path / "a.model")
    with pytest.raises(DataError, match="of words or characters"):
        read_tokenizer(train_sentencepiece(tmp_path, model_type="word"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"pip install 'moetrain\[sentencepiece\]'"):
        read_tokenizer(tmp_path / "a.model")


def test_a_directory_of_hugging_face_is_read(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    with pytest.raises(DataError, match=r"model', which holds no tokenizer\.json, tokenizer\.model"):
        read_tokenizer(directory)
    content = json.loads(TRAINED.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(content["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in content["merges"]))
    from_pieces = read_tokenizer(directory)
    for text in [*ADDRESSES[:5], *ODD, f"a{END_OF_TEXT[0]}b"]:
        assert ids(from_pieces, text) == ids(TRAINED, text)
    assert fast_encoder(from_pieces).encode is not None or "not installed" in str(fast_encoder(from_pieces).reason)
    assert vocabulary_size(from_pieces) == vocabulary_size(TRAINED)
    (directory / "tokenizer.json").write_text(TRAINED.to_str())
    assert tokenizer_files(directory) == [directory / "tokenizer.json"]
    assert fingerprint(read_tokenizer(directory)) == fingerprint(TRAINED)


def test_prepare_takes_each_form_and_keeps_it_as_tokenizer_json(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "spm").mkdir()
    model = train_sentencepiece(tmp_path / "spm", model_type="unigram")
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copy(model, hub / "tokenizer.model")
    for name, path in (("a", model), ("b", hub)):
        prepared = prepare(
            tmp_path / name, text=["builtin:sotu"], text_column="text", held_out=0.05, vocab_size=600,
            tokenizer=str(path), progress=lambda *_: None, options=Options(max_characters=20_000),
        )  # fmt: skip
        # what it does not know (double spaces, for one) is lost, and that is counted
        assert prepared.meta.round_trip.tried > 0
        assert prepared.meta.vocab_size == 600
        assert fingerprint(read_tokenizer(prepared.tokenizer_path)) == prepared.meta.tokenizer_fingerprint
