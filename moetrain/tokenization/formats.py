"""Tokenizers in the forms they come in: a file or a directory becomes one of the ``tokenizers`` library.

tokenizer.json           as it is
a directory              of Hugging Face: its tokenizer.json, else its tokenizer.model, else vocab.json and merges.txt
*.model                  sentencepiece, Unigram or BPE (needs sentencepiece and protobuf); or tiktoken's form
*.tiktoken               text of a token (base64) and rank a line; the words' pattern is known by the file's name
"""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from moetrain.data.tokenizer import END_OF_TEXT, as_plain_text, load_tokenizer
from moetrain.errors import DataError
from moetrain.tokenization.bytelevel import CHARACTER_OF, GPT2_PATTERN
from moetrain.tokenization.sentencepiece import read_sentencepiece

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# name of the file -> pattern of the words, end-of-text token and its id (tiktoken_ext/openai_public.py; for Llama 3
# its tokenizer.py)
TIKTOKEN = {
    "r50k_base": (GPT2_PATTERN, "<|endoftext|>", 50256),
    "p50k_base": (GPT2_PATTERN, "<|endoftext|>", 50256),
    "cl100k_base": (_CL100K, "<|endoftext|>", 100257),
    "o200k_base": (_O200K, "<|endoftext|>", 199999),
    "tokenizer": (_CL100K, "<|end_of_text|>", 128001),
}


def tokenizer_files(path: Path) -> list[Path]:
    """The files that a tokenizer is made of.

    Raises:
        DataError: there is no such tokenizer.
    """
    if path.is_file():
        return [path]
    for names in (["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"]):
        if path.is_dir() and all((path / name).is_file() for name in names):
            return [path / name for name in names]
    what = (
        "holds no tokenizer.json, tokenizer.model, or vocab.json with merges.txt" if path.is_dir() else "is not there"
    )
    raise DataError(f"data.tokenizer is '{path}', which {what}: name a tokenizer.json, or what else docs/data.md lists")


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer in any of the forms.

    Raises:
        DataError: it is missing, damaged, has no end-of-text token, or needs a package that is not installed.
    """
    files = tokenizer_files(path)
    if len(files) == 2:
        return _gpt2(*files)
    (file,) = files
    if file.suffix in (".model", ".tiktoken"):
        if _is_tiktoken(file):
            return _tiktoken(file)
        return _checked(read_sentencepiece(file), path=file)
    return load_tokenizer(file)


def _checked(tokenizer: Tokenizer, *, path: Path) -> Tokenizer:
    if all(tokenizer.token_to_id(name) is None for name in END_OF_TEXT):
        raise DataError(
            f"{path} has no end-of-text token, which must stand between documents: add one of {', '.join(END_OF_TEXT)}"
        )
    return as_plain_text(tokenizer)


def _gpt2(vocab: Path, merges: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises the bare Exception
        raise DataError(f"{vocab} and {merges.name} are no tokenizer of GPT-2's form ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    known = [name for name in END_OF_TEXT if tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in known])
    return _checked(tokenizer, path=vocab)


def _is_tiktoken(file: Path) -> bool:
    with open(file, "rb") as begin:
        first = begin.readline(4096).split()
    return len(first) == 2 and first[1].isdigit()


def _tiktoken(file: Path) -> Tokenizer:
    known = TIKTOKEN.get(file.stem)
    if known is None:
        raise DataError(
            f"{file} does not tell how words are split, which is known by the file's name alone: call it "
            f"{', '.join(f'{name}.tiktoken' for name in TIKTOKEN if name != 'tokenizer')}, or tokenizer.model (Llama 3)"
        )
    pattern, end, end_id = known
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(text, validate=True): int(rank) for text, rank in lines}
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}): each line is a token in base64 and its rank") from error
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(f"{file} is damaged: some single bytes have no rank")
    vocab = {_spelt(token): rank for token, rank in ranks.items()}
    vocab[end] = end_id if end_id not in ranks.values() and end_id > max(ranks.values()) else max(ranks.values()) + 1
    merges = [_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    # tiktoken takes a word that is a token whole, however it would be joined
    tokenizer = Tokenizer(models.BPE(vocab, [pair for pair in merges if pair is not None], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return _checked(tokenizer, path=file)


def _merge(token: bytes, ranks: dict[bytes, int]) -> tuple[str, str] | None:
    """The last two pieces that a token is joined from when only earlier ones are; None if it never is."""
    own = ranks[token]
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [(ranks.get(one + other, own), place) for place, (one, other) in enumerate(itertools.pairwise(parts))]
        rank, place = min(joined)
        if rank >= own:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return _spelt(parts[0]), _spelt(parts[1])


def _spelt(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)
