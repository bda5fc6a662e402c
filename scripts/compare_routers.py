"""Train the tiny model with each router for the same small budget, one after the other, and compare.

    python scripts/compare_routers.py [--steps 200] [--out docs/images/routers.png]

Each router is a run of its own in runs/router-NAME (an interrupted comparison goes on where it was). Prints a table in
Markdown and draws held-out loss over tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from moetrain.metrics.log import read_metrics

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


def row(router: str, metrics: list[dict[str, Any]]) -> str:
    final = next(line for line in metrics if line.get("final"))
    logged = [line for line in metrics if "tokens_per_second" in line]
    late = logged[len(logged) // 2 :]
    fullest = max(median(line["max_over_mean"][layer] for line in late) for layer in range(len(late[0]["load"])))
    dropped = median(sum(line["dropped_share"]) / len(line["dropped_share"]) for line in late)
    rate = median(line["tokens_per_second"] for line in late)
    return (f"| `{router}` | {final['held_out_loss']:.4f} | {final['bits_per_byte']:.4f} | {fullest:.2f} | "
            f"{dropped:.1%} | {rate:,.0f} |")  # fmt: skip


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
    print("\n| router | held-out loss | bits per byte | fullest expert | dropped | tokens/s |")
    print("|---|--:|--:|--:|--:|--:|")
    for router, metrics in results.items():
        print(row(router, metrics))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    draw(results, wanted.out)
    print(f"\n{wanted.out}")


if __name__ == "__main__":
    main()
