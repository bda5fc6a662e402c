"""What is done after a step."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint.saver import Saver
from moetrain.checkpoint.store import Manifest, Retention
from moetrain.errors import CheckpointError
from moetrain.metrics.live import LiveView
from moetrain.metrics.load import LoadMeter
from moetrain.metrics.speed import Speed
from moetrain.model.objective import Losses
from moetrain.moe.layer import Load
from moetrain.plan.published import PLAN_FILE, Expectation
from moetrain.train.hooks.log import Clock, LogHook
from moetrain.train.hooks.plan import PlanCheck
from moetrain.train.hooks.save import SaveHook
from moetrain.train.loop import StepResult, TrainState
from moetrain.watch.guard import LEFT_OUT
from moetrain.watch.progress import Progress


def made() -> StepResult:
    """A step on four tokens, all of which chose the first of two experts."""
    nothing = torch.zeros(())
    load = Load(count_E=torch.tensor([4, 0]), dropped=torch.tensor(0), entropy=nothing, balance=nothing, z=nothing,
                chosen_E=torch.tensor([4, 0]))  # fmt: skip
    return StepResult([Losses(nothing, torch.tensor(2.0), [load])], 4, grad_norm=1.0, lr=0.1)


def left_out() -> StepResult:
    return StepResult([], 0, grad_norm=math.nan, lr=0.1, skipped=LEFT_OUT)


def log_rank(rank: int) -> list[Any]:
    lines: list[dict[str, Any]] = []
    assert dist.group.WORLD is not None
    hook = LogHook(
        every_steps=4, steps=100, speed=Speed(1.0, peak_flops=None, world_size=1), peak_memory=lambda: None,
        device=torch.device("cpu"), meter=LoadMeter(1, 2, "cpu", dead_after=3), group=dist.group.WORLD,
        record=lines.append, bar=LiveView(total=100, shown=False), clock=Clock(Progress()),
    )  # fmt: skip
    state = TrainState()

    def do(*results: StepResult) -> None:
        for result in results:
            state.step += 1
            hook.after_step(state, result)

    do(made(), left_out(), left_out(), left_out(), made(), left_out(), left_out(), left_out())
    do(made(), made())
    state.step = 8
    hook.go_back(state)  # the last two steps are no more
    do(left_out(), left_out(), left_out(), left_out(), left_out(), left_out(), left_out(), made())
    return [line["dead_experts"] for line in lines]


def test_a_step_that_was_left_out_makes_no_expert_dead(ranks):
    # after 1, 2, 2 and 3 steps in which tokens chose experts
    assert ranks(1, log_rank)[0] == [[[]], [[]], [[]], [[1]]]


def test_the_plan_is_held_against_steps_that_were_made(tmp_path):
    said: list[str] = []
    expected = Expectation(cluster=None, device="cpu", memory_bytes=1e9, step_seconds=None)
    check = PlanCheck(expected, run_dir=tmp_path, step_tokens=100, say=said.append)
    for pace in (5.0, 0.0, 0.0, 50.0, 0.0, 50.0):
        check.take({"step_losses": [2.0 if pace else math.nan], "tokens_per_second": pace, "peak_memory_gb": 2.0})
    assert said[0].startswith("step   measured 2 s;"), "100 tokens at 50 a second"
    assert json.loads((tmp_path / PLAN_FILE).read_text())["measured_step_seconds"] == 2.0


def timed_rank(rank: int, root: str) -> tuple[list[int], int, float]:
    """Steps that were saved, how often the ranks asked each other whether it is time, and the seconds of it all."""
    asked, broadcast, group = 0, dist.broadcast, dist.group.WORLD
    assert group is not None

    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal asked
        asked += 1
        return broadcast(*args, **settings)

    hook = SaveHook(
        every_steps=None, every_minutes=0.4 / 60, steps=10_000, flush=lambda state: saved.append(state.step),
        saver=Saver(Path(root), group=group, retention=Retention(keep=1), asynchronous=False),
        fragments=list, go_on=False, warn=print, control=group, clock=Clock(Progress()),
        manifest=lambda state: Manifest(step=state.step, tokens=0, seed=0, world_size=2, expert_parallel=1, run={},
                                        data={}, files=[]),
    )  # fmt: skip
    saved: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast", counted)
        begun = time.monotonic()
        for step in range(1001, 1201):  # of a run that was resumed
            # the second rank waits for the first; steps become slower
            time.sleep(0 if rank else 0.002 if step < 1050 else 0.008)
            dist.barrier(group)
            hook.after_step(TrainState(step=step), left_out())
    return saved, asked, time.monotonic() - begun


def test_ranks_save_by_time_together_and_do_not_ask_after_every_step(ranks, tmp_path):
    (saved, asked, seconds), (*other, _) = ranks(2, timed_rank, str(tmp_path / "checkpoints"))
    assert [saved, asked] == other
    assert seconds / 0.4 / 2 - 1 <= len(saved) <= seconds / 0.4
    # half of what is left of at most 200 steps, and of that again: 8 times, and some for steps that became slower
    assert asked <= 12 * (len(saved) + 1)


def save_rank(rank: int, root: str) -> list[Any]:
    answers: list[Any] = []
    assert dist.group.WORLD is not None
    for go_on in (False, True):
        said: list[str] = []
        hook = SaveHook(
            every_steps=None, every_minutes=None, steps=9, flush=lambda state: None,
            saver=Saver(Path(root), group=dist.group.WORLD, retention=Retention(keep=1), asynchronous=True),
            fragments=list, go_on=go_on, warn=said.append, control=dist.group.WORLD, clock=Clock(Progress()),
            manifest=lambda state: Manifest(step=state.step, tokens=0, seed=0, world_size=1, expert_parallel=1, run={},
                                            data={}, files=[]),
        )  # fmt: skip
        hook.save(TrainState(step=3))
        try:
            hook.wait()
            answers.append(said)
        except CheckpointError as error:
            answers.append(str(error))
    return answers


def test_a_save_that_failed_is_told_before_a_run_goes_back(ranks, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the place of the directory")
    ended, warned = ranks(1, save_rank, str(tmp_path / "checkpoints"))[0]
    assert "checkpoints" in ended
    assert len(warned) == 1
    assert warned[0].startswith("warning: step 3 is not saved; training goes on")
