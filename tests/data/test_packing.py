"""Documents in a sequence, told token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetrain.data.loader import Batches, HeldOutBatch, Sequences
from moetrain.data.packing import Packing, document_of, position_of
from moetrain.parallel.topology import Topology
from moetrain.train.setup import held_out_micro_batch, micro_batches


@given(arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.integers(0, 2)))
def test_an_end_of_text_token_begins_a_document(tokens):
    documents, positions = document_of(tokens, end_of_text=0), position_of(tokens, end_of_text=0)
    for row in range(len(tokens)):
        document = position = 0
        for place, token in enumerate(tokens[row]):
            if token == 0:
                document, position = document + 1, 0
            assert (documents[row, place], positions[row, place]) == (document, position)
            position += 1


def test_the_picture_of_the_module():
    tokens = np.array([[3, 4, 0, 5, 6, 7, 0, 8]])
    assert document_of(tokens, end_of_text=0).tolist() == [[0, 0, 1, 1, 1, 1, 2, 2]]
    assert position_of(tokens, end_of_text=0).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]


def test_nothing_is_told_where_nothing_is_asked_for():
    packing = Packing(end_of_text=0)
    assert packing.documents(np.zeros((1, 2), dtype=np.int64)) is None
    assert packing.positions(np.zeros((1, 2), dtype=np.int64)) is None


@pytest.mark.parametrize("is_on", [True, False])
def test_what_documents_see_of_each_other_comes_to_the_model(is_on):
    tokens = np.random.default_rng(0).integers(0, 3, size=100)
    packing = Packing(end_of_text=0, mask_documents=is_on, reset_positions=is_on)
    batches = Batches([Sequences(tokens, sequence_length=12, seed=1)], global_batch=8)
    topology = Topology(world_size=2, rank=1, expert_parallel=1)
    found = micro_batches(batches, 0, packing=packing, topology=topology, micro_batch=2, device=torch.device("cpu"))
    rows = batches.at(0).tokens.reshape(2, 2, 2, 13)[:, 1]
    held_out = HeldOutBatch(tokens=rows[0, :, :-1], targets=rows[0, :, 1:], rows=2)
    found.append(held_out_micro_batch(held_out, packing=packing, device=torch.device("cpu")))
    for batch, wanted in zip(found, [*rows[..., :-1], held_out.tokens], strict=True):
        assert batch.token_BS.tolist() == wanted.tolist()
        if is_on:
            assert batch.document_BS is not None
            assert batch.position_BS is not None
            assert batch.document_BS.tolist() == document_of(wanted, end_of_text=0).tolist()
            assert batch.position_BS.tolist() == position_of(wanted, end_of_text=0).tolist()
        else:
            assert batch.document_BS is batch.position_BS is None
