"""Checkpoints in words: rows of a table, a description, what differs between two."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.checkpoint import store
from moetrain.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from moetrain.archive.values import Difference
    from moetrain.config.schema import RunConfig

PARTS = ("dense", "router", "experts")
_KINDS = {"fp32": "weights", "exp_avg": "first moments", "exp_avg_sq": "second moments", "state": "state"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint of a run, as far as its manifest can be read."""

    path: str
    step: int
    bytes: int
    problem: str
    """Why it is damaged; empty when it is whole."""
    written: float | None = None
    """Seconds since 1970."""
    tokens: int | None = None
    world_size: int | None = None
    expert_parallel: int | None = None
    zero_stage: int | None = None
    has_moments: bool = True


def entry(directory: Path, *, digests: bool) -> Entry:
    """Look at a checkpoint; the files' sizes alone, unless ``digests``."""
    step, size = store.step_of(directory), size_of(directory)
    try:
        manifest = store.read_manifest(directory)
    except CheckpointError as error:
        return Entry(path=str(directory), step=step, bytes=size, problem=str(error))
    problem = ""
    try:
        store.check_name(directory, manifest)
        for each in manifest.files:
            store.check_file(directory, each, digest=digests)
    except CheckpointError as error:
        problem = str(error)
    return Entry(
        path=str(directory),
        step=step,
        bytes=size,
        problem=problem,
        written=(directory / store.MANIFEST).stat().st_mtime,
        tokens=manifest.tokens,
        world_size=manifest.world_size,
        expert_parallel=manifest.expert_parallel,
        zero_stage=_section(manifest.run, "parallel").get("zero_stage"),
        has_moments=manifest.has_moments,
    )


def lines(rows: Sequence[Entry], losses: Mapping[int, float]) -> list[str]:
    """The table of ``ls``."""
    heads = ["step", "tokens", "size", "age", "ranks", "EP", "ZeRO", "held-out loss", "state"]
    cells = [
        [
            f"{row.step:,}",
            _number(row.tokens),
            in_bytes(row.bytes),
            "?" if row.written is None else age(time.time() - row.written),
            _number(row.world_size),
            _number(row.expert_parallel),
            _number(row.zero_stage),
            f"{losses[row.step]:.4f}" if row.step in losses else "-",
            (f"DAMAGED: {row.problem}" if row.problem else "whole") + ("" if row.has_moments else ", weights alone"),
        ]
        for row in rows
    ]
    return table(heads, cells, left={8})


def held_out_losses(run_dir: Path) -> tuple[dict[int, float], str]:
    """Step -> held-out loss, and why there are none if the file cannot be read. The last line of a step counts."""
    from moetrain.metrics.log import read_metrics

    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}, ""
    try:
        found = {line["step"]: line.get("held_out_loss") for line in read_metrics(path) if "held_out_loss" in line}
    except DataError as error:
        return {}, str(error)
    return {step: loss for step, loss in found.items() if isinstance(loss, int | float)}, ""


def settings(manifest: store.Manifest) -> RunConfig:
    """The settings of the run that wrote a checkpoint.

    Raises:
        CheckpointError: this version cannot read them.
    """
    from moetrain.config.freeze import freeze

    try:
        return freeze(manifest.run)
    except ConfigError as error:
        raise CheckpointError(f"the settings in the manifest of step {manifest.step} cannot be read: {error}") from None


def parameters(run: RunConfig) -> dict[str, int]:
    """Parameters of the model, in total and part by part."""
    from moetrain.plan.flops import count_parameters

    count = count_parameters(run.model)
    parts = (count.non_expert - count.router, count.router, count.experts)
    return {"total": count.total} | dict(zip(PARTS, parts, strict=True))


