"""How far the plan was off."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.plan.published import PLAN_FILE, Expectation


class PlanCheck:
    """Says once, after the first steps, how far the plan was off in time and memory; it is kept in RUN_DIR/plan.json.

    Args:
        expected: what the plan says.
        run_dir: directory of the run.
        step_tokens: of one optimizer step, over all ranks.
        say: shows a line to the user.
    """

    LINES = 3
    """The first line of metrics holds the start, which is slower."""

    def __init__(self, expected: Expectation, *, run_dir: Path, step_tokens: int, say: Callable[[str], None]) -> None:
        self._expected, self._path, self._say = expected, run_dir / PLAN_FILE, say
        self._step_tokens = step_tokens
        self._lines: list[dict[str, Any]] = []

    def take(self, line: dict[str, Any]) -> None:
        """Look at a line of metrics of training steps."""
        # one with a step that was left out tells no pace; one of such steps alone has a pace of 0
        if len(self._lines) == self.LINES or not all(map(math.isfinite, line["step_losses"])):
            return
        self._lines.append(line)
        if len(self._lines) < self.LINES:
            return
        pace = statistics.median(each["tokens_per_second"] for each in self._lines[1:])
        seconds, memory = self._step_tokens / pace, line["peak_memory_gb"]
        for text in plan_text(self._expected, step_seconds=seconds, memory_gb=memory).splitlines():
            self._say(text)
        told = asdict(self._expected) | {"measured_step_seconds": seconds,
                                         "measured_memory_bytes": None if memory is None else memory * 1e9}  # fmt: skip
        beside = self._path.with_suffix(".json.tmp")
        beside.write_text(json.dumps(told, indent=1), encoding="ascii")
        beside.replace(self._path)


def plan_text(expected: Expectation, *, step_seconds: float, memory_gb: float | None) -> str:
    """Planned and measured in two lines.

    On a CPU the memory is not comparable: resident are libraries, too, and what the C library keeps for later.
    """
    planned = expected.step_seconds
    time = f"measured {step_seconds:,.3g} s; not planned: no file of configs/cluster has this device"
    if planned is not None:
        off = f"{planned / step_seconds - 1:+.0%}"
        time = f"planned for {expected.cluster} {planned:,.3g} s, measured {step_seconds:,.3g} s: the plan is {off}"
    planned_gb = expected.memory_bytes / 1e9
    memory = f"planned {planned_gb:,.2f} GB of tensors, "
    if memory_gb is None:
        memory += "not measured"
    elif expected.device == "cpu":
        memory += f"resident at most {memory_gb:,.2f} GB with libraries and memory kept for later"
    else:
        memory += f"measured {memory_gb:,.2f} GB: the plan is {planned_gb / memory_gb - 1:+.0%}"
    return f"step   {time}\nmemory {memory}"
