"""The verb verify: does a run train the same on every layout?"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli.options import Options, settings
from moetrain.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig
    from moetrain.metrics.console import WorkBar
    from moetrain.verify.layouts import Layout
    from moetrain.verify.shrink import Shrunk
    from moetrain.verify.spec import Result

HELP = {
    "verify": """usage: moetrain verify [key=value …] [layout=NAME,…] [steps=N] [--config-dir DIR] [--dry-run]

Takes the settings of a run, shrinks its sizes, trains it a few steps on CPU processes under several layouts, and holds
each against one process that knows neither ranks nor DeepSpeed: losses, gradient norm, the gradient of every weight and
every expert, weights and moments. Prints a table, and the first tensor that differs. Needs no data and no GPU.

  layout=NAME,…    [ranksN_]epN_zeroN[_accN][_bf16], e.g. ranks4_ep2_zero1_acc2: 4 processes, 2 of which share the
                   experts, ZeRO stage 1, 2 micro-batches; `all`: every combination. Default: your own layout, on at
                   most 4 ranks, and a selection of the rest
  steps=N          optimizer steps to compare, from 1 to 20; default 3
  --dry-run        say what would be compared, start nothing

exit codes: 0 all layouts train the same, 1 one differs, 2 something to mend (said in one message)

examples:
  moetrain verify
  moetrain verify layout=ep2_zero1
  moetrain verify model=mixtral_8x7b layout=ranks4_ep2_zero1,ep4_zero2_acc2
  moetrain verify model.moe.router=sigmoid_bias layout=all steps=5
""",
}
DIFFERS = 1
MOST_STEPS = 20


def verify(words: Sequence[str]) -> int:
    """The verb `verify`."""
    names, steps, rest = _own_words(words)
    options = Options.read(rest, flags=("--dry-run",))
    run, _ = settings(options)
    from moetrain.verify.layouts import chosen
    from moetrain.verify.shrink import shrink

    layouts = chosen(names, run=run)
    shrunk = shrink(run, layouts=layouts, steps=steps)
    _check(shrunk, layouts)
    print(_opening(shrunk, run=run, steps=steps), flush=True)
    if "--dry-run" in options.flags:
        print(f"  {len(layouts)} layouts: {', '.join(each.name for each in layouts)}\na dry run: nothing was started")
        return 0
    results = run_layouts(shrunk.run, layouts=layouts)
    print(_table(results))
    return DIFFERS if any(result.difference for result in results) else 0


def run_layouts(run: RunConfig, *, layouts: Sequence[Layout], module: str | None = None) -> list[Result]:
    """Train the shrunk run on each layout and hold it against one process.

    Args:
        run: from ``shrink``.
        module: what each rank runs, with a directory as its argument; None: ``moetrain.verify.rank``.

    Returns:
        What was found on each, in the order asked for.

    Raises:
        LaunchError: a rank failed; its log stays.
        KeyboardInterrupt: stopped on request.
    """
    from moetrain.metrics.console import WorkBar

    place = Path(tempfile.mkdtemp(prefix="moetrain-verify-"))
    results: list[Result] = []
    in_order = sorted(layouts, key=lambda each: each.ranks)
    with WorkBar("verify", total=len(layouts), unit="layouts") as bar:
        for ranks, some in itertools.groupby(in_order, key=lambda each: each.ranks):
            results += _start(place / f"ranks{ranks}", run, layouts=list(some), module=module, bar=bar,
                              done=len(results))  # fmt: skip
    shutil.rmtree(place, ignore_errors=True)
    by_name = {result.layout: result for result in results}
    return [by_name[layout.name] for layout in layouts]


def _start(
    place: Path, run: RunConfig, *, layouts: list[Layout], module: str | None, bar: WorkBar, done: int
) -> list[Result]:
    """One start of processes, for the layouts of one number of ranks."""
    from moetrain.launch.local import run_local
    from moetrain.verify.spec import read_results, write_spec

    place.mkdir()
    write_spec(place, run=run, layouts=layouts)
    command = [sys.executable, "-m", module or "moetrain.verify.rank", str(place)]

    def show() -> None:
        bar.advance_to(done + len(read_results(place)), note=f"on {layouts[0].ranks} ranks")

    if run_local(place, processes=layouts[0].ranks, command=command, on_cpu=True, on_poll=show).stopped:
        shutil.rmtree(place.parent, ignore_errors=True)
        raise KeyboardInterrupt
    show()
    found = read_results(place)
    if len(found) < len(layouts):
        raise LaunchError(f"only {len(found)} of {len(layouts)} layouts left a result; the logs are in {place}/log")
    return found


def _own_words(words: Sequence[str]) -> tuple[list[str], int, list[str]]:
    """The names of layouts, the number of steps, and the words that are settings of the run."""
    names: list[str] = []
    steps, rest, problems = "3", [], []
    for word in words:
        key, equals, value = word.partition("=")
        if key == "layout" and equals:
            names += [name.strip() for name in value.strip("[]").split(",")]
        elif key == "steps" and equals:
            steps = value
        else:
            rest.append(word)
    if not (steps.isascii() and steps.isdecimal() and 1 <= int(steps) <= MOST_STEPS):
        problems.append(f"steps is {steps!r}, but must be a whole number from 1 to {MOST_STEPS}")
    if problems:
        raise ConfigError(problems)
    return names, int(steps), rest


def _check(shrunk: Shrunk, layouts: Sequence[Layout]) -> None:
    """What the user asked for fits a run of this size; the rules are those of training."""
    from moetrain.config.checks import check, resolve
    from moetrain.config.freeze import flatten, to_dict
    from moetrain.verify.shrink import lay_out

    for layout in layouts:
        laid_out = resolve(lay_out(shrunk.run, layout), default_processes=1)
        check(laid_out, flatten(to_dict(laid_out)))


def _opening(shrunk: Shrunk, *, run: RunConfig, steps: int) -> str:
    """What is compared, and what had to be changed for it."""
    changed = ", ".join(f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in shrunk.changed.items())
    lines = [f"{run.name}, shrunk, {steps} steps against one process: {changed}"]
    lines += [f"  {each.setting} differs between layouts by definition: {each.reason}" for each in shrunk.dependences]
    if shrunk.dependences:
        lines.append("  so each layout is held against one process that divides the batch as it does")
    return "\n".join(lines)


def _short(value: object) -> str:
    if value is None:
        return "null"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(results: Sequence[Result]) -> str:
    """Largest relative errors, a row for each layout, and what differs first."""
    from moetrain.verify.spec import COLUMNS

    width = max(len("layout"), *(len(result.layout) for result in results))
    lines = ["", f"{'layout':<{width}} " + " ".join(f"{column:>6}" for column in COLUMNS) + "  largest relative errors"]
    for result in results:
        cells = [f"{result.errors[column]:.0e}" if column in result.errors else "-" for column in COLUMNS]
        verdict = "DIFFERS" if result.difference else "same"
        lines.append(f"{result.layout:<{width}} " + " ".join(f"{cell:>6}" for cell in cells) + f"  {verdict}")
    lines.append("")
    for result in results:
        first = result.difference
        if first:
            when = f"after step {first.step}" if first.step else "before the first step"
            lines.append(
                f"{result.layout}: the first to differ is the {first.what}, {when}: relative error {first.error:.1e}, "
                f"bound {first.bound:.0e}" + (f"; {first.hint}" if first.hint else "")
            )
    right = sum(result.difference is None for result in results)
    lines.append(f"{right} of {len(results)} layouts train as one process does")
    return "\n".join(lines)
