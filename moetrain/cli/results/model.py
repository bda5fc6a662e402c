"""The verbs around a trained model: sample."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moetrain.cli.options import number
from moetrain.errors import ConfigError

HELP = {
    "sample": """usage: moetrain sample [run_dir=DIR] [prompt=TEXT] [max_tokens=N] [temperature=X] [top_k=N] [seed=N]

Writes on from a prompt with the newest whole checkpoint of a run.

examples:
  moetrain sample
  moetrain sample run_dir=runs/tiny prompt="The state of the Union is" temperature=0.7 seed=3
""",
}
_LARGEST = 1 << 62


def sample(words: Sequence[str]) -> int:
    """The verb `sample`."""
    from moetrain.config.freeze import freeze_section
    from moetrain.config.schema import SampleConfig

    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError([f"'{word}' is not a setting: write key=value, e.g. prompt=\"My fellow citizens\""])
        given[key] = value if key in ("prompt", "run_dir") else number(value)
    wanted = freeze_section(SampleConfig, given)
    rules = (("max_tokens", wanted.max_tokens, 1), ("temperature", wanted.temperature, 0), ("top_k", wanted.top_k, 0),
             ("seed", wanted.seed, 0))  # fmt: skip
    problems = [f"{name} is {value}, but must be from {least} to {_LARGEST:.0e}"
                for name, value, least in rules if not least <= value <= _LARGEST]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    pieces = write(**asdict(wanted) | {"run_dir": Path(wanted.run_dir)})
    print(wanted.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def write(**wanted: Any) -> Any:
    """Pieces of text that a run's model writes; ``wanted`` as in ``SampleConfig``, what is left out has its default."""
    from moetrain.config.schema import SampleConfig
    from moetrain.data.corpus import TOKENIZER
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.hub.generate import generate, load_model

    defaults = asdict(SampleConfig())
    wanted = defaults | wanted
    run_dir = wanted.pop("run_dir")
    run, gpt = load_model(run_dir, warn=lambda message: print(f"warning: {message}", file=sys.stderr))
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    # positions past the trained length were never seen
    context = min(run.model.context, run.batch.sequence_length or run.model.context)
    return generate(gpt, tokenizer, context=context, **wanted)
