"""The whole model against the reference models of transformers, and on several ranks against one process."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel.groups import make
from moetrain.parallel.topology import Topology

VOCAB = 40
MIXTRAL = ModelConfig(
    vocab_size=VOCAB,
    context=32,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    d_head=6,
    d_ff=20,
    norm_eps=1e-5,
    rope_theta=1000.0,
    tie_embeddings=False,
    init_std=0.3,
    moe=MoEConfig(num_experts=4, top_k=2),
)
GPT2 = ModelConfig(
    vocab_size=VOCAB,
    context=16,
    num_layers=2,
    d_model=16,
    num_heads=4,
    d_ff=24,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    bias=True,
    init_std=0.3,
    moe=None,
)


def make_gpt(model: ModelConfig, **parallel: Any) -> GPT:
    gpt = build_model(model, **parallel)
    initialize(gpt, init_std=model.init_std, seed=5)
    with torch.no_grad():
        # norms of 1 and biases of 0 would hide one taken for another
        for index, parameter in enumerate(each for each in gpt.parameters() if each.dim() == 1):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 4)
    return gpt


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference() -> ModuleType:
    # the fifth version keeps Mixtral's experts in one tensor, as we do
    return pytest.importorskip("transformers", minversion="5.0")


def mixtral_of(gpt: GPT) -> nn.Module:
    transformers = reference()
    config = transformers.MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=4,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    state = {
        "model.embed_tokens.weight": gpt.embedding.weight,
        "model.norm.weight": gpt.norm.weight,
        "lm_head.weight": gpt.head.weight,
    }
    for index, block in enumerate(gpt.blocks):
        q, k, v = block.attention.qkv.weight.split((24, 12, 12))
        named = {
            "input_layernorm.weight": block.attention_norm.weight,
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": block.attention.out.weight,
            "post_attention_layernorm.weight": block.feed_forward_norm.weight,
            "mlp.gate.weight": block.feed_forward.router.weight,
            "mlp.experts.gate_up_proj": block.feed_forward.experts.w_in,
            "mlp.experts.down_proj": block.feed_forward.experts.w_out,
        }
        state |= {f"model.layers.{index}.{name}": weight for name, weight in named.items()}
    theirs = transformers.MixtralForCausalLM(config)
    theirs.load_state_dict(state, strict=True)
    return theirs


def gpt2_of(gpt: GPT) -> nn.Module:
    transformers = reference()
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_inner=24,
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    state = {
        "transformer.wte.weight": gpt.embedding.weight,
        "transformer.wpe.weight": gpt.positions.weight,
        "transformer.ln_f.weight": gpt.norm.weight,
        "transformer.ln_f.bias": gpt.norm.bias,
        "lm_head.weight": gpt.embedding.weight,
    }
    for index, block in enumerate(gpt.blocks):
        for name, module in {
            "ln_1": block.attention_norm,
            "attn.c_attn": block.attention.qkv,
            "attn.c_proj": block.attention.out,
            "ln_2": block.feed_forward_norm,
            "mlp.c_fc": block.feed_forward.w_in,
            "mlp.c_proj": block.feed_forward.w_out,
        }.items():
            # GPT-2 keeps its maps transposed
            weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
            state |= {f"transformer.h.{index}.{name}.weight": weight, f"transformer.h.{index}.{name}.bias": module.bias}
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(state, strict=True)
    return theirs


def assert_same_model(gpt: GPT, theirs: nn.Module) -> None:
    """Logits within 1e-5; the embedding's gradient, to which all that lies above has contributed."""
    ours, token_BS = gpt(tokens()).logit_BSV, tokens()
    expected = theirs(input_ids=token_BS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(
        gpt.embedding.weight.grad, theirs.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-4
    )


def test_sparse_model_is_mixtral() -> None:
    gpt = make_gpt(MIXTRAL)
    theirs = mixtral_of(gpt)
    assert_same_model(gpt, theirs)
    for block, layer in zip(gpt.blocks, theirs.model.layers, strict=True):
        for mine, their in (
            (block.feed_forward.router.weight, layer.mlp.gate.weight),
            (block.feed_forward.experts.w_in, layer.mlp.experts.gate_up_proj),
            (block.feed_forward.experts.w_out, layer.mlp.experts.down_proj),
        ):
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)


