"""What is minimised, added up by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT
from moetrain.model.objective import NOT_COUNTED, MicroBatch, Objective, negative_log_likelihood

VOCAB = 11
MODEL = ModelConfig(
    vocab_size=VOCAB,
    context=8,
    num_layers=2,
    d_model=8,
    num_heads=2,
    d_ff=12,
    init_std=0.5,
    moe=MoEConfig(num_experts=3, top_k=2),
)


def make_gpt() -> GPT:
    gpt = build_model(MODEL)
    initialize(gpt, init_std=MODEL.init_std, seed=3)
    return gpt


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    token_BS = torch.randint(VOCAB, (2, 6), generator=generator)
    target_BS = torch.randint(VOCAB, (2, 6), generator=generator)
    target_BS[0, 1] = target_BS[1, 4] = target_BS[1, 5] = NOT_COUNTED
    return token_BS, target_BS


def plain_nll(gpt: GPT, token_BS: Tensor, target_BS: Tensor) -> list[float]:
    """-log p of each counted target."""
    logits = gpt(token_BS).logit_BSV.tolist()
    return [
        math.log(sum(map(math.exp, scores))) - scores[target]
        for rows, targets in zip(logits, target_BS.tolist(), strict=True)
        for scores, target in zip(rows, targets, strict=True)
        if target != -1
    ]


def test_total_is_the_language_loss_and_the_weighted_losses_of_every_layer() -> None:
    gpt, (token_BS, target_BS) = make_gpt(), batch()
    losses = Objective(gpt, loss_weights={"balance": 0.25, "z": 0.125})(
        MicroBatch(token_BS=token_BS, target_BS=target_BS)
    )
    nll = plain_nll(gpt, token_BS, target_BS)
    assert len(nll) == 9
    layers = gpt(token_BS).moe
    assert len(layers) == len(losses.load) == 2
    balance, z = (sum(layer.losses[name].item() for layer in layers) for name in ("balance", "z"))
    assert losses.language.item() == pytest.approx(sum(nll) / 9, rel=1e-5)
    assert losses.total.item() == pytest.approx(sum(nll) / 9 + 0.25 * balance + 0.125 * z, rel=1e-5)
    assert not losses.language.requires_grad
    for load, layer in zip(losses.load, layers, strict=True):
        assert load.balance.item() == pytest.approx(layer.losses["balance"].item(), rel=1e-5)
        assert load.z.item() == pytest.approx(layer.losses["z"].item(), rel=1e-5)


def test_a_target_that_is_not_counted_changes_nothing() -> None:
    gpt, (token_BS, target_BS) = make_gpt(), batch()
    one_BS = torch.full_like(target_BS, NOT_COUNTED)
    one_BS[1, 2] = target_BS[1, 2]
    loss = Objective(gpt, loss_weights={"balance": 0.0, "z": 0.0})(
        MicroBatch(token_BS=token_BS, target_BS=one_BS)
    ).language
    assert loss.item() == pytest.approx(plain_nll(gpt, token_BS, one_BS)[0], rel=1e-5)


def test_targets_of_a_step_weigh_the_same_however_they_lie_in_micro_batches() -> None:
    gpt, (token_BS, target_BS) = make_gpt(), batch()
    objective = Objective(gpt, loss_weights={"balance": 0.0, "z": 0.0})
    whole = objective(MicroBatch(token_BS=token_BS, target_BS=target_BS))
    # 5 counted targets in the first row, 4 in the second
    rows = [
        objective(MicroBatch(token_BS=token_BS[row : row + 1], target_BS=target_BS[row : row + 1], counted=9 / 2))
        for row in (0, 1)
    ]
    assert sum(each.total.item() for each in rows) / 2 == pytest.approx(whole.total.item(), rel=1e-6)
    assert rows[0].language.item() == pytest.approx(sum(plain_nll(gpt, token_BS[:1], target_BS[:1])) / 4.5, rel=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    """The router's losses alone reach the router of the last layer; nothing is left without a gradient."""
    objective = Objective(make_gpt(), loss_weights={"balance": 0.01, "z": 0.001})
    token_BS, target_BS = batch()
    objective(MicroBatch(token_BS=token_BS, target_BS=target_BS)).total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_likelihood_is_summed_over_counted_tokens() -> None:
    gpt, (token_BS, target_BS) = make_gpt(), batch()
    summed, blocks = negative_log_likelihood(gpt, MicroBatch(token_BS=token_BS, target_BS=target_BS))
    assert summed.item() == pytest.approx(sum(plain_nll(gpt, token_BS, target_BS)), rel=1e-5)
    assert [int(each.load.count_E.sum()) for each in blocks] == [12 * 2, 12 * 2]
    assert not summed.requires_grad
