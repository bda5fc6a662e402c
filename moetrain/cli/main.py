"""`moetrain VERB key=value …`. Each verb imports only the rooms it needs: help and checks start at once."""

from __future__ import annotations

import errno
import importlib
import io
import keyword
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moetrain import __version__
from moetrain.errors import MoetrainError


class Verb(NamedTuple):
    """Where a verb lives: a function of that name in ``moetrain.cli.MODULE``, its help in the module's ``HELP``."""

    module: str
    about: str
    presets: bool = False
    """Whether its help lists the presets."""

    def load(self, name: str) -> tuple[Callable[[Sequence[str]], int], str]:
        """The function, and its help."""
        module = importlib.import_module(f"moetrain.cli.{self.module}")
        # "import" is no name of a function
        return getattr(module, f"{name}_" if keyword.iskeyword(name) else name), module.HELP[name]


VERBS = {
    "train": Verb("running.train", "train a model, or go on with a run that was interrupted", presets=True),
    "status": Verb("running.launch", "the runs that are there, and how far they are"),
    "logs": Verb("running.launch", "what a run prints"),
    "cancel": Verb("running.launch", "ask a run to save and stop"),
    "prepare": Verb("before.data", "text to token files (train does it by itself)", presets=True),
    "config": Verb("running.train", "show every setting of a run, and where each comes from", presets=True),
    "plan": Verb("before.plan", "which layouts fit a cluster, how long a run takes, what it costs", presets=True),
    "data": Verb("before.data", "show what a step reads"),
    "export": Verb("results.hub", "write a trained model for transformers"),
    "import": Verb("results.hub", "bring a model of transformers here, to train on"),
    "evaluate": Verb("results.evaluate", "held-out loss and experts by source, tasks of the harness"),
    "surgery": Verb("results.surgery", "a dense model to a sparse one, more experts, fewer"),
    "sample": Verb("results.model", "let a trained model write"),
    "preflight": Verb("running.preflight", "are the nodes fit for the run? go or no-go before the hours burn"),
    "verify": Verb("before.verify", "does the run train the same on every layout? (small, on CPU)"),
    "checkpoint": Verb("results.checkpoint", "list, examine, compare and remove what was saved"),
    "sweep": Verb("running.sweep", "many runs, one answer: a grid at equal compute, scaling laws"),
    "report": Verb("results.report", "one HTML page of a run or a sweep, with its pictures"),
    "bench": Verb("before.bench", "time the MoE layer or a training step, against others'"),
}

EXAMPLES = """\
examples:
  moetrain train                                          8 experts, top-2, on two processes
  moetrain train model.moe.num_experts=16 name=wide       another run, in runs/wide
  moetrain train model=mixtral_8x7b --dry-run             check the settings, start nothing
  moetrain sample prompt="My fellow citizens"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader of our output left, as `moetrain config | head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MoetrainError as error:
        print(f"moetrain: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"moetrain: the disk is full ({error.filename or 'a file of the run'}): make room", file=sys.stderr)
            return 2
        if error.filename is None:
            raise
        print(f"moetrain: {error.filename}: {error.strerror}: choose another place, or mend it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moetrain: interrupted", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int:
    if words and words[0] in ("--version", "version"):
        print(f"moetrain {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, rest = words[0], words[1:]
    if name not in VERBS:
        print(f"moetrain: there is no verb '{name}': use {', '.join(VERBS)}; see moetrain --help", file=sys.stderr)
        return 2
    action, help_text = VERBS[name].load(name)
    if "-h" in rest or "--help" in rest:
        print(help_text + (_preset_help(name) if VERBS[name].presets else ""))
        return 0
    return action(rest)


def _help() -> str:
    verbs = "\n".join(f"  {name:<11}{verb.about}" for name, verb in VERBS.items())
    return (
        "moetrain: pretraining of sparse mixture-of-experts language models\n\n"
        f"usage: moetrain VERB [key=value …] [--help]\n\n{verbs}\n\n{EXAMPLES}"
    )


def _preset_help(verb: str) -> str:
    from moetrain.compose import presets

    lines = []
    groups = [
        ("model", "models"),
        ("model/moe", "sparse blocks"),
        ("launch", "launchers"),
        ("experiment", "experiments"),
    ]
    if verb == "plan":
        groups.append(("cluster", "clusters"))
    for group, what in groups:
        lines += [f"\n{what} ({group}=NAME):"]
        lines += [f"  {name:<18} {title}" for name, title in presets(group).items()]
    return "\n".join(lines)
