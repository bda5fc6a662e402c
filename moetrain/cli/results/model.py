"""The verbs around a trained model: sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.options import number, warn
from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig, SampleConfig
    from moetrain.hub.generate import Written

HELP = {
    "sample": """usage: moetrain sample [RUN] [step=N] [prompt=TEXT …] [max_tokens=N] [temperature=X] [top_k=N]
                       [top_p=X] [seed=N] [stop=TEXT …] [colour=experts] [layer=N]

Writes on from a prompt with the newest whole checkpoint of a run (or of step N), token by token. RUN is a run directory
(also written run_dir=RUN); without it, runs/tiny. prompt= may be given several times: they are read together, and each
gets a text of its own. stop= too: the text ends before the first of them (\\n is a line break). colour=experts shows
each token in the colour of the expert that it chose first in MoE block N (layer=N, from 0; as a rule the one in the
middle), and in the end what each expert got.

examples:
  moetrain sample
  moetrain sample runs/tiny prompt="The state of the Union is" temperature=0.7 seed=3
  moetrain sample prompt="My fellow" prompt="We must" top_p=0.9 stop=. colour=experts
""",
}
_LARGEST = 1 << 62
COLOURS = ("none", "experts")


def sample(words: Sequence[str]) -> int:
    """The verb `sample`."""
    from moetrain.config.freeze import freeze_section
    from moetrain.config.schema import SampleConfig

    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and "run_dir" not in given and not word.startswith("-"):
            given["run_dir"] = word
        elif not equals:
            raise ConfigError([f"'{word}' is not a setting: write key=value, e.g. prompt=\"My fellow citizens\""])
        elif key in ("prompt", "stop"):
            given.setdefault(key, []).append(value)
        else:
            given[key] = value if key in ("run_dir", "colour") else number(value)
    wanted = freeze_section(SampleConfig, given)
    rules = (("max_tokens", wanted.max_tokens, 1), ("temperature", wanted.temperature, 0), ("top_k", wanted.top_k, 0),
             ("seed", wanted.seed, 0), ("step", wanted.step or 0, 0), ("layer", wanted.layer or 0, 0))  # fmt: skip
    problems = [f"{name} is {value}, but must be from {least} to {_LARGEST:.0e}"
                for name, value, least in rules if not least <= value <= _LARGEST]  # fmt: skip
    if not 0 < wanted.top_p <= 1:
        problems.append(f"top_p is {wanted.top_p}, but must lie in (0, 1]: it is a share of the probability")
    if wanted.colour not in COLOURS:
        problems.append(f"colour is {wanted.colour!r}, but must be one of {', '.join(COLOURS)}")
    if wanted.layer is not None and wanted.colour == "none":
        problems.append(f"layer is {wanted.layer}, but belongs to colour=experts: leave it out, or add that")
    if "" in wanted.stop:
        problems.append("stop is empty, but must be a text before which to end: leave it out")
    if problems:
        raise ConfigError(problems)
    from moetrain.report.writing import show

    run, pieces = write(wanted)
    coloured = None if wanted.colour == "none" or run.model.moe is None else run.model.moe.num_experts
    show(wanted.prompt, pieces, num_experts=coloured)
    return 0


def write(wanted: SampleConfig) -> tuple[RunConfig, Iterator[Written]]:
    """The settings of a run, and pieces of text that its model writes.

    Raises:
        ConfigError: ``layer`` names no MoE block.
    """
    from moetrain.config.routers import sees_others
    from moetrain.data.corpus import TOKENIZER
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.hub.generate import Sampling, best_device, generate, load_model

    run_dir = Path(wanted.run_dir)
    run, gpt = load_model(run_dir, step=wanted.step, warn=warn, device=best_device())
    watch = None
    if wanted.colour == "experts":
        watch = _watched(run, layer=wanted.layer)
    reason = sees_others(run.model.moe)
    if reason is not None:
        warn(f"{reason}: every token reads the whole text anew, and what it gets is not what it got in training")
    sampling = Sampling(
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        seed=wanted.seed,
        stop=tuple(stop.replace("\\n", "\n").replace("\\t", "\t") for stop in wanted.stop),
    )
    # positions past the trained length were never seen
    context = run.sequence_length
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    pieces = generate(
        gpt, tokenizer, wanted.prompt, sampling=sampling, context=context, cache=reason is None, watch=watch
    )
    return run, pieces


def _watched(run: RunConfig, *, layer: int | None) -> int:
    moe = run.model.moe
    if moe is None:
        raise ConfigError([f"colour is experts, but {run.name} is dense: use colour=none"])
    layers = run.model.num_layers // moe.every
    if layer is not None and layer >= layers:
        raise ConfigError([f"layer is {layer}, but {run.name} has {layers} MoE blocks: use 0 to {layers - 1}"])
    return layers // 2 if layer is None else layer
