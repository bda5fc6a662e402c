"""The same byte-level BPE by a faster encoder: tiktoken (optional), where it is proved to give the same ids.

tiktoken joins the two neighbours whose *joined text* was learnt first, ``tokenizers`` the two whose *merge* was. The
two differ only where a text can be joined from two halves in more than one way, which training all but rules out; so
the proof is by trial: every entry of the vocabulary, a sample of the user's own text, and a spot check in each shard.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moetrain.data.tokenizer import BatchEncoder, batch_encoder
from moetrain.tokenization.bytelevel import BYTE_OF

# As tiktoken writes GPT-2's pattern; the same words as tokenizers' ByteLevel finds, without going back.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@dataclass(frozen=True)
class Fast:
    """A faster encoder, or why there is none."""

    encode: BatchEncoder | None
    reason: str | None


def fast_encoder(tokenizer: Tokenizer) -> Fast:
    """tiktoken with the merges of ``tokenizer``; whether its ids are the same is for ``differs`` to say.

    Args:
        tokenizer: of the ``tokenizers`` library, with special tokens as plain text (as ``load_tokenizer`` gives it).
    """
    try:
        tiktoken: Any = importlib.import_module("tiktoken")
    except ImportError:
        return Fast(None, "tiktoken is not installed (pip install 'moetrain[fast]')")
    content = json.loads(tokenizer.to_str())
    reason = _unlike(content)
    if reason is not None:
        return Fast(None, f"the tokenizer is {reason}")
    pattern = _pattern(content["pre_tokenizer"])
    if pattern is None:
        return Fast(None, "the tokenizer splits words in a way that tiktoken does not")
    ranks, ids = _ranks(content)
    if any(bytes([byte]) not in ranks for byte in range(256)):
        return Fast(None, "the tokenizer lacks some bytes")
    try:
        encoding = tiktoken.Encoding("moetrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except Exception as error:  # a pattern that its regular expressions do not know raises ValueError, and more
        return Fast(None, f"tiktoken does not take the tokenizer ({error})")
    return Fast(_batches(encoding, ids=ids), None)


def differs(tokenizer: Tokenizer, fast: BatchEncoder, texts: Iterable[str]) -> bool:
    """Whether the two give other ids for any of the texts."""
    given = list(texts)
    pairs = zip(fast(given), batch_encoder(tokenizer)(given), strict=True)
    return any(not np.array_equal(one, other) for one, other in pairs)


def vocabulary_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each entry, alone and after a space, that is whole characters."""
    decoded = tokenizer.decode_batch([[id_] for id_ in tokenizer.get_vocab().values()], skip_special_tokens=False)
    whole = [text for text in decoded if "\ufffd" not in text]
    return [*whole, *(f" {text}" for text in whole)]


def _batches(encoding: Any, *, ids: npt.NDArray[np.uint32]) -> BatchEncoder:
    def encode_batch(texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        # not encode_to_numpy, which looks for special tokens even if there are none: half as fast
        return [ids[np.array(encoding.encode_ordinary(text), dtype=np.intp)] for text in texts]

    return encode_batch


def _unlike(content: dict[str, Any]) -> str | None:
    """What about a tokenizer.json is not plain byte-level BPE."""
    model = content["model"]
    if model["type"] != "BPE":
        return f"{model['type']}, not BPE"
    if content["normalizer"] is not None:
        return "one that changes the text first (a normalizer)"
    if any(not token["special"] for token in content["added_tokens"]):
        return "one with words of its own beside the merges (added tokens)"
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    return f"BPE with {odd[0]}" if odd else None


def _pattern(splitter: dict[str, Any] | None) -> str | None:
    """The regular expression of the words, where the pre-tokenizer is one expression and then bytes."""
    match splitter:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _ranks(content: dict[str, Any]) -> tuple[dict[bytes, int], npt.NDArray[np.uint32]]:
    """What tiktoken ranks texts by, the order of the merges, and the id of each rank."""
    vocab: dict[str, int] = content["model"]["vocab"]
    ranks: dict[bytes, int] = {}
    ids: list[int] = []
    merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"])
    for text in [*BYTE_OF, *("".join(pair) for pair in merges)]:
        if text in vocab and all(character in BYTE_OF for character in text):
            data = bytes(BYTE_OF[character] for character in text)
            if data not in ranks:
                ranks[data] = len(ids)
                ids.append(vocab[text])
    return ranks, np.array(ids, dtype=np.uint32)
