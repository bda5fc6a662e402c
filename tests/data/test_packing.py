"""Documents in a sequence, told token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetrain.data.packing import Packing, document_of, position_of


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