def description(directory: Path, manifest: store.Manifest, run: RunConfig) -> Iterator[str]:
    """The text of ``show``."""
    from moetrain.plan.flops import format_count

    model, batch, schedule, parts = run.model, run.batch, run.schedule, parameters(run)
    moe = model.moe
    written = (directory / store.MANIFEST).stat().st_mtime
    sparse = f"{moe.num_experts} experts, top-{moe.top_k}, router {moe.router}" if moe else "dense"
    length = f"{schedule.tokens:,} tokens" if schedule.tokens is not None else f"{schedule.steps} steps"
    parts_text = " + ".join(f"{format_count(parts[name])} {name}" for name in PARTS)
    yield str(directory)
    yield f"  step        {manifest.step:,}, after {manifest.tokens:,} tokens"
    yield f"  written     {time.strftime('%Y-%m-%d %H:%M', time.localtime(written))}, {age(time.time() - written)} ago"
    yield (f"  layout      ranks {manifest.world_size}, expert parallel {manifest.expert_parallel}, "
           f"ZeRO-{run.parallel.zero_stage}; any other can go on from it")  # fmt: skip
    yield f"  run         {run.name}, seed {manifest.seed}"
    yield f"  model       {model.num_layers} blocks, width {model.d_model}, {sparse}, {model.dtype}"
    yield f"  batch       {batch.global_batch} sequences of {run.sequence_length} tokens"
    yield f"  schedule    {schedule.kind}, lr {run.optim.lr:g}, {length}"
    yield f"  parameters  {format_count(parts['total'])} = {parts_text}"
    yield f"  holds       fp32 weights{' and both Adam moments' if manifest.has_moments else ' alone'}"
    for name, digest in manifest.data.items():
        yield f"  data        {name} {digest[:12]}"
    yield f"  files       {len(manifest.files)}, {sum(each.size for each in manifest.files):,} bytes"
    for each in manifest.files:
        yield f"    {each.size:>16,}  {each.name}  {each.xxh128[:12]}"


def changed_settings(one: store.Manifest, two: store.Manifest) -> dict[str, tuple[Any, Any]]:
    """What the manifests say differently, files aside: name -> (first, second)."""
    from moetrain.config.freeze import flatten

    facts = [
        {"step": each.step, "tokens": each.tokens, "seed": each.seed, "ranks": each.world_size,
         "expert parallel": each.expert_parallel} | {f"data {name}": value for name, value in each.data.items()}
        | flatten(each.run)
        for each in (one, two)
    ]  # fmt: skip
    names = list(dict.fromkeys([*facts[0], *facts[1]]))
    return {
        name: (facts[0].get(name), facts[1].get(name)) for name in names if facts[0].get(name) != facts[1].get(name)
    }


def difference_lines(differences: Iterable[Difference]) -> Iterator[str]:
    """The table of ``diff``, by part and kind, and the tensors that could not be compared."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    problems: dict[str, list[str]] = {}
    for each in differences:
        if each.problem:
            problems.setdefault(each.problem, []).append(each.name)
        else:
            parameter, _, kind = each.name.rpartition("/")
            groups.setdefault((_part(parameter), _KINDS.get(kind, kind)), []).append(each)
    for problem, names in problems.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{problem}: {', '.join(names[:3])}{more}"
    heads = ["part", "kind", "tensors", "differ", "max abs", "relative", "most in"]
    rows = []
    for (part, kind), members in sorted(groups.items()):
        changed = [each for each in members if not each.equal]
        # NaN is the largest difference there is
        most = max(changed, key=lambda each: (math.isnan(each.largest), each.largest), default=None)
        worst = ["bit-equal", "", ""] if most is None else [f"{most.largest:.3g}", f"{most.relative:.3g}", most.name]
        rows.append([part, kind, str(len(members)), str(len(changed)), *worst])
    yield from table(heads, rows, left={0, 1, 6})
    yield "max abs: largest difference of two values; relative: over the largest value of that tensor in the first"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: set[int]) -> list[str]:
    """Aligned columns; those in ``left`` begin at the left."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory; one that goes away meanwhile counts for nothing."""
    total = 0
    for path in directory.iterdir() if directory.is_dir() else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def in_bytes(count: int) -> str:
    """12_345_678 -> "12.3 MB"."""
    from moetrain.plan.flops import format_count

    return f"{count} B" if count < 1000 else f"{format_count(count)}B".replace("BB", "GB")


def age(seconds: float) -> str:
    """A span of time in its largest unit: "3 min"."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def finite(value: Any) -> Any:
    """For JSON, which has no words for NaN and the infinities: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def _part(parameter: str) -> str:
    return next((part for part in ("router", "experts") if f".{part}." in parameter), "dense")


def _section(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = run.get(name)
    return section if isinstance(section, dict) else {}


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
