"""Text on the terminal as a model writes it, in the colours of its experts where they are asked for."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from rich.console import Console
from rich.text import Text


class Piece(Protocol):
    """``hub.generate.Written``."""

    @property
    def row(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def experts(self) -> tuple[int, ...]: ...


def show(prompts: Sequence[str], pieces: Iterable[Piece], *, num_experts: int | None) -> None:
    """Print each prompt and what follows it. The first text comes as it is written, the others when all are done.

    Args:
        num_experts: colour each piece by the first of its experts, and say in the end what each of them got; None:
            plain text.
    """
    console = Console(highlight=False, soft_wrap=True)
    chosen: Counter[int] = Counter()
    waiting: dict[int, list[Piece]] = {}
    # what a model writes is no markup, and a pipe gets it byte for byte
    print(prompts[0], end="", flush=True)
    for piece in pieces:
        if piece.experts:
            chosen[piece.experts[0]] += 1
        if piece.row == 0:
            _print(console, piece, num_experts=num_experts)
        else:
            waiting.setdefault(piece.row, []).append(piece)
    print()
    for row, prompt in enumerate(prompts[1:], start=1):
        print(f"\n{prompt}", end="", flush=True)
        for piece in waiting.get(row, []):
            _print(console, piece, num_experts=num_experts)
        print()
    if num_experts is not None:
        _legend(console, chosen, num_experts=num_experts)


def _print(console: Console, piece: Piece, *, num_experts: int | None) -> None:
    if num_experts is None or not piece.experts or not console.is_terminal:
        print(piece.text, end="", flush=True)
    else:
        console.print(Text(piece.text, style=_style(piece.experts[0], num_experts=num_experts)), end="")


def _legend(console: Console, chosen: Counter[int], *, num_experts: int) -> None:
    total = max(1, chosen.total())
    line = Text("\nfirst choices:")
    for expert in range(num_experts):
        style = _style(expert, num_experts=num_experts)
        line.append("  ").append(f"{expert}", style=style).append(f" {chosen[expert] / total:.0%}")
    console.print(line)


def _style(expert: int, *, num_experts: int) -> str:
    # neighbours far apart on the wheel: the golden angle
    hue = (expert * 0.618034) % 1 if num_experts > 12 else expert / num_experts
    red, green, blue = (int(255 * part) for part in colorsys.hls_to_rgb(hue, 0.62, 0.75))
    return f"rgb({red},{green},{blue})"
