"""A run and a sweep to draw, written as train and sweep write them."""

from __future__ import annotations

import atexit
import functools
import json
import math
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moetrain.compose import compose
from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, write_run
from moetrain.config.schema import RunConfig
from moetrain.sweep.grid import make_grid
from moetrain.sweep.settings import axes_of, freeze_sweep
from moetrain.sweep.state import DONE, Sweep, open_sweep


def a_run(directory: Path, *, steps: int = 40, incidents: bool = True) -> RunConfig:
    """A sparse run with one dead expert, drops and an incident."""
    directory.mkdir(parents=True)
    overrides = ["model.moe.num_experts=4", "model.moe.capacity_factor=1.25", "optim.lr=1e-3", f"run_dir={directory}",
                 f"schedule.steps={steps}", "schedule.warmup_steps=2", "name=made"]  # fmt: skip
    run = resolve(freeze(compose(overrides).settings), default_processes=2)
    write_run(run, directory)
    lines: list[dict[str, Any]] = [_line(step) for step in range(2, steps + 1, 2)]
    evaluation = {"perplexity": 1.0, "bits_per_byte": 2.0, "held_out_loss_by_source": {"wiki": 3.1, "</script>": 3.4}}
    lines.insert(5, {"step": 10, "tokens": 40_960, "held_out_loss": 4.0} | evaluation)
    lines.append({"step": steps, "tokens": 4096 * steps, "held_out_loss": 3.2, "final": True} | evaluation)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "origin.json").write_text(json.dumps({"starts": [{"command": ["moetrain", "train", "model=tiny"]}]}))
    (directory / "experts.json").write_text(json.dumps(_experts(layers=4, experts=4)))
    if incidents:
        text = json.dumps({"step": 12, "kind": "spike", "what": "loss <b>9</b>"}) + "\n{torn"
        (directory / "incidents.jsonl").write_text(text)
    return run


def _line(step: int) -> dict[str, Any]:
    draw = random.Random(step)
    layers = []
    for _ in range(4):
        weights = [0.5 + draw.random() for _ in range(3)]
        layers.append([weight / sum(weights) for weight in weights] + [0.0])
    return {"step": step, "tokens": 4096 * step, "loss": 3 + 4 / math.sqrt(step), "lr": 1e-3, "grad_norm": 1 / step,
            "tokens_per_second": 2000.0, "load": layers, "max_over_mean": [4 * max(layer) for layer in layers],
            "entropy": [1.2, 1.1, 1.0, None], "dropped_share": [0.1, 0.0, 0.02, 0.05],
            "dead_experts": [[3], [], [3], []]}  # fmt: skip


def _experts(*, layers: int, experts: int) -> dict[str, Any]:
    """As `moetrain evaluate` writes it: two sources of equal weight, one expert without a favourite."""
    draw = random.Random(7)
    sources: dict[str, list[list[float]]] = {}
    for name in ("wiki", "</script>"):
        weights = [[0.2 + draw.random() for _ in range(experts)] for _ in range(layers)]
        sources[name] = [[weight / sum(layer) for weight in layer] for layer in weights]
    first, second = sources.values()
    both = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    words = [[], [{"text": " the", "occurrences": 40, "share": 0.9, "times": 3.6}],
             [{"text": "<b>", "occurrences": 12, "share": 0.5, "times": 2.0}], [{"text": "\n", "occurrences": 99,
              "share": 1.0, "times": 4.0}]]  # fmt: skip
    return {"step": 40, "tokens": 9000, "all": both, "sources": sources, "told_by_token": [0.5, 0.3, 0.2, 0.1],
            "favourites": [words] * layers}  # fmt: skip


def a_sweep(directory: Path, *, seeds: int = 2, unfinished: int = 0) -> Sweep:
    """Three sizes of 1 to 32 experts, whose losses follow a routed law with a little noise."""
    shutil.copytree(_made_sweep(seeds, unfinished), directory, dirs_exist_ok=True)
    return Sweep.read(directory)


@functools.cache
def _settings(*words: str) -> RunConfig:
    """Composed once for all sweeps and seeds."""
    return freeze(compose(words).settings)


@functools.cache
def _made_sweep(seeds: int, unfinished: int) -> Path:
    """Made once, for it takes seconds."""
    place = Path(tempfile.mkdtemp(prefix="made_sweep"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    directory = place / "s"
    axes = axes_of({"size": {"s": ["model.d_model=64"], "m": ["model.d_model=128"], "l": ["model.d_model=256"]},
                    "model.moe.num_experts": [1, 2, 4, 8, 16, 32]})  # fmt: skip
    given = {"keep": "active_flops", "within": ["size"], "seeds": list(range(seeds))}
    config = freeze_sweep(given, axes)
    points = make_grid(config, axes, make=lambda words: _settings(*words), default_processes=1)
    sweep = open_sweep(directory, config, points)
    draw = random.Random(0)
    for run in sweep.runs[: len(sweep.runs) - unfinished]:
        point = sweep.points[run.point]
        experts = int(point.labels["model.moe.num_experts"])
        loss = 8 * point.active**-0.05 * (experts + 1) ** -0.02 * math.exp(draw.gauss(0, 0.002))
        place = sweep.run_dir(run)
        place.mkdir(parents=True)
        write_run(resolve(_settings(*point.overrides), default_processes=1), place)
        trained = {"step": 1, "tokens": 1000, "loss": loss, "tokens_per_second": 1e6 / point.active}
        final = {"step": 1, "tokens": 1000, "final": True, "held_out_loss": loss, "bits_per_byte": loss / 2}
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (trained, final)))
        run.status = DONE
    sweep.write()
    return directory
