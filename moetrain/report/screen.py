"""What the terminal shows before a run starts and when it has ended."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetrain.config.checks import steps_in_run
from moetrain.config.freeze import flatten, to_dict
from moetrain.config.identity import training_digest
from moetrain.config.schema import RunConfig
from moetrain.metrics.log import read_metrics
from moetrain.plan.flops import count_parameters, flops_per_token, format_count
from moetrain.report.figures import expert_load_map, has_load, loss_curve
from moetrain.watch.incidents import INCIDENTS, read_incidents, summary

METRICS = "metrics.jsonl"
RECORDED = "recorded.json"
MOST_SAMPLED = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Bits per byte of the same held-out text by ways that are no Transformer."""

    trigram: float
    xz: float


def plan_text(run: RunConfig) -> str:
    """A few lines on what is about to run."""
    count, moe = count_parameters(run.model), run.model.moe
    length = run.sequence_length
    per_step = run.batch.global_batch * length
    steps = steps_in_run(run.schedule, tokens_per_step=per_step)
    flops = flops_per_token(run.model, sequence_length=length) * per_step * steps
    kind = "dense" if moe is None else f"{moe.num_experts} experts, top-{moe.top_k}"
    size = f"{format_count(count.total)} parameters, {format_count(count.active)} active per token ({kind})"
    return (
        f"{run.run_dir}: {size}\n"
        f"  {steps:,} steps of {per_step:,} tokens: {format_count(steps * per_step)} tokens, {flops:.2e} FLOPs\n"
        f"  {_processes_text(run)}, expert parallel {run.parallel.expert_parallel}, "
        f"ZeRO-{run.parallel.zero_stage}, {run.model.dtype}"
    )


def tiny_settings_text(sources: Mapping[str, str], *, model: str) -> str:
    """A line where a model of another size would train with what was tried out on the tiny one; else empty.

    Args:
        sources: as ``compose.Composed`` has them.
        model: the preset.
    """
    names = [
        name for name in ("optim.lr", "schedule.steps", "schedule.warmup_steps") if sources.get(name) == "run.yaml"
    ]
    if model == "tiny" or not names:
        return ""
    return f"  note: {', '.join(names)} as tried out on the tiny model (run.yaml): set what {model} needs"


def _processes_text(run: RunConfig) -> str:
    nodes, kind = run.launch.nodes or 1, run.launch.kind
    text = f"{run.launch.processes} processes" if nodes == 1 else f"{nodes} nodes of {run.launch.processes} processes"
    return text if kind == "local" else f"{text} ({kind})"


def prepared_text(directory: Path, prepared: Any) -> str:
    """A few lines on prepared token files.

    Args:
        prepared: as ``data.corpus.Prepared``.
    """
    train, held_out, meta = prepared.train, prepared.held_out, prepared.meta
    left_out = {"empty": meta.empty_documents} | meta.dropped
    counts = ", ".join(f"{count:,} {why.replace('_', ' ')}" for why, count in left_out.items() if count)
    tried = meta.round_trip
    return (
        f"{directory}\n"
        f"  train     {train.num_documents:>9,} documents  {train.num_tokens:>13,} tokens\n"
        f"  held out  {held_out.num_documents:>9,} documents  {held_out.num_tokens:>13,} tokens\n"
        f"  vocabulary {prepared.vocab_size:,}, {train.num_bytes / train.num_tokens:.2f} bytes per token"
        + (f"\n  left out: {counts}" if counts else "")
        + (f"\n  {tried.same:,} of {tried.tried:,} documents tried come back from their tokens" if tried.tried else "")
    )


def mixture_text(uses: Sequence[Any]) -> str:
    """A line for each source of a run.

    Args:
        uses: as ``data.build.SourceUse``.
    """
    width = max(len(use.name) for use in uses)
    lines = []
    for use in uses:
        ends = "" if use.used_up_at is None else f", used up at step {use.used_up_at:,}: then the others share its part"
        lines.append(f"  {use.name:<{width}}  {use.share:6.1%} of the sequences, read {use.epochs:.2f} times{ends}")
    return "\n".join(lines)


def config_text(run: RunConfig, *, composed: dict[str, Any], sources: dict[str, str]) -> str:
    """The settings as YAML, each line with its source behind it.

    Args:
        run: resolved.
        composed: what was composed, before the rest was worked out.
        sources: dotted name -> where it was set; others are defaults.
    """
    given, lines = flatten(composed), []
    open_sections: list[str] = []
    for name, value in flatten(to_dict(run)).items():
        *sections, last = name.split(".")
        for depth, section in enumerate(sections):
            if open_sections[: depth + 1] != sections[: depth + 1]:
                lines.append(("  " * depth + f"{section}:", ""))
        open_sections = sections
        # one line each: a text with line breaks goes into quotes, where they are written as \\n
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        style = None if all(text.isprintable() for text in texts) else '"'
        dumped = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True)
        written = dumped.removesuffix("...\n").strip()
        is_given = value is None or name not in given or given[name] is not None
        source = sources.get(name, "default") if is_given else "worked out"
        lines.append(("  " * len(sections) + f"{last}: {written}", source))
    width = min(60, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in lines)


def is_finished(run: RunConfig, run_dir: Path) -> bool:
    """Whether the run has reached its last step and was evaluated there."""
    steps = steps_in_run(run.schedule, tokens_per_step=run.batch.global_batch * run.sequence_length)
    path = run_dir / METRICS
    return path.is_file() and any(line.get("final") and line["step"] >= steps for line in read_metrics(path))


