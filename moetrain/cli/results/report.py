"""The verb report: one HTML page of a run or a sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.cli.options import Options
from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig
    from moetrain.page.charts import Section
    from moetrain.page.run import Facts

HELP = {
    "report": """usage: moetrain report DIR [cluster=NAME] [--sample] [--experts] [--no-files]

Writes DIR/report.html, one page that needs no network, and its pictures as PNG and SVG in DIR/report. DIR is the
directory of a run or of a sweep. Needs the extra "report": pip install "moetrain[report]".

  cluster=NAME        the plan for this cluster beside the throughput of a run
  --sample            let the model of a run write a few lines (reads its newest checkpoint)
  --experts           count what the experts of a run have made their own, by source and by token, with its newest
                      checkpoint on evaluate.max_sequences of each source's held-out text; without it, the page shows
                      what `moetrain evaluate RUN` has counted last
  --no-files          the page alone

examples:
  moetrain report runs/tiny
  moetrain report runs/tiny cluster=cpu --sample --experts
  moetrain report sweeps/expert_count
""",
}
PAGE, PICTURES = "report.html", "report"


def report(words: Sequence[str]) -> int:
    """The verb `report`."""
    options = Options.read(words, flags=("--sample", "--experts", "--no-files"))
    places = [word for word in options.overrides if "=" not in word]
    given = dict(word.split("=", 1) for word in options.overrides if "=" in word)
    problems = [f"'{key}' is not a setting of report: use cluster" for key in given if key != "cluster"]
    if len(places) != 1:
        problems.append("report takes one directory: moetrain report runs/NAME")
    if problems:
        raise ConfigError(problems)
    directory = Path(places[0])
    is_sweep = (directory / "sweep.json").is_file()
    if is_sweep and (given or options.flags & {"--sample", "--experts"}):
        raise ConfigError(
            ["cluster=…, --sample and --experts are for the report of a run: leave them out, or name a run"]
        )
    from moetrain.page.charts import charts_of
    from moetrain.page.html import write_page
    from moetrain.page.static import draw_all

    if is_sweep:
        sections, subtitle = _of_sweep(directory)
    else:
        sections, subtitle = _of_run(directory, given.get("cluster"), options)
    name = directory.resolve().name
    write_page(directory / PAGE, title=name, subtitle=subtitle, sections=sections)
    print(f"page        {directory / PAGE}")
    if "--no-files" not in options.flags:
        drawn = draw_all(charts_of(sections), directory / PICTURES, title=name)
        print(f"pictures    {directory / PICTURES}: {', '.join(path.name for path in drawn if path.suffix == '.png')}")
    for section in sections:
        if section.title == "Answer" and section.text:
            print(f"answer      {section.text}")
    return 0


def _of_sweep(directory: Path) -> tuple[list[Section], str]:
    from moetrain.page.sweep import sweep_sections
    from moetrain.sweep.state import Sweep

    sweep = Sweep.read(directory)
    seeds = len({run.seed for run in sweep.runs})
    return sweep_sections(sweep), f"a sweep: {len(sweep.points)} points, {seeds} seeds, {len(sweep.runs)} runs"


def _of_run(directory: Path, cluster: str | None, options: Options) -> tuple[list[Section], str]:
    from moetrain.config.freeze import read_run
    from moetrain.metrics.log import read_metrics
    from moetrain.page.run import run_sections

    run = read_run(directory)
    lines = read_metrics(directory / "metrics.jsonl")
    facts = _facts(directory, run, lines, cluster=cluster, options=options)
    state = "finished" if any(line.get("final") for line in lines) else "not finished"
    return run_sections(lines, facts), f"a run, {state}"


def _facts(
    directory: Path, run: RunConfig, lines: Sequence[dict[str, Any]], *, cluster: str | None, options: Options
) -> Facts:
    from moetrain.checkpoint import store
    from moetrain.config.identity import differences
    from moetrain.page.experts import read_experts
    from moetrain.page.run import Facts, read_incidents

    if "--experts" in options.flags and run.model.moe is not None:
        from moetrain.cli.results.evaluate import store_experts

        store_experts(directory, max_sequences=run.evaluate.max_sequences)
    preset, base = _preset(directory, run, options)
    checkpoints = []
    losses = store.held_out_losses(whole := store.whole_checkpoints(directory / "checkpoints"))
    for each in whole:
        size = sum(path.stat().st_size for path in each.iterdir() if path.is_file())
        loss = losses.get(store.step_of(each))
        checkpoints.append((each.name, "" if loss is None else f"{loss:.4f}", f"{size / 1e6:,.1f} MB"))
    own = ("name", "run_dir", "data.prepared")
    found = {} if base is None else {name: both for name, both in differences(base, run).items() if name not in own}
    return Facts(
        run=run,
        differences=found,
        preset=preset,
        checkpoints=checkpoints,
        incidents=read_incidents(directory),
        sample=_sample(directory, run) if "--sample" in options.flags else None,
        experts=read_experts(directory),
        planned=None if cluster is None else (cluster, _planned(run, lines, cluster, options)),
    )


def _preset(directory: Path, run: RunConfig, options: Options) -> tuple[str, RunConfig | None]:
    """What the run was made from: the presets that its command line chose, without the single values."""
    from moetrain.compose import GROUPS, compose
    from moetrain.config.checks import resolve
    from moetrain.config.freeze import freeze
    from moetrain.config.identity import ORIGIN_FILE

    try:
        command = json.loads((directory / ORIGIN_FILE).read_text(encoding="utf-8"))["starts"][-1]["command"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        command = []
    chosen = [word for word in map(str, command) if word.partition("=")[0] in GROUPS]
    try:
        base = freeze(compose(chosen, config_dir=options.config_dir).settings)
    except ConfigError:
        return "", None  # a preset of the user's own that is not here
    return " ".join(chosen) or "the defaults of train", resolve(base, default_processes=run.launch.processes or 1)


def _planned(run: RunConfig, lines: Sequence[dict[str, Any]], name: str, options: Options) -> float:
    from moetrain.cli.options import named_cluster
    from moetrain.plan.published import own_run

    cluster, efficiency = named_cluster(name, config_dir=options.config_dir)
    own = own_run(run, lines, cluster=name)
    return own.predicted(cluster, efficiency=efficiency) * own.layout.gpus


def _sample(directory: Path, run: RunConfig) -> tuple[str, str]:
    from moetrain.cli.results.model import write
    from moetrain.config.schema import SampleConfig

    opening = "My fellow citizens"
    _, pieces = write(SampleConfig(run_dir=str(directory), prompt=[opening]))
    return opening, "".join(piece.text for piece in pieces).strip()
