"""How a byte-level vocabulary spells bytes, and how GPT-2 splits words (Radford et al. 2019, encoder.py)."""

from __future__ import annotations

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _characters() -> list[str]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


CHARACTER_OF = _characters()
"""The character that stands for each byte."""

BYTE_OF = {character: byte for byte, character in enumerate(CHARACTER_OF)}