def is_small(run: RunConfig) -> bool:
    """Whether a run may end by sampling: one process then holds the whole model, in float32."""
    return count_parameters(run.model).total <= MOST_SAMPLED


def draw(run_dir: Path) -> None:
    """The pictures of a run: ``loss.png`` and, for a sparse model, ``expert_load.png``."""
    metrics = read_metrics(run_dir / METRICS)
    loss_curve(metrics, run_dir / "loss.png", title=f"{run_dir.name}: loss")
    if has_load(metrics):
        expert_load_map(metrics, run_dir / "expert_load.png", title=f"{run_dir.name}: expert load")


def last_screen(run: RunConfig, *, run_dir: Path, baselines: Baselines, opening: str, sample: str) -> None:
    """What a finished run has reached, and what to do next."""
    metrics = read_metrics(run_dir / METRICS)
    final = next(line for line in reversed(metrics) if line.get("final"))
    steps = [line for line in metrics if "tokens_per_second" in line]
    # soft_wrap: a line longer than the terminal is the terminal's to wrap, so that a command can be copied whole
    console = Console(highlight=False, soft_wrap=True)
    done = f"{final['step']:,} steps, {format_count(final['tokens'])} tokens"
    console.print(f"\n[bold]{escape(str(run_dir))}[/bold] is finished: {done}")
    console.print(_comparison(run, final=final, baselines=baselines))
    if steps:
        console.print(f"speed        {_speed_text(steps)}")
    incidents = read_incidents(run_dir)
    if incidents:
        console.print(f"incidents    {summary(incidents)}: {run_dir / INCIDENTS}", markup=False)
    pictures = [run_dir / "loss.png"]
    if "held_out_load" in final:
        console.print(f"expert load  {_load_text(final)}")
        pictures.append(run_dir / "expert_load.png")
    console.print(f"pictures     {', '.join(map(str, pictures))}", markup=False)
    if sample:
        console.print("\n[bold]a sample[/bold], going on from the first words of the held-out text")
        console.print(f"[dim]{escape(opening)}[/dim]{escape(sample.rstrip())}")
    console.print("\n[bold]next[/bold]")
    if shutil.which("moetrain") is None:
        console.print(f"  . {escape(str(Path(sys.executable).parent / 'activate'))}    # so that moetrain is found")
    console.print(f'  moetrain sample {shlex.quote(str(run_dir))} prompt="The state of the Union is"', markup=False)
    if run.model.moe is not None:
        console.print("  moetrain train name=wide model.moe.num_experts=16    another number of experts")
        console.print("  moetrain train model/moe=none                        the dense model to compare with")
    console.print("  moetrain config                                      every setting there is")


def _comparison(run: RunConfig, *, final: dict[str, Any], baselines: Baselines) -> Table:
    moe = run.model.moe
    kind = "dense model" if moe is None else f"this model ({moe.num_experts} experts, top-{moe.top_k})"
    table = Table("held-out text", "bits per byte", "", box=None, pad_edge=False, header_style="dim")
    table.add_row(
        f"[bold]{kind}[/bold]",
        f"[bold]{final['bits_per_byte']:.4f}[/bold]",
        f"loss {final['held_out_loss']:.4f}, perplexity {final['perplexity']:,.1f}",
    )
    if moe is not None:
        dense = recorded_dense(run)
        value, note = (
            ("-", "not recorded for these settings") if dense is None else (f"{dense:.4f}", "same tokens; recorded")
        )
        table.add_row("dense, same active size", value, note)
    table.add_row("byte trigram", f"{baselines.trigram:.4f}", "counted on the training text")
    table.add_row("xz -9e", f"{baselines.xz:.4f}", "of the held-out text alone")
    return table


def recorded_dense(run: RunConfig) -> float | None:
    """Held-out bits per byte of the dense twin of a run, recorded once; None for settings nobody recorded."""
    recorded = json.loads((Path(__file__).parent / RECORDED).read_text())["dense_bits_per_byte"]
    value = recorded.get(training_digest(run))
    sparse, dense = count_parameters(run.model), count_parameters(replace(run.model, moe=None))
    # of one active size but for the router, which the dense twin has not
    same_size = sparse.active - sparse.router == dense.active
    return float(value) if value is not None and same_size else None


def _speed_text(steps: list[dict[str, Any]]) -> str:
    def middle(name: str) -> float | None:
        values = [line[name] for line in steps if line.get(name) is not None]
        return statistics.median(values) if values else None

    flops, mfu = middle("flops_per_second"), middle("mfu")
    text = f"{middle('tokens_per_second') or 0:,.0f} tokens/s, {(flops or 0) / 1e9:,.0f} GFLOP/s of model arithmetic"
    return text if mfu is None else f"{text}, MFU {mfu:.1%}"


def _load_text(final: dict[str, Any]) -> str:
    fullest = final["held_out_max_over_mean"]
    worst = max(range(len(fullest)), key=fullest.__getitem__)
    idle = sum(share == 0 for layer in final["held_out_load"] for share in layer)
    rest = "every expert in use" if idle == 0 else f"{idle} experts without a token"
    return f"fullest expert {fullest[worst]:.2f}x the mean (MoE layer {worst}); {rest}"
