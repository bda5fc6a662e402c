"""Every preset, written out: what it is made of does not change unnoticed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.compose import compose
from moetrain.config.checks import check, resolve
from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.freeze import config_directory, flatten, freeze, to_dict
from moetrain.config.schema import ModelConfig, RunConfig
from moetrain.model.build import build_model
from moetrain.plan.flops import count_parameters
from moetrain.report.screen import config_text
from moetrain.train.adopted.experts import adopt_experts, parameter_groups

MODELS = sorted(path.stem for path in (config_directory() / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (config_directory() / "experiment").glob("*.yaml"))
# a machine's own number of processes must not show
ON_TWO = ["launch.processes=2"]
ON_EIGHT = ["launch.processes=8"]
PRESETS = {
    **{name: [f"model={name}", *(ON_TWO if name in ("tiny", "gpt2_124m") else ON_EIGHT)] for name in MODELS},
    # an experiment about layouts says itself how many processes it wants
    **{name: [f"experiment={name}", *([] if "parallel" in name else ON_TWO)] for name in EXPERIMENTS},
    "tiny-dense": ["model/moe=none", *ON_TWO],
}

Row = tuple[str, tuple[int, ...], str, str]
"""Name, shape, decayed or not, expert or not."""


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_it_was(preset, golden):
    composed = compose(PRESETS[preset])
    run = resolve(freeze(composed.settings | {"name": preset}), default_processes=-1)
    check(run, flatten(to_dict(run)))
    parts = (
        f"$ moetrain config {' '.join(PRESETS[preset])}",
        config_text(run, composed=composed.settings, sources=composed.sources),
        "DeepSpeed",
        json.dumps(engine_config(run), indent=1, sort_keys=True),
        f"parameters: {count_parameters(run.model).total:,}",
        parameter_table(run.model),
    )
    golden(preset, "\n\n".join(parts) + "\n")


def engine_config(run: RunConfig) -> dict[str, Any]:
    processes = run.launch.world_size
    return deepspeed_config(
        micro_batch=run.batch.micro_batch or 0,
        accumulation=run.batch.global_batch // (run.batch.micro_batch or 1) // processes,
        world_size=processes,
        zero_stage=run.parallel.zero_stage,
        dtype=run.model.dtype,
        clip=run.optim.clip,
        offload_optimizer=run.parallel.offload_optimizer,
    )


def parameter_table(model: ModelConfig) -> str:
    rows = parameter_rows(model)
    sizes = [torch.Size(shape).numel() for _, shape, _, _ in rows]
    assert sum(sizes) == count_parameters(model).total, "the plan counts what is built"
    width = max(len(name) for name, *_ in fold(rows))
    return "\n".join(
        f"{name:<{width}}  {' x '.join(map(str, shape)):<20}  {decayed:<11}  {expert}".rstrip()
        for name, shape, decayed, expert in fold(rows)
    )


def parameter_rows(model: ModelConfig) -> list[Row]:
    """As the optimizer is given them, on one rank with every expert."""
    with torch.device("meta"):
        gpt = build_model(model)
    adopt_experts(gpt, expert_parallel=1)
    groups = parameter_groups(gpt, weight_decay=0.1, lr=1.0)
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    assert len(group_of) == len(list(gpt.parameters())), "every parameter is in a group"
    return [
        (
            name,
            tuple(parameter.shape),
            "decayed" if group_of[parameter]["weight_decay"] else "not decayed",
            "expert" if group_of[parameter].get("moe") else "",
        )
        for name, parameter in gpt.named_parameters()
    ]


def fold(rows: Sequence[Row]) -> Iterator[Row]:
    """Blocks that are alike become one, ``blocks.{0..62 step 2}``, where the first of them stands."""
    blocks: dict[int, list[Row]] = {}
    for name, *rest in rows:
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            blocks.setdefault(int(match[1]), []).append((match[2], *rest))
    alike: dict[tuple[Row, ...], list[int]] = {}
    for index, content in blocks.items():
        alike.setdefault(tuple(content), []).append(index)
    first = {indices[0]: (name_of(indices), content) for content, indices in alike.items()}
    done: set[int] = set()
    for row in rows:
        match = re.match(r"blocks\.(\d+)\.", row[0])
        if match is None:
            yield row
        elif int(match[1]) in first and int(match[1]) not in done:
            done.add(int(match[1]))
            label, content = first[int(match[1])]
            yield from ((f"blocks.{label}.{name}", *rest) for name, *rest in content)


def name_of(indices: Sequence[int]) -> str:
    steps = {after - before for before, after in itertools.pairwise(indices)}
    if not steps:
        return str(indices[0])
    assert len(steps) == 1, indices
    step = "" if steps == {1} else f" step {steps.pop()}"
    return f"{{{indices[0]}..{indices[-1]}{step}}}"


def test_no_golden_file_is_left_over():
    found = {path.stem for path in (Path(__file__).parent / "golden").glob("*.txt")}
    assert found == set(PRESETS)


def test_only_equal_blocks_are_folded():
    rows = [("a", (1,), "d", ""), *((f"blocks.{i}.w", (i % 2,), "d", "") for i in range(6)), ("z", (1,), "d", "")]
    assert [(name, shape) for name, shape, *_ in fold(rows)] == [
        ("a", (1,)),
        ("blocks.{0..4 step 2}.w", (0,)),
        ("blocks.{1..5 step 2}.w", (1,)),
        ("z", (1,)),
    ]
    assert [name for name, *_ in fold([("blocks.0.w", (1,), "d", ""), ("blocks.1.w", (1,), "d", "")])] == [
        "blocks.{0..1}.w"
    ]
    assert [name for name, *_ in fold([("blocks.0.w", (1,), "d", "")])] == ["blocks.0.w"]