def test_dense_model_is_gpt2() -> None:
    gpt = make_gpt(GPT2)
    assert_same_model(gpt, gpt2_of(gpt))


@pytest.mark.parametrize("model", [MIXTRAL, GPT2], ids=["sparse", "dense"])
def test_model_is_causal(model: ModelConfig) -> None:
    gpt, token_BS = make_gpt(model).double(), tokens()
    before = gpt(token_BS).logit_BSV
    for changed in (11, 6, 1):
        other_BS = token_BS.clone()
        other_BS[:, changed] = (token_BS[:, changed] + 1) % VOCAB
        after = gpt(other_BS).logit_BSV
        # the router computes in float32
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[:, changed:], before[:, changed:], rtol=1e-3, atol=1e-3)


def test_each_sparse_block_answers_in_order_and_a_dense_model_has_none() -> None:
    gpt = make_gpt(replace(MIXTRAL, num_layers=4, moe=MoEConfig(num_experts=4, every=2)))
    seen: list[Any] = []
    for index in (1, 3):
        gpt.blocks[index].feed_forward.register_forward_hook(lambda module, inputs, answer: seen.append(answer))
    answers = gpt(tokens()).moe
    assert len(answers) == 2
    assert all(answer is wanted for answer, wanted in zip(answers, seen, strict=True))
    assert make_gpt(GPT2)(tokens()).moe == []


WORLD_SIZE = 4
SPREAD = replace(MIXTRAL, tie_embeddings=True, moe=MoEConfig(num_experts=4, top_k=2))


def _losses_and_gradients(gpt: GPT, token_BS: Tensor) -> dict[str, Tensor]:
    batch = MicroBatch(token_BS=token_BS[:, :-1], target_BS=token_BS[:, 1:])
    losses = Objective(gpt.double(), loss_weights={"balance": 0.5, "z": 0.25})(batch)
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    return {"total": losses.total.detach(), "language": losses.language, **gradients}


def _share_of_batch(rank: int) -> dict[str, dict[str, Tensor]]:
    answers = {}
    for expert_parallel in (1, 2, 4):
        topology = Topology(world_size=WORLD_SIZE, rank=rank, expert_parallel=expert_parallel)
        groups = make(topology, device=torch.device("cpu"))
        gpt = make_gpt(SPREAD, local_experts=topology.local_experts(4), expert_group=groups.expert)
        mine = tokens(batch=WORLD_SIZE * 2)[rank * 2 : rank * 2 + 2]
        answers[str(expert_parallel)] = _losses_and_gradients(gpt, mine)
    return answers


def test_ranks_share_a_batch_as_one_process_would_do_it_all(ranks) -> None:
    """Mean of the ranks' losses, balance loss included, and of their gradients, however the experts are spread."""
    whole = _losses_and_gradients(make_gpt(SPREAD), tokens(batch=WORLD_SIZE * 2))
    answers = ranks(WORLD_SIZE, _share_of_batch)
    for expert_parallel in (1, 2, 4):
        each = [answer[str(expert_parallel)] for answer in answers]
        for name, wanted in whole.items():
            parts = [answer[name] for answer in each]
            if ".experts." in name:
                # each expert group in turn holds every expert once, with the sum over the group's tokens
                parts = [
                    torch.cat(parts[first : first + expert_parallel]) for first in range(0, WORLD_SIZE, expert_parallel)
                ]
            # the router's part is float32
            torch.testing.assert_close(
                sum(parts) / WORLD_SIZE, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
