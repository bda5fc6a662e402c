"""What needs no training: how well two plain models of bytes compress the held-out text.

They give the scale for a model's bits per byte: above the trigram it has learnt little more than which letters follow
each other.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moetrain.data.corpus import Baselines

LIMITS = (16 << 20, 1 << 20)
"""Bytes of the training and of the held-out text that are looked at."""

_PIECE = 1 << 18  # bytes counted at once, so that codes and counts of a large text stay small


def measure(train: bytes, held_out: bytes, *, truncated: bool) -> Baselines:
    """Both.

    Args:
        truncated: whether either is only the beginning of its text.
    """
    return Baselines(
        xz=xz_bits_per_byte(held_out),
        trigram=trigram_bits_per_byte(train, held_out),
        train_bytes=len(train),
        held_out_bytes=len(held_out),
        truncated=truncated,
    )


def xz_bits_per_byte(held_out: bytes) -> float:
    """Size of the text after ``xz -9e``, in bits per byte. It sees the held-out text alone.

    Args:
        held_out: the text, at least one byte.
    """
    assert held_out
    return 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out)


def trigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Cross-entropy of a byte trigram, in bits per byte: counted on ``train``, measured on ``held_out``.

    Args:
        train: the text that is counted; may be empty, which leaves the uniform distribution, 8 bits.
        held_out: the text that is predicted, at least one byte; its first two bytes have shorter contexts.
    """
    assert held_out
    trigram = count_trigrams(train)
    text = np.frombuffer(held_out, dtype=np.uint8)
    first, second = text[:1], text[1:2]
    bits = -np.log2(trigram.unigram[first]).sum() - np.log2(trigram.bigram[first, second]).sum()
    for start in range(2, len(text), _PIECE):
        byte = text[start : start + _PIECE]
        before = text[start - 1 : start - 1 + len(byte)]
        before_that = text[start - 2 : start - 2 + len(byte)]
        bits -= np.log2(trigram.probability(before_that, before, byte)).sum()
    return float(bits) / len(text)


@dataclass(frozen=True)
class Trigram:
    """A byte trigram with interpolated Witten-Bell smoothing.

    With n(h) how often context h was seen, n(h, b) how often byte b followed it, T(h) how many different bytes did,
    and h' the context without its oldest byte::

        p(b | h) = (n(h, b) + T(h) p(b | h')) / (n(h) + T(h)),   p(b | h') where h was never seen

    down to the uniform distribution, 1/256, below the empty context (Witten and Bell 1991, "The zero-frequency
    problem", IEEE Transactions on Information Theory 37(4), method C; the recursion as in Chen and Goodman 1998,
    "An empirical study of smoothing techniques for language modeling", TR-10-98).
    """

    unigram: npt.NDArray[np.float64]  # [256], p(b)
    bigram: npt.NDArray[np.float64]  # [256, 256], p(b | a)
    rank: npt.NDArray[np.int64]  # [256], from a byte to its place among those that were counted, or after the last
    count: npt.NDArray[np.int64]  # [ranks * ranks, ranks], n(ab, c): text has few kinds of bytes, and 256^3 counts
    # would be far more than a processor's cache

    def probability(
        self,
        before_that: npt.NDArray[np.uint8],
        before: npt.NDArray[np.uint8],
        byte: npt.NDArray[np.uint8],
    ) -> npt.NDArray[np.float64]:
        """p(byte | before_that, before), elementwise; the three shapes must broadcast."""
        context = self.rank[before_that] * self.count.shape[1] + self.rank[before]
        times, kinds = self.count.sum(axis=1), (self.count > 0).sum(axis=1)
        shorter = self.bigram[before, byte]
        seen = times[context] + kinds[context]
        mixed = (self.count[context, self.rank[byte]] + kinds[context] * shorter) / np.maximum(seen, 1)
        result: npt.NDArray[np.float64] = np.where(seen > 0, mixed, shorter)
        return result


def count_trigrams(train: bytes) -> Trigram:
    """Count every byte, pair and triple of ``train``."""
    text = np.frombuffer(train, dtype=np.uint8)
    bytes_of_their_own = np.arange(256)
    frequency = _counts(text, order=1, rank=bytes_of_their_own)[0]
    unigram = _witten_bell(frequency[None], np.full(256, 1 / 256))[0]
    bigram = _witten_bell(_counts(text, order=2, rank=bytes_of_their_own), unigram)
    is_counted = frequency > 0
    rank = np.where(is_counted, np.cumsum(is_counted) - 1, is_counted.sum())
    return Trigram(unigram=unigram, bigram=bigram, rank=rank, count=_counts(text, order=3, rank=rank))


def _counts(text: npt.NDArray[np.uint8], *, order: int, rank: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[ranks^(order-1), ranks]: how often each byte followed each context of ``order`` - 1 bytes."""
    ranks = int(rank.max()) + 1
    total = np.zeros(ranks**order, dtype=np.int64)
    for start in range(0, len(text) - order + 1, _PIECE):
        piece = rank[text[start : start + _PIECE + order - 1]]
        code: npt.NDArray[Any] = np.zeros(len(piece) - order + 1, dtype=np.int64)
        for place in range(order):
            code = code * ranks + piece[place : len(piece) - order + 1 + place]
        total += np.bincount(code, minlength=len(total))
    return total.reshape(-1, ranks)


def _witten_bell(count: npt.NDArray[np.int64], shorter: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[contexts, 256]: the recursion for whole tables; ``shorter`` [256] is p(b | h')."""
    times, kinds = count.sum(axis=1, keepdims=True), (count > 0).sum(axis=1, keepdims=True)
    mixed = (count + kinds * shorter) / np.maximum(times + kinds, 1)
    result: npt.NDArray[np.float64] = np.where(times > 0, mixed, shorter)
    return result
