"""The same ids by a faster encoder: fastokens, where it is installed, which reads the same ``tokenizer.json``.

It finds words and joins them with code of its own, so its ids are held against those of ``tokenizers``: for every entry
of the vocabulary, the characters of Unicode, texts that begin alike, a sample of the user's own text, and a spot check
in each shard.
"""

from __future__ import annotations

import importlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moetrain.data.tokenizer import BatchEncoder, TokenIds, batch_encoder

_END_OF_TEXT_PLANES = 0x40000  # beyond lie tags, and places for private use
_TOGETHER = 64  # characters of Unicode in one text


@dataclass(frozen=True)
class Fast:
    """A faster encoder, or why there is none."""

    encode: BatchEncoder | None
    reason: str | None


def fast_encoder(tokenizer: Tokenizer) -> Fast:
    """fastokens with the words and merges of ``tokenizer``; whether its ids are the same is for ``differs`` to say.

    It works with as many threads as RAYON_NUM_THREADS and FASTOKENS_BPE_THREADS say in the environment, by default on
    all cores.

    Args:
        tokenizer: of the ``tokenizers`` library, with special tokens as plain text (as ``load_tokenizer`` gives it).
    """
    try:
        fastokens: Any = importlib.import_module("fastokens")
    except ImportError:
        return Fast(None, "fastokens is not installed (pip install fastokens)")
    content = tokenizer.to_str()
    if json.loads(content)["model"].get("dropout"):
        return Fast(None, "the tokenizer is BPE with dropout, which gives other ids each time")
    try:
        return Fast(_batches(fastokens.Tokenizer.from_json_str(content)), None)
    except Exception as error:  # its errors have no type of their own
        return Fast(None, f"fastokens does not take the tokenizer ({error})")


def differs(tokenizer: Tokenizer, fast: BatchEncoder, texts: Iterable[str]) -> bool:
    """Whether the two give other ids for any of the texts."""
    given = list(texts)
    one, other = fast(given), batch_encoder(tokenizer)(given)
    return not (np.array_equal(one.lengths, other.lengths) and np.array_equal(one.ids, other.ids))


def vocabulary_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each entry, alone and after a space, that is whole characters."""
    decoded = tokenizer.decode_batch([[id_] for id_ in tokenizer.get_vocab().values()], skip_special_tokens=False)
    whole = [text for text in decoded if "\ufffd" not in text]
    return [*whole, *(f" {text}" for text in whole)]


def unicode_texts() -> list[str]:
    """Characters of Unicode after a letter, a digit and a space: all, but of ideographs and of places not yet given
    away, where thousands of one kind lie together, one of 16."""
    parts = []
    for code in range(_END_OF_TEXT_PLANES):
        kind = unicodedata.category(chr(code))
        if kind not in ("Co", "Cs") and (code % 16 == 0 or not (kind == "Cn" or (kind == "Lo" and code >= 0x3400))):
            parts.append(f"a{chr(code)}1{chr(code)} {chr(code)}")
    return ["".join(parts[start : start + _TOGETHER]) for start in range(0, len(parts), _TOGETHER)]


def alike_texts() -> list[str]:
    """Pairs of texts that begin alike, and part after or within white space.

    What was found in a text can be kept for the next one, and where the two part it must not be: fastokens 0.3.2 gave
    other ids with the patterns of Llama 3 and Qwen, by what the same thread had encoded before. It kept what was longer
    than 4 KiB.
    """
    beginning = " ".join(f"{number} apples" for number in range(500))
    before = [f"{beginning}{' ' * spaces}" for spaces in (2, 9)]
    return [text for one in before for end in (" ", "\n", "\tx", "the") for text in (f"{one}x and more", f"{one}{end}")]


def _batches(tokenizer: Any) -> BatchEncoder:
    def encode_batch(texts: list[str]) -> TokenIds:
        ids, ends = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        return TokenIds(np.frombuffer(ids, dtype="<u4"), np.diff(np.frombuffer(ends, dtype="<u8")).astype(np.int64))

    return encode_batch
