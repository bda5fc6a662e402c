"""A checkpoint of one model made into one of another, block by block, and whether the loss goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from moetrain.archive.expected import Expected, expected_tensors
from moetrain.archive.stored import Stored, blocks
from moetrain.archive.written import Intervals, made_whole, write_checkpoint
from moetrain.checkpoint.store import Manifest
from moetrain.config.checks import check
from moetrain.config.freeze import flatten, to_dict, write_run
from moetrain.config.schema import ModelConfig, RunConfig
from moetrain.data.build import open_corpus
from moetrain.data.corpus import TOKENIZER
from moetrain.data.loader import HeldOutText
from moetrain.data.packing import Packing
from moetrain.errors import ConfigError, DataError
from moetrain.evaluation.text import SourceResult, evaluate_sources, together
from moetrain.hub.adopt import name_of
from moetrain.hub.generate import load_model, newest_or
from moetrain.plan.flops import GATED
from moetrain.surgery.plan import Move, jittered, parted

SEQUENCES = 64
"""Of each source, on which the loss is compared."""
WAITING = 2.0
"""How far behind all others copies wait in the choice of a sigmoid router, whose scores lie between 0 and 1."""
Steps = Iterable[tuple[str, list[Move]]]


@dataclass(frozen=True)
class Outcome:
    """What was made."""

    run_dir: Path
    run: RunConfig
    step: int
    before: SourceResult
    after: SourceResult
    on: str
    """What text the two are of."""
    experiment: str
    """Name of the experiment in ``run_dir/configs`` that goes on from there."""


def usage(run_dir: Path, *, warn: Callable[[str], None]) -> list[list[float]]:
    """Of each MoE block, the share of the held-out token copies that each expert gets.

    Raises:
        ConfigError: the run's text is not there.
    """
    run, _, _ = newest_or(run_dir, step=None, warn=warn)
    texts, packing, _ = _texts(run, run_dir)
    if packing is None:
        raise ConfigError([f"the prepared text of {run_dir} is not there, but tells which experts are used: prepare it "
                           "again"])  # fmt: skip
    return _judge(run_dir, texts, packing, warn=warn).share_LE


def operate(
    run_dir: Path,
    out: Path,
    *,
    change: Callable[[ModelConfig], ModelConfig],
    steps: Callable[[ModelConfig, ModelConfig], Steps],
    warn: Callable[[str], None],
) -> Outcome:
    """Write the changed model as the checkpoint of the same step in a run directory of its own, moments and all.

    Args:
        out: a directory that is not there yet.
        change: the settings of the model -> those of the new one.
        steps: both -> the moves (``surgery.plan``); tensors that it does not name stay as they are.

    Raises:
        ConfigError: the settings do not allow it, or the place is taken.
        CheckpointError: there is no whole checkpoint, or the new one cannot be written.
    """
    with made_whole(out) as partial:
        run, directory, manifest = newest_or(run_dir, step=None, warn=warn)
        new = replace(run, name=name_of(out), run_dir=str(out), model=change(run.model))
        new = replace(new, parallel=replace(new.parallel, expert_parallel=1))
        check(new, flatten(to_dict(new)))
        texts, packing, on = _texts(run, run_dir)
        stored, expected = Stored(directory), expected_tensors(to_dict(new))
        shutil.copyfile(run_dir / TOKENIZER, partial / TOKENIZER)
        write_run(new, partial)
        told = replace(manifest, run=to_dict(new), files=[], held_out_loss=None, certificate=None)
        moves = dict(steps(run.model, new.model))
        _write(partial / "checkpoints", stored, expected, moves, run=new, manifest=told)
        _write_experiment(partial / "configs" / "experiment", new, run_dir=run_dir)
        before = _judge(run_dir, texts, packing, warn=warn)
        after = _judge(partial, texts, packing, warn=warn)
    return Outcome(out, new, manifest.step, before, after, on, experiment=str(new.name))


def _write(
    root: Path, stored: Stored, expected: Expected, moves: dict[str, list[Move]], *, run: RunConfig, manifest: Manifest
) -> None:
    kinds = tuple(kind for kind in ("fp32", "exp_avg", "exp_avg_sq") if kind == "fp32" or manifest.has_moments)
    sizes = expected.tensors(kinds)
    states = set(expected.states)
    dtypes = {name: stored.tensors[name].dtype if name in stored.tensors else torch.float32 for name in sizes}

    def fill(intervals: Intervals) -> None:
        for name in dict.fromkeys(full.rpartition("/")[0] for full in sizes):
            if name in moves:
                for move in moves[name]:
                    if move.name in sizes:
                        _carry_out(move, intervals, stored, size=sizes[move.name], run=run)
            elif name in states and f"{name}/state" not in stored.tensors:
                share = torch.full((sizes[f"{name}/state"],), 1 / sizes[f"{name}/state"])
                intervals.write(f"{name}/state", 0, share)
            else:
                for full in (each for each in sizes if each.rpartition("/")[0] == name):
                    for begin, end in blocks(sizes[full]):
                        intervals.write(full, begin, stored.read(full, begin, end))

    write_checkpoint(root, manifest, sizes=sizes, dtypes=dtypes, fill=fill)


def _carry_out(move: Move, intervals: Intervals, stored: Stored, *, size: int, run: RunConfig) -> None:
    if move.values:
        intervals.write(move.name, 0, _made(move, stored, size=size, run=run))
        return
    total = stored.tensors[move.source].numel
    if move.keep is None:
        for begin, end in blocks(total):
            values = stored.read(move.source, begin, end)
            intervals.write(move.name, move.begin * total + begin, values * move.factor if move.factor != 1 else values)
        return
    part = total // move.parts
    shares = stored.read(move.source, 0, total) if move.name.endswith("share_E/state") else None
    factor = 1.0 if shares is None else 1 / max(1e-9, float(shares[list(move.keep)].sum()))
    for place, kept in enumerate(move.keep):
        for begin, end in blocks(part):
            values = stored.read(move.source, kept * part + begin, kept * part + end)
            intervals.write(move.name, place * part + begin, values * factor if factor != 1 else values)


def _made(move: Move, stored: Stored, *, size: int, run: RunConfig) -> Tensor:
    moe = run.model.moe
    assert moe is not None
    seed = run.seed + sum(map(ord, move.name))
    if move.values == "zero":
        return torch.zeros(size)
    if move.values == "drawn":
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * run.model.init_std
    old = stored.read(move.source, 0, stored.tensors[move.source].numel)
    if move.values in ("parted", "jittered"):
        weight_ED = old.view(-1, run.model.d_model)
        make = parted if move.values == "parted" else jittered
        return make(weight_ED, copies=moe.num_experts // len(weight_ED), seed=seed).flatten()
    if move.values == "waiting":
        behind = (old.min() - WAITING).expand(moe.num_experts - len(old))
        return torch.cat([old, behind])
    experts = stored.tensors[move.source.replace("router.expert_V/state", "experts.w_in/fp32")].numel
    experts //= _of_one_expert(run.model)
    new = old.clone()
    for expert in range(experts):
        # its tokens go to its copies, expert + j E, in turns
        own = (old == expert).nonzero().flatten()
        new[own] += experts * (torch.arange(len(own)) % (moe.num_experts // experts))
    return new


def _of_one_expert(model: ModelConfig) -> int:
    """Elements of its first map."""
    moe = model.moe
    assert moe is not None
    gated = 2 if (moe.activation or model.activation) in GATED else 1
    return gated * (moe.d_expert or model.d_ff) * model.d_model


def _texts(run: RunConfig, run_dir: Path) -> tuple[Mapping[str, HeldOutText], Packing | None, str]:
    try:
        corpus = open_corpus(run, run_dir)
    except DataError:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, run.model.vocab_size, (257,), generator=generator).numpy()
        return {"random": HeldOutText(tokens=tokens, num_bytes=257)}, None, "random tokens (its text is not there)"
    return corpus.held_out(), corpus.packing(run.data), "held-out text"


def _judge(
    run_dir: Path, texts: Mapping[str, HeldOutText], packing: Packing | None, *, warn: Callable[[str], None]
) -> SourceResult:
    run, gpt = load_model(run_dir, warn=warn)
    results = evaluate_sources(
        gpt,
        texts,
        sequence_length=run.sequence_length,
        micro_batch=run.batch.micro_batch or 1,
        packing=packing or Packing(end_of_text=0),
        max_sequences=SEQUENCES,
    )
    return together(results, texts)


def _write_experiment(directory: Path, run: RunConfig, *, run_dir: Path) -> None:
    directory.mkdir(parents=True)
    settings = to_dict(run)
    # the layout is for whoever starts it
    for section in ("launch", "parallel"):
        settings.pop(section)
    settings["batch"].pop("micro_batch")
    text = f"# @package _global_\n# Goes on from {run_dir}, changed.\n{yaml.safe_dump(settings, sort_keys=False)}"
    (directory / f"{run.name}.yaml").write_text(text, encoding="utf-8")


def most_used(share_LE: list[list[float]], *, num_experts: int) -> list[tuple[int, ...]]:
    """Of each block, the experts that are used most, in their order."""
    return [tuple(sorted(sorted(range(len(share_E)), key=lambda i, share_E=share_E: -share_E[i])[:num_experts]))
            for share_E in share_LE]  # fmt: skip


def alive(share_LE: list[list[float]], *, least: float) -> Iterator[int]:
    """How many experts of each block get more than ``least`` of a fair share of the tokens."""
    for share_E in share_LE:
        yield sum(share * len(share_E) > least for share in share_E)
