"""Layouts by name, such as ``ranks4_ep2_zero1_acc2``, and which of them to try. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moetrain.config.checks import CHOICES
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

ZERO_STAGES = tuple(int(str(stage)) for stage in CHOICES["parallel.zero_stage"])
EXPERT_PARALLEL = RANKS = (1, 2, 4)
"""Sizes tried when nobody names any."""
MOST_RANKS, MOST_ACCUMULATION = 8, 8
_NAME = re.compile(r"(?:ranks(\d+)_)?ep(\d+)_zero(\d+)(?:_acc(\d+))?(?:_(fp32|bf16))?")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a small run lies over processes.

    Attributes:
        ranks: processes.
        expert_parallel: ranks that share one set of experts.
        zero_stage: of DeepSpeed.
        accumulation: micro-batches of each rank per optimizer step.
        dtype: fp32 or bf16.
    """

    ranks: int
    expert_parallel: int
    zero_stage: int
    accumulation: int = 1
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        """What a user types for it; parts that say the default are left out."""
        ranks = f"ranks{self.ranks}_" if self.ranks != self.expert_parallel else ""
        accumulation = f"_acc{self.accumulation}" if self.accumulation > 1 else ""
        dtype = f"_{self.dtype}" if self.dtype != "fp32" else ""
        return f"{ranks}ep{self.expert_parallel}_zero{self.zero_stage}{accumulation}{dtype}"


def parse(name: str) -> Layout:
    """The layout of a name; without ``ranksN`` it has as many ranks as share the experts.

    Raises:
        ConfigError: the name is none, or its numbers do not fit together.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        form = "[ranksN_]epN_zeroN[_accN][_bf16], e.g. ep2_zero1 or ranks4_ep2_zero1_acc2"
        raise ConfigError([f"layout '{name}' is none: write {form}"])
    ranks, expert_parallel, stage, accumulation, dtype = found.groups()
    layout = Layout(
        ranks=int(ranks or expert_parallel),
        expert_parallel=int(expert_parallel),
        zero_stage=int(stage),
        accumulation=int(accumulation or 1),
        dtype=dtype or "fp32",
    )
    problems = list(_broken(layout))
    if problems:
        raise ConfigError([f"layout '{name}' {problem}" for problem in problems])
    return layout


def chosen(names: Sequence[str], *, run: RunConfig) -> list[Layout]:
    """The layouts a user asked for, in that order; for no names ``usual``, for ``all`` the whole matrix.

    A name without a dtype stands for fp32, where the bounds are tight, and in a bf16 run for bf16 besides.

    Raises:
        ConfigError: as ``parse``; or a layout that the model cannot have.
    """
    if not names:
        return usual(run)
    layouts, problems = [], []
    for name in names:
        try:
            some = whole_matrix(run) if name == "all" else _in_dtypes(parse(name), name=name, run=run)
        except ConfigError as error:
            problems += error.problems
            continue
        layouts += some
        problems += [f"layout '{each.name}' {problem}" for each in some for problem in _unfit(each, run)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return list(dict.fromkeys(layouts))


def usual(run: RunConfig) -> list[Layout]:
    """The user's own layout first, then each (ranks, expert parallel) with and without accumulation.

    The ZeRO stages take turns; ``whole_matrix`` has all of them everywhere.
    """
    own = own_layout(run)
    layouts = [own, replace(own, dtype="bf16")] if run.model.dtype == "bf16" and own.zero_stage else [own]
    for index, (ranks, expert_parallel) in enumerate(_places(run)):
        for accumulation in (1, 2):
            stage = ZERO_STAGES[(index + accumulation) % len(ZERO_STAGES)]
            layouts.append(Layout(ranks=ranks, expert_parallel=expert_parallel, zero_stage=stage,
                                  accumulation=accumulation))  # fmt: skip
    return list(dict.fromkeys(layouts))


def whole_matrix(run: RunConfig) -> list[Layout]:
    """Every combination of sizes, stages and accumulation, in fp32; the user's own layout first."""
    matrix = [
        Layout(ranks=ranks, expert_parallel=expert_parallel, zero_stage=stage, accumulation=accumulation)
        for ranks, expert_parallel in _places(run)
        for stage in ZERO_STAGES
        for accumulation in (1, 2)
    ]
    return list(dict.fromkeys([*usual(run)[:2], *matrix]))


def own_layout(run: RunConfig) -> Layout:
    """The layout of the run itself, on at most four ranks."""
    expert_parallel, world = run.parallel.expert_parallel or 1, run.launch.world_size
    most = max(RANKS)
    if expert_parallel > most:
        expert_parallel = max(n for n in range(1, most + 1) if expert_parallel % n == 0)
    copies = min(world // (run.parallel.expert_parallel or 1), most // expert_parallel)
    accumulated = run.batch.global_batch // ((run.batch.micro_batch or 1) * world)
    return Layout(
        ranks=expert_parallel * copies,
        expert_parallel=expert_parallel,
        zero_stage=run.parallel.zero_stage,
        accumulation=min(2, accumulated),
    )


def global_batch(layouts: Sequence[Layout], *, least: int = 8) -> int:
    """The fewest sequences, at least ``least``, that every layout can share out evenly."""
    together = math.lcm(*(layout.ranks * layout.accumulation for layout in layouts))
    return -(-least // together) * together


def _places(run: RunConfig) -> Iterator[tuple[int, int]]:
    experts = run.model.moe.num_experts if run.model.moe else 1
    for ranks in RANKS:
        for expert_parallel in EXPERT_PARALLEL:
            if ranks % expert_parallel == 0 and experts % expert_parallel == 0:
                yield ranks, expert_parallel


def _in_dtypes(layout: Layout, *, name: str, run: RunConfig) -> list[Layout]:
    is_named = name.endswith(("_fp32", "_bf16"))
    if is_named or run.model.dtype == "fp32" or layout.zero_stage == 0:
        return [layout]
    return [layout, replace(layout, dtype=run.model.dtype)]


def _broken(layout: Layout) -> Iterator[str]:
    if not 1 <= layout.ranks <= MOST_RANKS:
        yield f"has {layout.ranks} ranks, but must have from 1 to {MOST_RANKS}, all on this machine"
    elif layout.expert_parallel < 1 or layout.ranks % layout.expert_parallel:
        yield f"shares experts among {layout.expert_parallel} ranks, but that must divide its {layout.ranks} ranks"
    if layout.zero_stage not in ZERO_STAGES:
        yield f"has ZeRO stage {layout.zero_stage}, but must have one of {', '.join(map(str, ZERO_STAGES))}"
    elif layout.zero_stage == 0 and layout.dtype == "bf16":
        yield "has ZeRO stage 0 in bf16, which is not offered: use another stage, or fp32"
    if not 1 <= layout.accumulation <= MOST_ACCUMULATION:
        yield f"accumulates {layout.accumulation} micro-batches, but must accumulate from 1 to {MOST_ACCUMULATION}"


def _unfit(layout: Layout, run: RunConfig) -> Iterator[str]:
    if run.model.moe is None:
        if layout.expert_parallel > 1:
            yield "shares experts, but the model is dense: use ep1, e.g. ranks2_ep1_zero1"
    elif run.model.moe.num_experts % layout.expert_parallel:
        yield (
            f"shares experts among {layout.expert_parallel} ranks, but that must divide model.moe.num_experts, "
            f"{run.model.moe.num_experts}"
        )
