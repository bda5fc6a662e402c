"""The verb bench: the MoE layer and a training step against their peers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.bench.settings import AnySettings

HELP = {
    "bench": """usage: moetrain bench layer|step|checkpoint [key=value …] [--json FILE] [--dry-run]

Times our MoE layer, or a whole training step with it, against a dense block of the same active size, the bare expert
matmuls (floor), Mixtral of `transformers` and DeepSpeed's MoE, each if it is installed. All take turns in one process:
compare within one table only. Times are medians, in brackets the third less the first quartile; memory is the peak
above what was held before. Values may be lists.

  layer       tokens=4096 d_model=256 d_ff=1024 experts=8,64 top_k=2,8 routing=balanced,skewed
  step        batch=8 sequence=256 d_model=256 d_ff=1024 layers=4 heads=4 vocab=4096 experts=8,64 top_k=2
  both        dtype=fp32,bf16 contestants=NAMES repeats=5 device=auto|cpu|cuda
  checkpoint  parameters=50000000 repeats=5 directory=DIR
              a save and a load against the bare disk and memory, torch.save and DeepSpeed

  d_ff is the width active per token: that of the dense block; an expert has d_ff / top_k
  --json FILE   the same numbers for programs
  --dry-run     say what would be timed and who is not installed; start nothing

examples:
  moetrain bench layer
  moetrain bench layer tokens=8192 repeats=7 dtype=bf16 experts=8 top_k=2 routing=skewed
  moetrain bench layer contestants=floor,moetrain experts=64 top_k=8 --json layer.json
  moetrain bench step experts=8
  moetrain bench checkpoint parameters=20000000
""",
}


def bench(words: Sequence[str]) -> int:
    """The verb `bench`."""
    settings, flags = _read(words)
    json_file = flags.get("--json")
    if "--dry-run" in flags:
        from moetrain.bench.settings import plan_text

        print(f"{plan_text(settings)}\na dry run: nothing was started")
        return 0
    # read when torch is loaded: its CPU allocator warns of frees that do not matter here (``bench.timing.observe``)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from moetrain.bench import checkpoint, run
    from moetrain.bench.settings import CheckpointSettings
    from moetrain.bench.timing import text, write_json

    report: Any
    if isinstance(settings, CheckpointSettings):
        report = checkpoint.measure(settings)
        print(checkpoint.table(report))
    else:
        report = run.run(settings)
        print(text(report))
    if json_file is not None:
        write_json(report, json_file)
    return 0


def _read(words: Sequence[str]) -> tuple[AnySettings, dict[str, Path]]:
    """The settings, and the flags with the files they name."""
    from moetrain.bench.settings import CheckpointSettings, LayerSettings, StepSettings, read

    kind, rest = (words[0] if words else ""), list(words[1:])
    problems: list[str] = []
    flags: dict[str, Path] = {}
    overrides: list[str] = []
    if kind not in ("layer", "step", "checkpoint"):
        problems.append(f"'{kind}' is no benchmark: write `moetrain bench layer`, `step` or `checkpoint`")
    while rest:
        word = rest.pop(0)
        if word == "--dry-run":
            flags[word] = Path()
        elif word == "--json" or word.startswith("--json="):
            name = word.partition("=")[2] or (rest.pop(0) if rest else "")
            flags["--json"] = Path(name)
            if not name or Path(name).is_dir() or not Path(name).absolute().parent.is_dir():
                problems.append(f"--json is '{name}', but must be a file in a directory that is there")
        elif word.startswith("-"):
            problems.append(f"{word} is not an option: see --help")
        else:
            overrides.append(word)
    settings: AnySettings | None = None
    try:
        if kind == "layer":
            settings = read(LayerSettings, overrides)
        elif kind == "step":
            settings = read(StepSettings, overrides)
        elif kind == "checkpoint":
            settings = read(CheckpointSettings, overrides)
    except ConfigError as error:
        problems += error.problems
    if problems or settings is None:
        raise ConfigError(problems)
    return settings, flags
