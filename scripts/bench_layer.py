"""Time an MoE layer against a dense block of the same active size and against its bare expert matmuls, in one process.

    python scripts/bench_layer.py [--tokens 4096] [--repeats 7]

Contestants take turns, so that a noisy machine is noisy for all; the table has medians and, in brackets, the spread
(third less first quartile). Forward and backward. Compare within one table only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.model.ffn import FeedForward
from moetrain.moe.dispatch import Dispatcher
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.router import TopKRouter

D_MODEL, D_ACTIVE = 256, 1024
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SHAPES = ((8, 2), (64, 2), (64, 8))


def make_layer(*, num_experts: int, top_k: int, dtype: torch.dtype) -> MoELayer:
    experts = Experts(D_MODEL, d_expert=D_ACTIVE // top_k, activation="swiglu", global_ids=range(num_experts))
    router = TopKRouter(D_MODEL, num_experts=num_experts, top_k=top_k, renormalize=True)
    layer = MoELayer(router, experts=experts, dispatcher=Dispatcher(None))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer.to(dtype)


def layer_step(layer: MoELayer, x: Tensor) -> None:
    output = layer(x)
    (output.hidden_TD.float().sum() + output.losses["balance"] + output.losses["z"]).backward()


def dense_step(block: FeedForward, x: Tensor) -> None:
    block(x).float().sum().backward()


def floor_step(experts: Experts, x_RD: Tensor, count_e: Tensor) -> None:
    experts(x_RD, count_e).float().sum().backward()


def measure(contestants: dict[str, Callable[[], None]], *, repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, step in contestants.items():
            since = time.perf_counter()
            step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - since)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    wanted = parser.parse_args()
    print(f"{wanted.tokens} tokens, d_model {D_MODEL}, {D_ACTIVE} hidden units active, forward and backward")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'experts':>8} {'top_k':>5} {'dtype':>6} | {'dense ms':>16} {'floor / dense':>14} {'layer / dense':>14}")
    for dtype in (torch.float32, torch.bfloat16):
        for num_experts, top_k in SHAPES:
            layer = make_layer(num_experts=num_experts, top_k=top_k, dtype=dtype)
            dense = FeedForward(D_MODEL, d_ff=D_ACTIVE, activation="swiglu", bias=False).to(dtype)
            x = torch.randn(wanted.tokens, D_MODEL, dtype=dtype, requires_grad=True)
            routing = layer.router(x)
            rows = layer.dispatcher.dispatch(x, routing).x_RD.detach().requires_grad_()
            found = measure(
                {
                    "dense": lambda dense=dense, x=x: dense_step(dense, x),
                    "floor": lambda e=layer.experts, r=rows, c=routing.count_E: floor_step(e, r, c),
                    "layer": lambda layer=layer, x=x: layer_step(layer, x),
                },
                repeats=wanted.repeats,
            )
            dense_ms = statistics.median(found["dense"]) * 1e3
            quarters = statistics.quantiles(found["dense"], n=4)
            ratio = {name: statistics.median(times) * 1e3 / dense_ms for name, times in found.items()}
            print(f"{num_experts:>8} {top_k:>5} {NAMES[dtype]:>6} | "
                  f"{dense_ms:>8.1f} [{(quarters[2] - quarters[0]) * 1e3:>4.1f}] {ratio['floor']:>14.2f} "
                  f"{ratio['layer']:>14.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
