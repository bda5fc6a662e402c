"""Fill in the middle: documents rearranged so that a model learns to write what stands between two texts.

    document   p p p m m s s E
    PSM        <prefix> p p p <suffix> s s <middle> m m E
    SPM        <prefix> <suffix> s s <middle> p p p m m E

Bavarian et al. 2022, arXiv:2207.14255, section 3; at the level of the context (ibid., section 4.4): each piece of a
document that lies in a sequence is a document of its own, and what the marks push out at the end is left away. Cuts lie
between tokens, not inside them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

MARKS = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
)
"""Names of the tokens that mark the parts; the first three present count: GPT-4 and Qwen, StarCoder, SantaCoder, Code
Llama."""


@dataclass(frozen=True, kw_only=True)
class FillInMiddle:
    """Rearranges some of the documents of a sequence: a function of the seed and the sample's number alone.

    Attributes:
        rate: share of the documents.
        spm: share of those with the suffix first.
        prefix, middle, suffix: ids of the marks.
        end_of_text: id of the token that ends a document; it stays where it is.
    """

    rate: float
    spm: float
    prefix: int
    middle: int
    suffix: int
    end_of_text: int
    seed: int

    def __call__(self, tokens: Ints, samples: Ints) -> Ints:
        """[N, S+1] tokens of samples [N], rearranged."""
        return np.stack([self._row(row, sample=int(sample)) for row, sample in zip(tokens, samples, strict=True)])

    def _row(self, row: Ints, *, sample: int) -> Ints:
        digest = hashlib.blake2b(f"{self.seed} {sample}".encode(), digest_size=16, person=b"moetrain middle").digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        parts: list[npt.ArrayLike] = []
        for piece in np.split(row, np.flatnonzero(row == self.end_of_text) + 1):
            ends = len(piece) > 0 and piece[-1] == self.end_of_text
            text = piece[:-1] if ends else piece
            # the same numbers are drawn for every document, so that one does not depend on those before it
            is_chosen, is_spm, cuts = random.random() < self.rate, random.random() < self.spm, random.random(2)
            if not is_chosen or len(text) == 0:
                parts.append(piece)
                continue
            first, second = np.sort((cuts * (len(text) + 1)).astype(np.int64))
            before, between, after = text[:first], text[first:second], text[second:]
            if is_spm:
                parts += [[self.prefix, self.suffix], after, [self.middle], before, between]
            else:
                parts += [[self.prefix], before, [self.suffix], after, [self.middle], between]
            parts.append(piece[len(text) :])
        rearranged: Ints = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        return rearranged[: len(row)]
