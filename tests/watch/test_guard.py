"""What becomes of a step: every rank must come to the same answer, and after a resume to the same one again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.checkpoint.store import Manifest
from moetrain.config.schema import WatchConfig
from moetrain.errors import CheckpointError, TrainingError
from moetrain.watch.guard import NOT_FINITE, SPIKE, Guard
from moetrain.watch.progress import Progress
from moetrain.watch.rollback import GoBack, LeftOut, RollBack

USUAL = [4.0, 4.1, 3.9, 4.05, 3.95, 4.02, 3.98, 4.01]
"""Median 4.005; absolute deviations 0.005 0.005 0.015 0.025 0.045 0.055 0.095 0.105, their median 0.035: one standard
deviation is 1.4826 x 0.035 = 0.0519."""
SETTINGS = WatchConfig(spike_window=8, spike_deviations=10, max_skips=3)


class Run:
    """A guard, and what it told and answered."""

    def __init__(self, settings: WatchConfig, *, left_out: LeftOut | None = None, asked: bool = False) -> None:
        self.left_out, self.told, self.step = left_out or LeftOut(), [], 0
        self.guard = Guard(settings, group=dist.group.WORLD, asked=lambda: asked, left_out=self.left_out,
                           progress=Progress(), tell=self.tell, device=torch.device("cpu"))  # fmt: skip

    def tell(self, kind: str, *, step: int, rank: int | None, what: str, done: str) -> None:
        self.told.append(f"{kind} {step}: {what}; {done}")

    def do(self, loss: float, *, grad_norm: float = 1.0, skipped: str = "") -> list[Any]:
        """A step; its verdict as plain data."""
        self.guard.note([torch.tensor(loss)])
        self.step += 1
        verdict = self.guard.after_step(self.step, grad_norm=grad_norm, skipped=skipped)
        back = verdict.roll_back
        return [verdict.stop, [back.first, back.last] if back else []]


def judge_rank(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for policy in ("off", "warn", "rollback"):
        run = Run(replace(SETTINGS, spike=policy))
        # the ranks' losses differ; their mean is the usual one
        verdicts = [run.do(loss + 0.5 - rank) for loss in USUAL]
        verdicts += [run.do(loss) for loss in (4.51, 4.54, 4.6, 4.0)]
        answers[policy] = {"verdicts": verdicts, "told": run.told}
    run = Run(SETTINGS)
    bad = {"grad_norm": math.inf, "skipped": NOT_FINITE}
    verdicts = [run.do(4.0), run.do(math.nan, **bad), run.do(4.0)]
    # not finite on one rank is not finite on all: the engine's norm is the same everywhere, and so is the mean
    verdicts += [run.do(math.nan if rank else 4.0, **bad) for _ in range(3)]
    answers["not finite"] = {"verdicts": verdicts, "told": run.told}
    answers["asked"] = [Run(SETTINGS, asked=rank == 1).do(4.0), Run(SETTINGS).do(4.0)]

    run = Run(replace(SETTINGS, spike="skip"))
    kept = [run.guard.keeps(step, [torch.tensor(9.0), torch.tensor(loss)]) for step, loss in enumerate(USUAL)]
    for loss in USUAL:
        run.do(loss)
    kept += [run.guard.keeps(8, [torch.tensor(3.0), torch.tensor(6.0)])]
    run.do(4.5, skipped=SPIKE)
    kept += [run.guard.keeps(9, [torch.tensor(4.6 + 0.1 * rank)])]
    answers["skip"] = {"kept": kept, "told": run.told, "asks": run.guard.asks_before_backward}
    return answers


@pytest.fixture
def answers(ranks):
    both = ranks(2, judge_rank)
    assert both[0] == both[1], "all ranks agree"
    return both[0]


def test_every_rank_judges_a_step_alike(answers):
    go_on = [False, []]
    assert answers["off"] == {"verdicts": [go_on] * 12, "told": []}
    # 10 deviations are 0.519 above 4.005: 4.51 is none yet. It is usual from then on: median 4.015, absolute deviations
    # 0.005 0.005 0.035 0.035 0.065 0.085 0.115 0.495, median 0.05, and so a spike begins at 4.015 + 0.741
    assert answers["warn"]["verdicts"] == [go_on] * 12
    assert answers["warn"]["told"] == []


def spike_rank(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for policy in ("warn", "rollback"):
        run = Run(replace(SETTINGS, spike=policy))
        early = [run.do(9.0), *(run.do(loss) for loss in USUAL)]  # at the beginning nothing is usual yet
        spike = [run.do(4.6), run.do(4.7), run.do(4.0), run.do(4.6)]
        answers[policy] = {"early": early, "spike": spike, "told": run.told}
    # resumed from what a checkpoint keeps, by way of its JSON
    one, two = Run(SETTINGS), Run(SETTINGS)
    for loss in USUAL:
        one.do(loss)
    one.do(math.nan, grad_norm=math.nan, skipped=NOT_FINITE)
    two.guard.restore(json.loads(json.dumps(one.guard.state())))
    two.step = one.step
    for run in (one, two):
        run.told.clear()
    rest = [[run.do(math.nan, grad_norm=math.nan, skipped=NOT_FINITE) for _ in range(2)] for run in (one, two)]
    rest += [[run.do(4.6)] for run in (one, two)]
    answers["resumed"] = {"rest": rest, "told": [one.told, two.told]}
    level = Run(replace(SETTINGS, spike="warn"))
    for loss in USUAL + [6.0] * 12:
        level.do(loss)
    answers["level"] = level.told
    level = Run(replace(SETTINGS, spike="skip"))
    for loss in USUAL:
        level.do(loss)
    answers["skipped"] = []
    for step in range(20):
        is_kept = level.guard.keeps(step, [torch.tensor(6.0)])
        answers["skipped"].append(not is_kept)
        level.do(6.0, skipped="" if is_kept else SPIKE)
    return answers


def test_spikes_and_what_a_checkpoint_keeps_of_the_guard(ranks):
    answers = ranks(2, spike_rank)[0]
    go_on = [False, []]
    assert answers["warn"]["early"] == answers["rollback"]["early"] == [go_on] * 9
    assert answers["warn"]["spike"] == [go_on] * 4
    assert [line.split(";")[0] for line in answers["warn"]["told"]] == [
        "spike 9: the loss is 4.6, 11.5 deviations above 4.005, the median of 8 steps",
        "spike_over 11: the loss is 4 again",
        "spike 12: the loss is 4.6, 11.5 deviations above 4.005, the median of 8 steps",
    ]
    # batch 9 and the one before it; while it is not gone back, the same spike is not told again
    assert answers["rollback"]["spike"] == [[False, [8, 9]], go_on, go_on, [False, [11, 12]]]
    one, two, spike_one, spike_two = answers["resumed"]["rest"]
    assert one == two == [go_on, [False, [7, 10]]], "three in a row, the first of them before the save"
    assert spike_one == spike_two
    assert answers["resumed"]["told"][0] == answers["resumed"]["told"][1]
    assert len(answers["level"]) == 1, "after a window of steps the new level is what is usual"
    assert answers["skipped"] == [True] * 8 + [False] * 12, "also where the steps are skipped: no run skips for ever"


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many(answers):
    go_on = [False, []]
    found = answers["not finite"]
    assert found["verdicts"] == [go_on] * 5 + [[False, [2, 5]]], "batches 3 to 5, and the one before"
    assert [line.partition(";")[2] for line in found["told"]] == [
        f" the step is skipped ({number} of 3 in a row)" for number in (1, 1, 2, 3)
    ]


def test_a_rank_that_is_asked_to_stop_stops_all(answers):
    assert answers["asked"] == [[True, []], [False, []]]


def test_a_spike_may_be_known_before_its_gradient_is(answers):
    found = answers["skip"]
    assert found["asks"]
    assert found["kept"] == [True] * 8 + [True, False], "(3 + 6) / 2 is 9.5 deviations above; 4.65 is 12.4"
    assert len(found["told"]) == 1
    assert "the step is skipped" in found["told"][0]


def manifest(step: int, **given: Any) -> Manifest:
    return Manifest(step=step, tokens=10 * step, seed=0, world_size=1, expert_parallel=1, run={}, data={}, files=[],
                    **given)  # fmt: skip


class Checkpoints:
    """Checkpoints of some steps, as a run would find them."""

    def __init__(self, run_dir: Path, *manifests: Manifest) -> None:
        self.root, self.manifests, self.loaded = run_dir / "checkpoints", manifests, []
        for each in manifests:
            (self.root / f"step_{each.step:08d}").mkdir(parents=True)

    def find(self, accept: Any) -> Any:
        fitting = [each for each in self.manifests if accept(each)]
        return (self.root / f"step_{fitting[-1].step:08d}", fitting[-1]) if fitting else None

    def go_back(self, left_out: LeftOut, told: list[str]) -> GoBack:
        return GoBack(
            self.root.parent, progress=Progress(), is_first=True, left_out=left_out, settle=lambda: None,
            find=self.find, load=lambda directory, found: self.loaded.append(found.step), forget=lambda state: None,
            remote=None, tell=lambda kind, **line: told.append(f"{kind}: {line['done']}"),
        )  # fmt: skip

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


class State:
    step, tokens, updates = 57, 570, 55


def test_going_back_takes_the_newest_checkpoint_before_and_removes_the_later_ones(tmp_path):
    there = Checkpoints(tmp_path, manifest(30), manifest(40, updates=38), manifest(50))
    left_out, told, state = LeftOut(), [], State()
    assert there.go_back(left_out, told)(state, RollBack(47, 52, "a spike", must=False))
    assert there.loaded == [40]
    assert (state.step, state.tokens, state.updates) == (40, 400, 38)
    assert there.names() == ["step_00000030", "step_00000040"]
    assert told == ["roll_back: back to the checkpoint of step 40; the batches of steps 47 to 52 are left out"]
    read = LeftOut.read(tmp_path)
    assert [step for step in range(100) if step in read] == list(range(47, 53))
    assert read.content() == {"batches": [[47, 52]], "rolled_back_at": [57]}


def test_without_a_checkpoint_before_a_spike_is_lived_with_and_anything_else_ends_the_run(tmp_path):
    there = Checkpoints(tmp_path, manifest(50))
    left_out, told = LeftOut(), []
    assert not there.go_back(left_out, told)(State(), RollBack(47, 52, "a spike", must=False))
    with pytest.raises(TrainingError, match="no checkpoint of step 47 or before"):
        there.go_back(left_out, told)(State(), RollBack(47, 52, "no numbers", must=True))
    assert there.names() == ["step_00000050"]
    assert 47 not in left_out
    assert not (tmp_path / "left_out.json").exists()


def test_a_checkpoint_that_was_trained_on_what_is_left_out_is_not_of_the_run():
    left_out = LeftOut({"batches": [[47, 52]], "rolled_back_at": [57]})
    assert left_out.allows(manifest(47)), "its batches are those before 47"
    assert not left_out.allows(manifest(48))
    assert not left_out.allows(manifest(60, watch={"left_out": {"batches": [[47, 50]]}}))
    assert left_out.allows(manifest(60, watch={"left_out": left_out.content()}))


def test_a_run_that_goes_back_again_and_again_stops():
    left_out = LeftOut()
    for at in (100, 500, 900):
        left_out.hold(at=at, most=3, what="a spike")
        left_out.add(at - 1, at, at=at)
    with pytest.raises(TrainingError, match="gone back to a checkpoint 3 times in the last 1,000 steps"):
        left_out.hold(at=950, most=3, what="a spike")
    left_out.hold(at=1200, most=3, what="a spike")


def test_what_is_left_out_is_joined_with_what_a_checkpoint_says_and_read_again(tmp_path):
    left_out = LeftOut({"batches": [[5, 6]], "rolled_back_at": [9]})
    left_out.join({"batches": [[7, 9], [20, 20]], "rolled_back_at": [9, 30]})
    left_out.write(tmp_path)
    assert LeftOut.read(tmp_path).content() == {"batches": [[5, 9], [20, 20]], "rolled_back_at": [9, 30]}
    (tmp_path / "left_out.json").write_text("[1")
    with pytest.raises(CheckpointError, match="is no list of left-out batches"):
        LeftOut.read(tmp_path)
