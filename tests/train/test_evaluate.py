"""Held-out loss and load against a plain loop over the text, window by window, without any padding."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.loader import HeldOutText, held_out_batches
from moetrain.data.packing import Packing
from moetrain.metrics.load import LoadMeter
from moetrain.model.build import build_model, initialize
from moetrain.parallel import groups as process_groups
from moetrain.parallel.seeds import derive_seed
from moetrain.parallel.topology import Topology
from moetrain.train.evaluate import HeldOutShare, certify, evaluate, probe_batches
from moetrain.train.loop import step_seed

MODEL = ModelConfig(vocab_size=50, context=8, d_model=16, num_layers=2, num_heads=2, d_ff=32,
                    moe=MoEConfig(num_experts=4, d_expert=16))  # fmt: skip
LENGTH = 8
# 13 whole windows: 2 ranks x 3 rows leave rows of padding over, on both ranks
TOKENS = np.random.default_rng(0).integers(0, 50, size=13 * LENGTH + 1, dtype=np.int64)


PACKING = Packing(end_of_text=0)


TEXT = HeldOutText(TOKENS, num_bytes=0)


def model():
    gpt = build_model(MODEL)
    initialize(gpt, init_std=0.3, seed=3)
    return gpt


def evaluate_rank(rank: int):
    batches = held_out_batches(TEXT, sequence_length=LENGTH, rank=rank, world_size=2, micro_batch=3,
                               max_sequences=None)  # fmt: skip
    calls = []
    share = HeldOutShare("a", batches, num_tokens=len(TOKENS), num_bytes=2 * len(TOKENS))
    found = evaluate(model(), [share], packing=PACKING, meter=LoadMeter(2, 4, "cpu"), device=torch.device("cpu"),
                     group=dist.group.WORLD, on_batch=lambda: calls.append(1))  # fmt: skip
    return {"loss": found.loss, "bits": found.bits_per_byte, "tokens": found.tokens, "share": found.load.share,
            "calls": len(calls)}  # fmt: skip


def test_two_ranks_find_the_loss_and_load_of_a_loop_over_the_text(ranks):
    gpt = model().eval()
    summed, counts = 0.0, torch.zeros(2, 4)
    for start in range(0, len(TOKENS) - 1, LENGTH):
        window = torch.from_numpy(TOKENS[start : start + LENGTH + 1])
        output = gpt(window[None, :-1])
        log_prob = output.logit_BSV[0].double().log_softmax(-1)
        summed -= sum(log_prob[i, window[i + 1]].item() for i in range(LENGTH))
        counts += torch.stack([layer.load.count_E for layer in output.moe])
    expected_loss = summed / (len(TOKENS) - 1)
    for found in ranks(2, evaluate_rank):
        assert found["tokens"] == len(TOKENS) - 1
        assert found["loss"] == pytest.approx(expected_loss, rel=1e-6)
        assert found["bits"] == pytest.approx(expected_loss / math.log(2) / 2.0, rel=1e-6)
        torch.testing.assert_close(torch.tensor(found["share"]), counts / counts.sum(1, keepdim=True))
        assert found["calls"] == 3


def evaluate_two_sources(rank: int):
    texts = {"a": TOKENS, "b": TOKENS[: 3 * LENGTH + 1]}
    shares = [
        HeldOutShare(
            name,
            held_out_batches(
                HeldOutText(text, num_bytes=0),
                sequence_length=LENGTH,
                rank=rank,
                world_size=2,
                micro_batch=3,
                max_sequences=2,
            ),
            num_tokens=len(text),
            num_bytes=len(text) * bytes_per_token,
        )
        for bytes_per_token, (name, text) in enumerate(texts.items(), start=1)
    ]
    found = evaluate(model(), shares, packing=PACKING, meter=None, device=torch.device("cpu"), group=dist.group.WORLD,
                     on_batch=lambda: None)  # fmt: skip
    return {"loss": found.loss, "bits": found.bits_per_byte, "tokens": found.tokens, "by_source": found.by_source}


def test_sources_are_evaluated_apart_and_weigh_as_much_as_their_texts(ranks):
    gpt = model().eval()
    losses = {}
    # two windows of each, evenly spread: of 13 the first and the seventh, of 3 the first two
    for name, starts in {"a": (0, 6), "b": (0, 1)}.items():
        windows = torch.stack([torch.from_numpy(TOKENS[LENGTH * i : LENGTH * (i + 1) + 1]) for i in starts])
        logits = gpt(windows[:, :-1]).logit_BSV
        losses[name] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    whole = (losses["a"] * 105 + losses["b"] * 25) / 130
    for found in ranks(2, evaluate_two_sources):
        assert found["by_source"] == pytest.approx(losses, rel=1e-6)
        assert found["loss"] == pytest.approx(whole, rel=1e-6)
        assert found["bits"] == pytest.approx(whole / math.log(2) * 130 / (105 + 2 * 25), rel=1e-6)
        assert found["tokens"] == 4 * LENGTH


def certified(gpt, *, step: int = 5):
    probe = probe_batches([TEXT], sequence_length=LENGTH)
    seed = step_seed(1234, step, rank=0)
    return certify(gpt, probe, packing=PACKING, next_batch="abc", next_seed=seed, device=torch.device("cpu"),
                   layout={"world_size": 1})  # fmt: skip


def certify_rank(rank: int):
    topology = Topology(world_size=2, rank=rank, expert_parallel=2)
    groups = process_groups.make(topology, device=torch.device("cpu"))
    gpt = build_model(MODEL, local_experts=topology.local_experts(4), expert_group=groups.expert)
    initialize(gpt, init_std=0.3, seed=3)
    found = certified(gpt)
    return {"loss": found.probe_loss, "counts": found.probe_counts}


def test_the_probe_is_four_sequences_spread_over_the_text_on_every_layout(ranks):
    gpt = model()
    losses, counts = [], torch.zeros(2, 4, dtype=torch.int64)
    with torch.no_grad():
        for start in (0, 3, 6, 9):  # 13 windows, four of them
            window = torch.from_numpy(TOKENS[start * LENGTH : (start + 1) * LENGTH + 1])
            out = gpt(window[None, :-1])
            losses.append(torch.nn.functional.cross_entropy(out.logit_BSV[0], window[1:]).item())
            counts += torch.stack([layer.load.count_E for layer in out.moe])
    found = certified(gpt)
    assert found.probe_loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert found.probe_counts == counts.tolist()
    for other in ranks(2, certify_rank):
        assert other["loss"] == pytest.approx(found.probe_loss, rel=1e-6)
        assert other["counts"] == found.probe_counts


def test_to_certify_leaves_the_model_and_the_generators_as_they_were():
    gpt = model()
    gpt.train()
    generators = torch.get_rng_state()
    assert certified(gpt) == certified(gpt)
    assert gpt.training
    assert torch.equal(torch.get_rng_state(), generators)


def test_the_digest_of_the_generator_is_that_of_the_one_the_loop_seeds():
    torch.manual_seed(derive_seed(1234, 5, 0))
    expected = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    assert certified(model()).generator == expected
    assert certified(model(), step=6).generator != expected
