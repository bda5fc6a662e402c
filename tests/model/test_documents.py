"""Packed documents against each document by itself: logits, loss and gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.packing import Packing
from moetrain.model.attention import document_mask
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT
from moetrain.model.objective import MicroBatch, Objective

END = 0
DENSE = ModelConfig(vocab_size=23, context=24, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24,
                    init_std=0.3, moe=None)  # fmt: skip
MODELS = {
    "rope": DENSE,
    "learned": replace(DENSE, positions="learned"),
    "experts": replace(DENSE, moe=MoEConfig(num_experts=4, d_expert=16)),
}
# as inputs, each begins with the token that ended the one before, but for the first, which begins somewhere inside
LENGTHS = [[7, 5, 1, 11], [3, 20, 1]]
PACKING = Packing(end_of_text=END, mask_documents=True, reset_positions=True)


def rows() -> np.ndarray:
    """[2, 25]: 24 tokens in, 24 out."""
    tokens = np.random.default_rng(0).integers(1, 23, size=(2, 25))
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        row[np.cumsum(lengths)] = END  # the last one is a target alone
    return tokens


def documents() -> list[np.ndarray]:
    return [row[start : start + length + 1]
            for row, lengths in zip(rows(), LENGTHS, strict=True)
            for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True)]  # fmt: skip


def make(model: ModelConfig, *, recompute: str = "none") -> GPT:
    gpt = build_model(model, recompute=recompute)
    initialize(gpt, init_std=0.3, seed=5)
    return gpt.double()


def packed(packing: Packing = PACKING) -> MicroBatch:
    tokens = rows()
    found, positions = packing.documents(tokens[:, :-1]), packing.positions(tokens[:, :-1])
    whole = torch.from_numpy(tokens)
    return MicroBatch(token_BS=whole[:, :-1], target_BS=whole[:, 1:],
                      document_BS=None if found is None else torch.from_numpy(found),
                      position_BS=None if positions is None else torch.from_numpy(positions))  # fmt: skip


def alone(gpt: GPT) -> tuple[Tensor, Tensor]:
    """Logits of all documents one after another, and the mean loss."""
    logits, nll = [], []
    for document in documents():
        own = torch.from_numpy(document)
        answer = gpt(own[None, :-1]).logit_BSV[0]
        logits.append(answer)
        nll.append(torch.nn.functional.cross_entropy(answer.float(), own[1:], reduction="none"))
    return torch.cat(logits), torch.cat(nll).mean()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_packed_documents_are_learnt_as_each_by_itself(model, recompute):
    gpt, batch = make(MODELS[model], recompute=recompute), packed()
    logits, loss = alone(gpt)
    gradients = torch.autograd.grad(loss, list(gpt.parameters()), allow_unused=True)

    ours = gpt(batch.token_BS, document_BS=batch.document_BS, position_BS=batch.position_BS)
    torch.testing.assert_close(ours.logit_BSV.flatten(0, 1), logits, rtol=1e-5, atol=1e-6)  # angles are float32
    losses = Objective(gpt, loss_weights={})(batch)
    torch.testing.assert_close(losses.language, loss.detach())
    losses.total.backward()
    for (name, parameter), wanted in zip(gpt.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7, msg=name)


def test_rotary_positions_need_no_reset():
    """They tell distances alone, and those within a document are the same."""
    gpt = make(MODELS["rope"])
    batch = packed(Packing(end_of_text=END, mask_documents=True))
    ours = gpt(batch.token_BS, document_BS=batch.document_BS)
    torch.testing.assert_close(ours.logit_BSV.flatten(0, 1), alone(gpt)[0], rtol=1e-4, atol=1e-5)


def test_without_a_mask_documents_see_each_other():
    gpt, batch = make(MODELS["rope"]), packed()
    plain = gpt(batch.token_BS).logit_BSV
    logits, _ = alone(gpt)
    first = LENGTHS[0][0]
    torch.testing.assert_close(plain[0, :first], logits[:first])
    assert not torch.allclose(plain[0, first:], logits[first : sum(LENGTHS[0])], atol=1e-2)


def test_one_document_to_a_sequence_is_plain_attention():
    gpt, tokens = make(MODELS["experts"]), packed().token_BS
    masked = gpt(tokens, document_BS=torch.zeros_like(tokens)).logit_BSV
    torch.testing.assert_close(masked, gpt(tokens).logit_BSV)


def test_all_blocks_keep_one_mask_for_the_backward_pass():
    gpt, batch = make(MODELS["rope"]), packed()
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = gpt(batch.token_BS, document_BS=batch.document_BS).logit_BSV
    assert logits.requires_grad
    assert [each.shape for each in kept.values()].count((2, 1, 24, 24)) == 1


def test_a_token_sees_its_own_document_up_to_itself():
    mask = document_mask(torch.tensor([[0, 0, 1, 1]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
