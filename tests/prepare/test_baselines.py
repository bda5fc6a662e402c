"""xz and the byte trigram, against plainer computations."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from moetrain.prepare import baselines
from moetrain.prepare.baselines import count_trigrams, trigram_bits_per_byte, xz_bits_per_byte

TRAIN = b"the cat sat on the mat, and the dog sat on the log. " * 3
HELD_OUT = b"the cat and the dog sat on the zebra"  # bytes, pairs and triples that were never seen, too


def plain_probability(train: bytes, context: bytes, byte: int) -> float:
    """The recursion of Witten and Bell, written down as in the paper, for contexts of any length."""
    shorter = plain_probability(train, context[1:], byte) if context else 1 / 256
    length = len(context)
    followers = Counter(train[i + length] for i in range(len(train) - length) if train[i : i + length] == context)
    if not followers:
        return shorter
    kinds = len(followers)
    return (followers[byte] + kinds * shorter) / (followers.total() + kinds)


def plain_bits_per_byte(train: bytes, held_out: bytes) -> float:
    bits = 0.0
    for i, byte in enumerate(held_out):
        bits -= math.log2(plain_probability(train, held_out[max(0, i - 2) : i], byte))
    return bits / len(held_out)


@pytest.mark.parametrize("train", [TRAIN, b"ab", b"a", b""])
@pytest.mark.parametrize("held_out", [HELD_OUT, b"abc", b"ab", b"a"])
def test_the_trigram_equals_a_plain_loop(train, held_out):
    assert trigram_bits_per_byte(train, held_out) == pytest.approx(plain_bits_per_byte(train, held_out), rel=1e-12)


def test_counting_in_pieces_changes_nothing(monkeypatch):
    monkeypatch.setattr(baselines, "_PIECE", 7)
    assert trigram_bits_per_byte(TRAIN, HELD_OUT) == pytest.approx(plain_bits_per_byte(TRAIN, HELD_OUT), rel=1e-12)


@pytest.mark.parametrize("context", [b"th", b"e ", b"tz", b"zz", b"\0\xff"])
def test_the_probabilities_of_the_next_byte_sum_to_one(context):
    before_that, before = (np.full(256, byte, dtype=np.uint8) for byte in context)
    probability = count_trigrams(TRAIN).probability(before_that, before, np.arange(256, dtype=np.uint8))
    assert probability.min() > 0
    assert probability.sum() == pytest.approx(1, rel=1e-12)


def test_without_any_text_to_count_every_byte_costs_8_bits():
    assert trigram_bits_per_byte(b"", HELD_OUT) == 8


def test_xz_takes_noise_as_it_is_and_finds_a_repeat_far_away():
    noise = random.Random(0).randbytes(400_000)
    assert 8 < xz_bits_per_byte(noise) < 8.01
    assert 4 < xz_bits_per_byte(noise * 2) < 4.01
    assert xz_bits_per_byte(bytes(400_000)) < 0.01
