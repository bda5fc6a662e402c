"""Text to token ids: a byte-level BPE or Unigram that is trained here, or whatever ``tokenizers`` reads."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.errors import DataError

END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
"""Names of the token that ends a document, the first one present counts: GPT-2, Llama 2, Llama 3, Gemma."""

# In characters. While it works the library holds some 170 bytes for each character of what it is given at once.
_PIECE = 1 << 16
_GROUP = 1 << 17


@dataclass(frozen=True)
class TokenIds:
    """Token ids of some texts, without special tokens."""

    ids: npt.NDArray[np.uint32]
    """[tokens], those of the texts one after the other."""
    lengths: npt.NDArray[np.int64]
    """[texts], tokens of each."""


BatchEncoder = Callable[[list[str]], TokenIds]
"""Texts to their token ids."""


def train_tokenizer(
    documents: Iterable[str], *, vocab_size: int, kind: str = "bpe", special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Learn a byte-level BPE or Unigram; the same documents give the same tokenizer.

    Id 0 is ``<|endoftext|>``, then come the other special tokens; all bytes have an entry, so that every text comes
    back as it was. For BPE they come next, and the rest are merges seen at least twice. Small texts hold fewer entries
    than asked for; the vocabulary is then smaller.

    Args:
        documents: the training documents; read once, not kept.
        vocab_size: entries at most.
        kind: bpe (Radford et al. 2019, section 2.2) or unigram (Kudo 2018, arXiv:1804.10959).
        special_tokens: beside the end of text; no text is encoded to them.

    Raises:
        DataError: ``vocab_size`` is less than the entries that are always there.
    """
    assert kind in ("bpe", "unigram"), kind
    special = list(dict.fromkeys([END_OF_TEXT[0], *special_tokens]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise DataError(
            f"model.vocab_size is {vocab_size}, but a byte-level tokenizer has at least {least} entries "
            f"(the bytes and {', '.join(special)}): set model.vocab_size={least} or more"
        )
    tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": special, "initial_alphabet": alphabet}
    if kind == "bpe":
        trainer: Any = trainers.BpeTrainer(min_frequency=2, show_progress=False, **options)
    else:
        trainer = trainers.UnigramTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator((piece for document in documents for piece in _pieces(document)), trainer=trainer)
    return as_plain_text(tokenizer if kind == "bpe" else _in_order(tokenizer, special=special))


def _in_order(tokenizer: Tokenizer, *, special: Sequence[str]) -> Tokenizer:
    """The same Unigram tokenizer with its entries in an order, and with scores, that training again gives again.

    The library gives characters that its pruning lost, and bytes that no text holds, the smallest score and steps of
    0.0001 above it in the order of a hash table, another one in each run (unigram/trainer.rs, finalize).
    """
    content = json.loads(tokenizer.to_str())
    scores = {text: round(score, 5) for text, score in content["model"]["vocab"] if text not in special}
    lowest = min(scores.values())
    steps = {text: (score - lowest) / 1e-4 for text, score in scores.items() if len(text) == 1}
    shuffled = sorted(text for text, step in steps.items() if step < 257 and abs(step - round(step)) < 0.05)
    scores |= dict(zip(shuffled, sorted(scores[text] for text in shuffled), strict=True))
    entries = [[text, 0.0] for text in special] + sorted(
        ([text, score] for text, score in scores.items()), key=lambda entry: (-entry[1], entry[0])
    )
    content["model"]["vocab"] = entries
    return Tokenizer.from_str(json.dumps(content))


def batch_encoder(tokenizer: Tokenizer) -> BatchEncoder:
    """The tokenizer's own; works on all cores unless the environment says TOKENIZERS_PARALLELISM=false."""

    def encode_batch(texts: list[str]) -> TokenIds:
        ids, lengths = array("I"), []
        # The fast one leaves out the offsets, which nobody reads.
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            own = encoding.ids
            ids.fromlist(own)  # a third of the time that numpy takes for a list of whole numbers
            lengths.append(len(own))
        return TokenIds(np.frombuffer(ids, dtype=np.uint32), np.array(lengths, dtype=np.int64))

    return encode_batch


def encode(encode_batch: BatchEncoder, documents: Iterable[str]) -> TokenIds:
    """Token ids of some documents, in order; what the library holds meanwhile is bounded.

    Special tokens are not added. A document of more than 65,536 characters is encoded in pieces that are cut before a
    space where a word ended; tokenizers that split at spaces, as GPT-2's and its kin do, give the same ids as for the
    whole.
    """
    counts: list[int] = []
    found = [encode_batch(group) for group in _groups(documents, counts)]
    ids = np.concatenate([np.zeros(0, dtype=np.uint32), *(one.ids for one in found)])
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(one.lengths for one in found)])
    if len(lengths) > len(counts):
        lengths = np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))
    return TokenIds(ids, lengths)


def _groups(documents: Iterable[str], counts: list[int]) -> Iterator[list[str]]:
    """Pieces of documents, many at a time; appends to ``counts`` how many there are of each document."""
    group: list[str] = []
    size = 0
    for document in documents:
        pieces = [document] if len(document) <= _PIECE else _pieces(document)
        counts.append(len(pieces))
        for text in pieces:
            group.append(text)
            size += len(text)
            if size >= _GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def _pieces(document: str) -> list[str]:
    pieces: list[str] = []
    start = 0
    while len(document) - start > _PIECE:
        end = document.rfind(" ", start + 1, start + _PIECE)
        while end > start and document[end - 1].isspace():
            end = document.rfind(" ", start + 1, end)
        if end <= start:  # no such place: one token more or less
            end = start + _PIECE
        pieces.append(document[start:end])
        start = end
    return [*pieces, document[start:]]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``; its truncation and padding are switched off, documents are tokenized whole.

    Raises:
        DataError: the file is missing, is not a tokenizer, or has no end-of-text token.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file: a tokenizer is one file, as a rule called tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare Exception
        raise DataError(
            f"{path} is not a tokenizer file ({error}): give a tokenizer.json as the tokenizers library writes it"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if all(tokenizer.token_to_id(name) is None for name in END_OF_TEXT):
        raise DataError(
            f"{path} has no end-of-text token, which must stand between documents: add one of {', '.join(END_OF_TEXT)}"
        )
    return as_plain_text(tokenizer)


def end_of_text(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document."""
    ids = [tokenizer.token_to_id(name) for name in END_OF_TEXT]
    return next(int(id_) for id_ in ids if id_ is not None)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the rows an embedding needs. Ids may have holes, so it is not the entry count."""
    return 1 + max(int(id_) for id_ in tokenizer.get_vocab(with_added_tokens=True).values())


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's JSON with sorted keys and no white space; the same for equal tokenizers."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, in whose eyes a special token spelt in a text is text."""
    # A document that spells "<|endoftext|>" must not end there: special tokens are ours to add, not the text's.
    tokenizer.encode_special_tokens = True
    return tokenizer
