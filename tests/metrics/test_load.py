from __future__ import annotations

import math
import statistics
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moetrain.metrics.load import LoadMeter, LoadReport

NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 4, 2


def micro_batch(seed: int, tokens: int) -> list[dict[str, Any]]:
    """One micro-batch as plain Python: for each layer the chosen experts and probabilities of every token."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(NUM_LAYERS):
        prob = torch.rand(tokens, NUM_EXPERTS, generator=generator).softmax(-1)
        chosen = prob.topk(TOP_K).indices.tolist()
        layers.append(
            {
                "chosen": chosen,
                "prob": prob.tolist(),
                "dropped": seed % 3,
                "balance": 1.0 + 0.25 * seed,
                "z": 3.0 - 0.5 * seed,
            }
        )
    return layers


def add(meter: LoadMeter, batch: list[dict[str, Any]]) -> None:
    for layer, seen in enumerate(batch):
        prob = torch.tensor(seen["prob"])
        meter.add(
            layer,
            torch.tensor(seen["chosen"]).flatten().bincount(minlength=NUM_EXPERTS),
            dropped=torch.tensor(seen["dropped"]),
            entropy_sum=-(prob * prob.log()).sum(),
            tokens=len(seen["chosen"]),
            balance=torch.tensor(seen["balance"], requires_grad=True),
            z=torch.tensor(seen["z"]),
        )


def expected_report(batches: list[list[dict[str, Any]]]) -> LoadReport:
    """The same numbers, token by token."""
    fields: dict[str, list[Any]] = {name: [] for name in LoadReport.__dataclass_fields__}
    for layer in range(NUM_LAYERS):
        seen = [batch[layer] for batch in batches]
        copies = [expert for s in seen for token in s["chosen"] for expert in token]
        share = [copies.count(expert) / len(copies) for expert in range(NUM_EXPERTS)]
        entropies = [-sum(p * math.log(p) for p in token) for s in seen for token in s["prob"]]
        per_token = [(s["balance"], s["z"]) for s in seen for _ in s["chosen"]]
        fields["share"].append(share)
        fields["dead"].append([expert for expert in range(NUM_EXPERTS) if expert not in copies])
        fields["max_over_mean"].append(max(share) / statistics.fmean(share))
        fields["cv"].append(statistics.pstdev(share) / statistics.fmean(share))
        fields["entropy"].append(statistics.fmean(entropies))
        fields["dropped_share"].append(sum(s["dropped"] for s in seen) / len(copies))
        fields["balance_loss"].append(statistics.fmean(balance for balance, _ in per_token))
        fields["z_loss"].append(statistics.fmean(z for _, z in per_token))
    return LoadReport(**fields)


def assert_same(report: LoadReport, expected: LoadReport) -> None:
    for name in LoadReport.__dataclass_fields__:
        got, want = torch.tensor(getattr(report, name)), torch.tensor(getattr(expected, name))
        torch.testing.assert_close(got, want, msg=name)


def test_the_report_is_what_a_loop_over_the_tokens_gives() -> None:
    meter = LoadMeter(NUM_LAYERS, NUM_EXPERTS, "cpu")
    batches = [micro_batch(seed, tokens) for seed, tokens in ((1, 7), (2, 30))]
    for batch in batches:
        add(meter, batch)
    assert_same(meter.read(), expected_report(batches))


def test_a_report_starts_afresh() -> None:
    meter = LoadMeter(NUM_LAYERS, NUM_EXPERTS, "cpu")
    add(meter, micro_batch(1, 7))
    meter.read()
    add(meter, micro_batch(2, 9))
    assert_same(meter.read(), expected_report([micro_batch(2, 9)]))


def test_a_fair_and_a_collapsed_layer_have_the_values_of_the_textbook() -> None:
    meter = LoadMeter(2, 8, "cpu")
    for layer, count_E, entropy in ((0, torch.full((8,), 2), math.log(8)), (1, torch.tensor([16] + [0] * 7), 0.0)):
        meter.add(layer, count_E, dropped=0, entropy_sum=16 * entropy, tokens=16, balance=1.0, z=0.0)
    report = meter.read()
    assert report.max_over_mean == [1.0, 8.0]
    assert report.cv == pytest.approx([0.0, math.sqrt(7)])
    assert report.entropy == pytest.approx([math.log(8), 0.0])


def test_an_expert_is_dead_after_its_steps_without_a_token_and_lives_again_with_one() -> None:
    meter = LoadMeter(1, 3, "cpu", dead_after=20)
    seen = []
    for steps, counts in ((10, [4, 0, 0]), (5, [4, 0, 1]), (5, [4, 0, 0]), (15, [4, 0, 0]), (1, [0, 1, 3])):
        meter.add(0, torch.tensor(counts), dropped=0, entropy_sum=0.0, tokens=4, balance=1.0, z=0.0)
        seen.append(meter.read(steps=steps).dead[0])
    # the second after 10 + 5 + 5 steps; the third had one at step 15, and 5 + 15 after it
    assert seen == [[], [], [1], [1, 2], []]


def test_a_layer_without_tokens_has_no_ratios() -> None:
    report = LoadMeter(1, 2, "cpu").read()
    assert all(math.isnan(value) for value in [*report.share[0], *report.max_over_mean, *report.cv, *report.entropy])


def test_adding_never_waits_for_the_device() -> None:
    # Tensors on "meta" have no values, so whatever would ask the device for one raises.
    meter = LoadMeter(1, 4, "meta")
    scalar = torch.zeros((), device="meta")
    count = torch.zeros(4, dtype=torch.int64, device="meta")
    meter.add(0, count, dropped=count.sum(), entropy_sum=scalar, tokens=3, balance=scalar, z=scalar)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read()


def _report_of_both_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    meter = LoadMeter(NUM_LAYERS, NUM_EXPERTS, "cpu")
    add(meter, micro_batch(rank + 1, 5 + 20 * rank))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        report = meter.read()
    assert_same(report, expected_report([micro_batch(1, 5), micro_batch(2, 25)]))
    assert all_reduce.call_count == 1
    dist.destroy_process_group()


def test_two_ranks_report_the_load_of_both(tmp_path: Path) -> None:
    context = mp.spawn(_report_of_both_ranks, args=(str(tmp_path),), nprocs=2, join=False)
    try:
        assert context.join(timeout=60) or context.join(timeout=10)
    finally:
        for process in context.processes:
            process.kill()
