"""The verb that makes a trained model into another: dense to sparse, more experts, fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli.options import paths_and_settings, warn
from moetrain.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.surgery.operate import Outcome

HELP = {
    "surgery": """usage: moetrain surgery RUN upcycle|grow|prune out=DIR [num_experts=N] [top_k=N] [every=N] [least=X]

Makes the newest whole checkpoint of a run into one of another model, of the same step and with the optimizer's moments,
and tells the held-out loss before and after. moetrain says how to train on.

  upcycle   a dense model becomes sparse, in every nth block (every, 1): num_experts (8) copies of each feed-forward
            block, top_k (2) of which answer. It begins with the loss of the dense model.
  grow      num_experts, a multiple of those there are, all copied. With top_k as many times larger, nothing changes;
            with top_k as it is, the copies part the tokens among themselves, and the loss changes a little.
  prune     num_experts of each block stay, those that the held-out text uses most; without a number, as many as the
            block with the most has alive (above `least`, 0.01, of a fair share).

examples:
  moetrain surgery runs/tiny-dense upcycle out=runs/upcycled num_experts=8
  moetrain surgery runs/tiny grow out=runs/grown num_experts=16
  moetrain surgery runs/tiny prune out=runs/pruned
""",
}
KINDS = ("upcycle", "grow", "prune")
_ONLY = {"every": ("upcycle",), "least": ("prune",), "top_k": ("upcycle", "grow")}
"""Settings that are not for each of them."""


@dataclass(frozen=True, kw_only=True)
class _Surgery:
    out: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    every: int = 1
    least: float = 0.01


def surgery(words: Sequence[str]) -> int:
    """The verb `surgery`."""
    (run_dir, kind), wanted = paths_and_settings(words, _Surgery, paths=["RUN", "upcycle|grow|prune"])
    problems = []
    if str(kind) not in KINDS:
        problems.append(f"'{kind}' is no operation: use one of {', '.join(KINDS)}")
    if not wanted.out:
        problems.append("out is not given, but says where to write: e.g. out=runs/changed")
    if str(kind) == "grow" and wanted.num_experts is None:
        problems.append("num_experts is not given, but grow wants to know how many")
    problems += [f"{name} is 0, but must be at least 1" for name in ("num_experts", "top_k", "every")
                 if getattr(wanted, name) == 0]  # fmt: skip
    problems += [f"{name} is {getattr(wanted, name)}, but does not belong to {kind}: leave it out"
                 for name, kinds in _ONLY.items()
                 if str(kind) not in kinds and getattr(wanted, name) != getattr(_Surgery(), name)]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    _tell(_operate(run_dir, str(kind), wanted))
    return 0


def _operate(run_dir: Path, kind: str, wanted: _Surgery) -> Outcome:
    from moetrain.surgery import operate, plan

    out = Path(str(wanted.out))
    if kind == "upcycle":
        experts = wanted.num_experts or 8
        return operate.operate(
            run_dir, out, warn=warn, steps=lambda _, new: plan.upcycle(new),
            change=lambda model: plan.upcycled(model, num_experts=experts, top_k=wanted.top_k or 2, every=wanted.every),
        )  # fmt: skip
    if kind == "grow":
        more = wanted.num_experts or 0
        return operate.operate(
            run_dir, out, warn=warn, steps=plan.grow,
            change=lambda model: plan.grown(model, num_experts=more, top_k=wanted.top_k),
        )  # fmt: skip
    share_LE = operate.usage(run_dir, warn=warn)
    alive = list(operate.alive(share_LE, least=wanted.least))
    if wanted.num_experts is None and share_LE and max(alive) == len(share_LE[0]):
        raise ConfigError([f"no number is given, and {run_dir} has a block in which every expert gets more than "
                           f"{wanted.least:g} of a fair share: say num_experts, or a larger least"])  # fmt: skip
    fewer = wanted.num_experts or max(alive, default=0)
    keep = operate.most_used(share_LE, num_experts=fewer)
    return operate.operate(
        run_dir, out, warn=warn, steps=lambda old, _: plan.prune(old, keep=keep),
        change=lambda model: plan.pruned(model, num_experts=fewer),
    )  # fmt: skip


def _tell(done: Outcome) -> None:
    from moetrain.plan.flops import count_parameters, format_count

    moe, count = done.run.model.moe, count_parameters(done.run.model)
    sparse = "" if moe is None else f"{moe.num_experts} experts, top-{moe.top_k}, "
    print(f"{done.run_dir}: {sparse}{format_count(count.total)} parameters, {format_count(count.active)} active, "
          f"at step {done.step:,}")  # fmt: skip
    print(f"loss on {done.on}: {done.before.loss:.5f} before, {done.after.loss:.5f} after "
          f"({done.after.loss - done.before.loss:+.1e})")  # fmt: skip
    for layer, share_E in enumerate(done.after.share_LE):
        print(f"  MoE block {layer}: fullest expert {max(share_E) * len(share_E):.2f}x the mean, "
              f"{sum(not share for share in share_E)} idle")  # fmt: skip
    print(f"to go on:  moetrain train --config-dir {done.run_dir}/configs experiment={done.experiment}")
