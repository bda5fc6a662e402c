"""Train the tiny model with each router for the same small budget, one after the other, and compare.

    python scripts/compare_routers.py [--steps 200] [--out docs/images/routers.png]

Each router is a run of its own in runs/router-NAME (an interrupted comparison goes on where it was). Prints a table in
Markdown and draws held-out loss over tokens; the time of a step is measured by itself, all routers in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moetrain.bench.timing import Contestant, measure
from moetrain.compose import compose
from moetrain.config.freeze import freeze
from moetrain.config.routers import loss_weights
from moetrain.metrics.log import read_metrics
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective

ROUTERS = {
    "top_k": [],
    "switch": ["model.moe.top_k=1", "model.moe.d_expert=512"],
    "gshard": [],
    "noisy_top_k": [],
    "expert_choice": ["model.moe.allow_noncausal=true"],
    "sinkhorn": ["model.moe.allow_noncausal=true"],
    "hash": ["model.moe.top_k=1", "model.moe.d_expert=512"],
    "sigmoid_bias": [],
    "dense": ["model.moe.top_k=8", "model.moe.d_expert=64"],
}
"""Settings that keep the active size of each equal to that of top-2 of 8 experts of width 256."""


def train(router: str, own: list[str], *, steps: int) -> list[dict[str, Any]]:
    name = f"router-{router}"
    line = [sys.executable, "-m", "moetrain.cli", "train", f"name={name}", f"model.moe.router={router}", *own,
            f"schedule.steps={steps}", f"schedule.warmup_steps={steps // 10}", "checkpoint.every_steps=null",
            f"evaluate.every_steps={max(1, steps // 5)}", "log.wandb=off"]  # fmt: skip
    print(f"{router}: {' '.join(line[4:])}", flush=True)
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(Path("runs") / name / "metrics.jsonl")


def step_times(routers: dict[str, list[str]], *, repeats: int = 9) -> dict[str, float]:
    """Forward and backward of a step with each router, over that with the first one; in turns, in one process."""
    contestants = [contestant(router, own) for router, own in routers.items()]
    found = measure(contestants, repeats=repeats, device=torch.device("cpu"))
    medians = {name: median(each.seconds) for name, each in found.items()}
    return {name: seconds / medians[contestants[0].name] for name, seconds in medians.items()}


def contestant(router: str, own: list[str]) -> Contestant:
    run = freeze(compose([f"model.moe.router={router}", *own]).settings)
    model = run.model
    gpt = build_model(model, expert_V=torch.arange(model.vocab_size) % model.moe.num_experts)
    initialize(gpt, init_std=model.init_std, seed=run.seed)
    objective = Objective(gpt, loss_weights=loss_weights(model.moe))
    token_BS = torch.randint(model.vocab_size, (8, model.context + 1), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(token_BS=token_BS[:, :-1].contiguous(), target_BS=token_BS[:, 1:].contiguous())
    return Contestant(
        name=router,
        run=lambda: objective(batch).total.backward(),
        clear=lambda: gpt.zero_grad(set_to_none=True),
    )


def row(router: str, metrics: list[dict[str, Any]], *, step_time: float) -> str:
    final = next(line for line in metrics if line.get("final"))
    logged = [line for line in metrics if "tokens_per_second" in line]
    late = logged[len(logged) // 2 :]
    fullest = max(median(line["max_over_mean"][layer] for line in late) for layer in range(len(late[0]["load"])))
    dropped = median(sum(line["dropped_share"]) / len(line["dropped_share"]) for line in late)
    return (f"| `{router}` | {final['held_out_loss']:.4f} | {final['bits_per_byte']:.4f} | {fullest:.2f} | "
            f"{dropped:.1%} | {step_time:.2f} |")  # fmt: skip


def draw(results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for router, metrics in results.items():
        held_out = [line for line in metrics if "held_out_loss" in line]
        axes.plot([line["tokens"] / 1e6 for line in held_out], [line["held_out_loss"] for line in held_out],
                  marker="o", markersize=3, label=router)  # fmt: skip
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(color="0.9")
    axes.legend(ncols=2, frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/images/routers.png"))
    wanted = parser.parse_args()
    results = {router: train(router, own, steps=wanted.steps) for router, own in ROUTERS.items()}
    times = step_times(ROUTERS)
    print("\n| router | held-out loss | bits per byte | fullest expert | not sent | step / top_k's |")
    print("|---|--:|--:|--:|--:|--:|")
    for router, metrics in sorted(results.items(), key=lambda each: each[1][-1]["held_out_loss"]):
        print(row(router, metrics, step_time=times[router]))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    draw(results, wanted.out)
    print(f"\n{wanted.out}")


if __name__ == "__main__":
    main()
