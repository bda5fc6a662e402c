"""Documents that lie one after another in a sequence: where each begins, and what may be seen of it.

    tokens      a3 a4 E  b0 b1 b2 E  c0          E the end-of-text token: as a target it ends a document,
    documents   0  0  1  1  1  1  2  2           as an input it begins the next one, which is what a new text starts
    positions   0  1  0  1  2  3  0  1           from when the model writes

So every target counts, and each is predicted from its own document alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What documents in one sequence see of each other.

    Attributes:
        end_of_text: id of the token between documents.
        mask_documents: attention stays within a document.
        reset_positions: positions count from the start of each document.
    """

    end_of_text: int
    mask_documents: bool = False
    reset_positions: bool = False

    def documents(self, tokens: Ints) -> Ints | None:
        """[..., S]: which document of its sequence each input token is of; None where documents see each other."""
        return document_of(tokens, end_of_text=self.end_of_text) if self.mask_documents else None

    def positions(self, tokens: Ints) -> Ints | None:
        """[..., S]: the position of each input token in its document; None: they count from the sequence's start."""
        return position_of(tokens, end_of_text=self.end_of_text) if self.reset_positions else None


def document_of(tokens: Ints, *, end_of_text: int) -> Ints:
    """Which document of its sequence, from 0, each of [..., S] input tokens is of."""
    found: Ints = np.cumsum(tokens == end_of_text, axis=-1, dtype=np.int64)
    return found


def position_of(tokens: Ints, *, end_of_text: int) -> Ints:
    """How many tokens of its document come before each of [..., S] input tokens, in its sequence."""
    place = np.broadcast_to(np.arange(tokens.shape[-1]), tokens.shape)
    found: Ints = place - np.maximum.accumulate(np.where(tokens == end_of_text, place, 0), axis=-1)
    return found
