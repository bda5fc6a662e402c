"""A tokenizer.json as llama.cpp wants a vocabulary: byte-level BPE that splits as GPT-2's does, as ours are trained.

llama.cpp splits text by rules of its own, one for each of the published tokenizers; for others there is no place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from moetrain.data.tokenizer import end_of_text, vocabulary_size
from moetrain.errors import ConfigError

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Of ``gguf.TokenType``."""


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file."""

    tokens: list[str]
    """By id."""
    kinds: list[int]
    """Of each: ``NORMAL``, ``CONTROL`` or ``UNUSED``."""
    merges: list[str]
    """Best first, the two halves with a space between."""
    end_of_text: int


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Raises:
    ConfigError: it splits text in another way than GPT-2's.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    splits = content["pre_tokenizer"] or {}
    is_plain = splits.get("type") == "ByteLevel" and splits.get("use_regex", True) and not splits["add_prefix_space"]
    if content["model"]["type"] != "BPE" or content["normalizer"] is not None or not is_plain:
        raise ConfigError(["format is gguf, but the tokenizer is no byte-level BPE that splits as GPT-2's: if it is a "
                           "published one, export with format=hf, and convert with llama.cpp's convert_hf_to_gguf.py"
                           ])  # fmt: skip
    special = {each["id"] for each in content["added_tokens"] if each["special"]}
    tokens = [tokenizer.id_to_token(i) for i in range(vocabulary_size(tokenizer))]
    kinds = [UNUSED if token is None else CONTROL if i in special else NORMAL for i, token in enumerate(tokens)]
    merges = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
    named = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)]
    return Vocabulary(named, kinds, merges, end_of_text(tokenizer))
