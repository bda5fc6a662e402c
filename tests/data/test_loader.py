"""Batches: each sequence once an epoch, the same on every layout; held-out text: each token once."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.loader import (
    NOT_COUNTED,
    Ahead,
    Batches,
    HeldOutBatch,
    HeldOutText,
    Sequences,
    held_out_batches,
    permute,
)
from moetrain.errors import ConfigError, DataError

# Each token tells its place, so that a batch tells where it was cut.
TOKENS = np.arange(1000, dtype="<u2")


def batches(*, tokens: Any = TOKENS, sequence_length: int = 7, global_batch: int = 8, seed: int = 3) -> Batches:
    return Batches([Sequences(tokens, sequence_length=sequence_length, seed=seed)], global_batch=global_batch)


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 600), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_a_permutation_of_any_size_hits_each_place_once(size, seed, epoch):
    places = permute(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert sorted(places.tolist()) == list(range(size))


@settings(deadline=None, max_examples=50)
@given(size=st.integers(2**20, 2**40), data=st.data())
def test_a_permutation_too_large_for_a_table_stays_inside_and_keeps_places_apart(size, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True)))
    result = permute(places, size=size, seed=1, epoch=0)
    assert 0 <= result.min() <= result.max() < size
    assert len(set(result.tolist())) == len(places)


def test_every_order_of_four_comes_about_equally_often():
    seeds = 2400
    orders = [tuple(permute(np.arange(4), size=4, seed=seed, epoch=0).tolist()) for seed in range(seeds)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    # chi squared with 23 degrees of freedom is beyond 50 less than once in a thousand
    assert ((counts - seeds / 24) ** 2 / (seeds / 24)).sum() < 50


@settings(deadline=None, max_examples=50)
@given(
    num_tokens=st.integers(8, 100),
    sequence_length=st.integers(1, 7),
    global_batch=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_each_sequence_comes_once_an_epoch_and_holds_a_run_of_tokens(num_tokens, sequence_length, global_batch, seed):
    loader = batches(tokens=TOKENS[:num_tokens], sequence_length=sequence_length, global_batch=global_batch, seed=seed)
    n = len(range(0, num_tokens - sequence_length, sequence_length))
    rows = np.concatenate([loader.at(step).tokens for step in range(-(-3 * n // global_batch))])
    assert rows.dtype == np.int64
    expected = {
        tuple(range(start, start + sequence_length + 1))
        for start in range(0, num_tokens - sequence_length, sequence_length)
    }
    for epoch in range(3):
        read = [tuple(row) for row in rows[epoch * n : (epoch + 1) * n].tolist()]
        assert len(read) == len(set(read))
        assert set(read) == expected


def test_epochs_and_seeds_have_orders_of_their_own():
    whole = {"global_batch": 142}
    orders = [batches(seed=seed, **whole).at(epoch).tokens[:, 0].tolist() for seed in (3, 4) for epoch in (0, 1)]
    orders.append(sorted(orders[0]))
    assert all(left != right for i, left in enumerate(orders) for right in orders[:i])


def test_a_batch_depends_on_its_step_alone():
    forward = [batches().at(step).tokens for step in range(20)]
    one = batches()
    for step in (19, 3, 19, 0, 7):
        np.testing.assert_array_equal(one.at(step).tokens, forward[step])


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_every_layout_reads_the_same_batch_in_the_same_order(world_size, accumulation):
    loader = batches(global_batch=16)
    micro_batch = 16 // (world_size * accumulation)
    for step in (0, 5, 8):  # step 8 reaches over the end of the first epoch, 142 sequences
        slices = [
            loader.rank_slice(step, rank=rank, world_size=world_size, micro_batch=micro_batch).tokens
            for rank in range(world_size)
        ]
        assert all(piece.shape == (accumulation, micro_batch, 8) for piece in slices)
        rows = [piece[micro, row] for micro in range(accumulation) for piece in slices for row in range(micro_batch)]
        np.testing.assert_array_equal(np.stack(rows), loader.at(step).tokens)


def test_a_rank_reads_its_own_rows_and_no_others():
    read = []

    class Recorder:
        def __len__(self) -> int:
            return len(TOKENS)

        def __getitem__(self, where: slice) -> Any:
            read.append(where.start)
            return TOKENS[where]

    piece = batches(tokens=Recorder()).rank_slice(2, rank=1, world_size=2, micro_batch=2).tokens
    assert read == piece[:, :, 0].reshape(-1).tolist()
    assert len(read) == 4


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"batch\.global_batch is 8, but must be a multiple of .* 3 x 2 = 6"):
        batches().rank_slice(0, rank=0, world_size=3, micro_batch=2)


def test_a_text_too_short_for_one_sequence_is_refused():
    assert batches(tokens=TOKENS[:8], global_batch=1).at(0).tokens.tolist() == [list(range(8))]
    with pytest.raises(DataError, match="has 7 tokens, but one sequence takes 8"):
        batches(tokens=TOKENS[:7])


def test_the_fingerprint_is_the_sha256_of_the_batch():
    numbers = [number for row in batches().at(4).tokens.tolist() for number in row]
    plain = hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in numbers)).hexdigest()
    assert batches().fingerprint(4) == plain


@given(st.lists(st.integers(0, 20), min_size=1, max_size=20))
def test_to_read_ahead_gives_what_is_asked_for_and_reads_no_further_than_the_run(steps):
    read = []
    ahead = Ahead(lambda step: read.append(step) or step * step, steps=20)
    assert [ahead(step) for step in steps] == [step * step for step in steps]
    assert max(read) <= max(19, *steps)


def test_what_goes_wrong_ahead_is_told_when_it_is_asked_for():
    def fail(step: int) -> int:
        if step == 1:
            raise OSError("the disk is gone")
        return step

    ahead = Ahead(fail, steps=3)
    assert ahead(0) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        ahead(1)


def held_out(num_tokens: int, *, world_size: int, max_sequences: int | None = None, **sizes: int) -> list[list[Any]]:
    text = HeldOutText(TOKENS[:num_tokens] + 1, num_bytes=0)
    return [
        list(
            held_out_batches(
                text,
                rank=rank,
                world_size=world_size,
                max_sequences=max_sequences,
                **sizes,
            )
        )
        for rank in range(world_size)
    ]


def targets_of(batch: HeldOutBatch) -> list[int]:
    counted = batch.targets != NOT_COUNTED
    # tokens count up, so a target is one more than what goes in
    np.testing.assert_array_equal(batch.tokens[counted] + 1, batch.targets[counted])
    assert not batch.tokens[~counted].any()
    return batch.targets[counted].tolist()


@settings(deadline=None, max_examples=50)
@given(
    num_tokens=st.integers(2, 200),
    sequence_length=st.integers(1, 9),
    world_size=st.integers(1, 5),
    micro_batch=st.integers(1, 4),
)
def test_every_held_out_token_but_the_first_is_a_target_once(num_tokens, sequence_length, world_size, micro_batch):
    ranks = held_out(num_tokens, sequence_length=sequence_length, world_size=world_size, micro_batch=micro_batch)
    assert len({len(rank) for rank in ranks}) == 1
    shapes = {part.shape for rank in ranks for batch in rank for part in (batch.tokens, batch.targets)}
    assert shapes == {(micro_batch, sequence_length)}
    assert sorted(target for rank in ranks for batch in rank for target in targets_of(batch)) == list(
        range(2, num_tokens + 1)
    )


def test_held_out_batches_are_no_more_than_needed():
    # 99 targets in 10 sequences, 4 of them at a time over all ranks
    assert [len(rank) for rank in held_out(100, sequence_length=10, world_size=2, micro_batch=2)] == [3, 3]


def test_a_limited_evaluation_reads_so_many_sequences_spread_over_the_text():
    ranks = held_out(101, sequence_length=10, world_size=2, micro_batch=1, max_sequences=4)
    assert [targets_of(batch)[0] for rank in ranks for batch in rank] == [2, 52, 22, 72]
    whole = held_out(101, sequence_length=10, world_size=2, micro_batch=1)
    beyond = held_out(101, sequence_length=10, world_size=2, micro_batch=1, max_sequences=99)
    assert [len(rank) for rank in beyond] == [len(rank) for rank in whole] == [5, 5]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_held_out_text_without_anything_to_predict_is_refused(num_tokens):
    with pytest.raises(DataError, match=f"has {num_tokens} tokens, too few to predict one"):
        held_out(num_tokens, sequence_length=4, world_size=1, micro_batch=1)
