"""What a person sees while a model trains: a dashboard on a terminal, elsewhere the lines of ``WorkBar``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from moetrain.metrics.console import WorkBar

_BARS = "▁▂▃▄▅▆▇█"
_MOST_LAYERS = 8
_MOST_EXPERTS = 64
_WIDTH = 60
_FAIR, _FULL = 1.25, 1.75
"""Load over the mean from which a bar is yellow, and red."""


class LiveView:
    """Progress, the loss so far, the load of every expert and what its imbalance costs.

    Args:
        total: steps of the run.
        done: those behind it, of a run that is resumed.
        shown: False draws nothing: every rank but the first.
        expert_parallel: ranks that share the experts of a layer.
        expert_share: share of a step's FLOPs that the routed experts do.
        tokens_per_step: over all ranks.
        console: where to draw; None: stdout.
    """

    def __init__(
        self,
        *,
        total: int,
        done: int = 0,
        shown: bool = True,
        expert_parallel: int = 1,
        expert_share: float = 0.0,
        tokens_per_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console()
        self._bar = WorkBar("train", total=total, unit="steps", done=done, shown=shown, console=self._console)
        self._expert_parallel, self._expert_share = expert_parallel, expert_share
        self._tokens_per_step = tokens_per_step
        self._losses: list[tuple[int, float]] = []  # of each step that has one
        self._lines: list[Text] = []
        self._live: Live | None = None
        if shown and self._console.is_terminal:
            # rank 0's stderr is a log, as for the bar
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._render,
                              redirect_stderr=False)  # fmt: skip

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance_to(self, done: int, *, note: str | None = None) -> None:
        """Say how much is done now, and what to show beside the bar."""
        self._bar.advance_to(done, note=note)

    def say(self, line: str) -> None:
        """A line above the view."""
        self._bar.say(line)

    def show(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics, as it is written to metrics.jsonl."""
        if self._live is None:
            return
        losses = line.get("step_losses", [])
        steps = range(line["step"] - len(losses) + 1, line["step"] + 1)
        self._losses += [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
        drawn = sparkline([loss for _, loss in self._losses], width=_WIDTH)
        self._lines = [Text.assemble(("loss  ", "dim"), drawn, f"  {line['loss']:.3f}")]
        loads = line.get("load") or []
        for layer, share_E in enumerate(loads[:_MOST_LAYERS]):
            self._lines.append(Text.assemble((f"layer {layer:<3}", "dim"), load_bars(share_E)))
        if len(loads) > _MOST_LAYERS:
            self._lines.append(Text(f"… and {len(loads) - _MOST_LAYERS} more layers", "dim"))
        if loads and self._expert_parallel > 1 and line.get("tokens_per_second"):
            seconds = self._tokens_per_step / line["tokens_per_second"]
            tax = imbalance_tax(loads, seconds=seconds, expert_parallel=self._expert_parallel, share=self._expert_share)
            told = f"{1000 * tax:.1f} ms of {1000 * seconds:.0f} ms a step: waiting for the fullest rank, by FLOPs"
            self._lines.append(Text.assemble(("tax   ", "dim"), told))

    def go_back(self, step: int) -> None:
        """The run has gone back: what came after a step is no more."""
        self._losses = [(each, loss) for each, loss in self._losses if each <= step]

    def _render(self) -> Group:
        return Group(self._bar.renderable, *self._lines)


def sparkline(values: Sequence[float], *, width: int) -> str:
    """Values as a row of at most ``width`` bars, each the mean of its stretch."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / (high - low) * (len(_BARS) - 1)) if high > low else 0] for mean in means)


def load_bars(share_E: Sequence[float]) -> Text:
    """A bar for each expert, full at twice the fair share; yellow and red where one has too much, · where none."""
    text, experts = Text(), len(share_E)
    for share in share_E[:_MOST_EXPERTS]:
        times = share * experts if math.isfinite(share) else 0.0
        bar = "·" if times == 0 else _BARS[min(len(_BARS) - 1, int(times / 2 * len(_BARS)))]
        text.append(bar, "red" if times > _FULL else "yellow" if times > _FAIR else "green")
    if experts > _MOST_EXPERTS:
        text.append(f" … of {experts}", "dim")
    return text


def imbalance_tax(load_LE: Sequence[Sequence[float]], *, seconds: float, expert_parallel: int, share: float) -> float:
    """Seconds of a step that all ranks wait for the fullest one, by its FLOPs.

    A step that took T with a share s of FLOPs in the experts, and the fullest rank i times the mean, would have taken
    T / (1 + s (i - 1)) with an even load.

    Args:
        load_LE: share of each expert, for each layer; neighbouring experts lie on one rank.
        seconds: of the step.
        expert_parallel: ranks that share the experts.
        share: of the step's FLOPs that the routed experts do.
    """
    extra = 0.0
    for share_E in load_LE:
        each = len(share_E) // expert_parallel
        fullest = max(sum(share_E[rank * each : (rank + 1) * each]) for rank in range(expert_parallel))
        extra += (fullest * expert_parallel - 1) / len(load_LE)
    extra = max(0.0, extra) if math.isfinite(extra) else 0.0
    return seconds * (1 - 1 / (1 + share * extra))
