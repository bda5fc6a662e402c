"""The same layer and the same model as others build them, with our weights: `transformers` and DeepSpeed.

DeepSpeed's layer runs without a process group here: over a group of one rank its collectives have no effect, and it
leaves them out for a group that is not there (``deepspeed.comm.pg_utils.is_parallel``).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from moetrain.config.schema import ModelConfig
from moetrain.model.ffn import FeedForward
from moetrain.model.gpt import GPT
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import capacity_of

CAPACITY_FACTOR = 1.25
MIN_CAPACITY = 1
"""DeepSpeed's own default, 4, asserts on tiny inputs."""

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Admitted(Generic[Entry]):
    """Who may be timed."""

    entries: dict[str, Entry] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    """Why each of the others may not."""


def exact(top_k: int) -> tuple[str, ...]:
    """Peers whose answer must be ours: DeepSpeed's top-1 weighs by the probability, as Switch does, not by 1."""
    theirs = ("transformers_grouped", "transformers_eager")
    return theirs if top_k == 1 else (*theirs, "deepspeed_no_drop")


def admit(
    names: dict[str, bool],
    *,
    make: Callable[[str], Entry],
    answer: Callable[[Entry], Tensor],
    expected: Tensor,
    exact: tuple[str, ...],
    error: float,
) -> Admitted[Entry]:
    """Build contestants, and keep those that do the same work as ours.

    Args:
        names: name -> whether it is a peer. One that fails is left out; a failure of our own is raised.
        expected: our answer, which that of every ``exact`` one must be but for ``error`` (see ``difference``).
    """
    admitted: Admitted[Entry] = Admitted()
    for name, is_peer in names.items():
        try:
            entry = make(name)
            given = answer(entry)
            off = difference(given, expected) if name in exact else 0.0
        except Exception as fault:
            # whatever another version of a peer raises is a row that says so, not the end of the table
            if not is_peer:
                raise
            admitted.faults[name] = f"not timed: {(str(fault).splitlines() or [repr(fault)])[0]}"
            continue
        if off <= error:
            admitted.entries[name] = entry
        else:
            admitted.faults[name] = f"not timed: its answer is not ours, but off by {off:.1e} of it"
    return admitted


@torch.no_grad()
def difference(answer: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; NaN where either has one."""
    return float((answer.double() - expected.double()).norm() / expected.double().norm())


def experts_implementation(contestant: str) -> str:
    """What `transformers` calls the way it computes its experts."""
    return {"transformers_grouped": "grouped_mm", "transformers_eager": "eager"}[contestant]


def mixtral_block(layer: MoELayer, model: ModelConfig) -> nn.Module:
    """`transformers`' Mixtral block with the layer's weights; ``set_experts`` chooses how it computes its experts."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    make: Any = MixtralSparseMoeBlock
    block: nn.Module = make(_mixtral_config(model))
    block.load_state_dict(_mixtral_experts(layer))
    return block.to(layer.experts.w_in)


def mixtral(gpt: GPT, model: ModelConfig) -> nn.Module:
    """`transformers`' Mixtral with the model's weights."""
    import transformers

    assert gpt.head is None, "the benchmark's models tie their embeddings"
    state: dict[str, Any] = {"model.embed_tokens.weight": gpt.embedding.weight, "model.norm.weight": gpt.norm.weight}
    state["lm_head.weight"] = gpt.embedding.weight
    for index, module in enumerate(gpt.blocks):
        block: Any = module
        q, k, v = block.attention.qkv.weight.chunk(3)
        named = {
            "input_layernorm.weight": block.attention_norm.weight,
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": block.attention.out.weight,
            "post_attention_layernorm.weight": block.feed_forward_norm.weight,
            **{f"mlp.{name}": weight for name, weight in _mixtral_experts(block.feed_forward).items()},
        }
        state |= {f"model.layers.{index}.{name}": weight for name, weight in named.items()}
    theirs: nn.Module = transformers.MixtralForCausalLM(_mixtral_config(model))
    theirs.load_state_dict(state)
    return theirs.to(gpt.embedding.weight).train()


def set_experts(theirs: nn.Module, implementation: str) -> None:
    """Let a block or model of `transformers` compute its experts in this way from now on."""
    for module in theirs.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._experts_implementation = implementation


def deepspeed_layer(layer: MoELayer, model: ModelConfig) -> nn.Module:
    """`deepspeed.moe.layer.MoE` with the layer's weights; ``set_drops`` chooses whether it drops tokens.

    The second expert is the second best: by default it is drawn, and then does not repeat.
    """
    if not torch.cuda.is_available():
        # else it tells of its search for a GPU on stdout
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.layer import MoE

    moe = model.moe
    assert moe is not None
    expert = FeedForward(model.d_model, d_ff=moe.d_expert or model.d_ff, activation=model.activation, bias=False)
    theirs: Any = MoE(
        model.d_model,
        expert,
        num_experts=moe.num_experts,
        k=moe.top_k,
        capacity_factor=CAPACITY_FACTOR,
        min_capacity=MIN_CAPACITY,
        top2_2nd_expert_sampling=False,
    )
    with torch.no_grad():
        theirs.deepspeed_moe.gate.wg.weight.copy_(layer.router.weight)
        for index, one in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            one.w_in.weight.copy_(layer.experts.w_in[index])
            one.w_out.weight.copy_(layer.experts.w_out[index])
    ready: nn.Module = theirs.to(layer.experts.w_in)
    return ready


class DeepSpeedFeedForward(nn.Module):
    """DeepSpeed's layer where our GPT has a dense feed-forward; its loss stays with it, as DeepSpeed keeps it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(x)[0]
        return hidden

    @property
    def balance(self) -> Tensor:
        """The balance loss of the last forward pass, unweighted."""
        loss: Tensor = self.layer.deepspeed_moe.l_aux
        return loss


def deepspeed_gpt(gpt: GPT, model: ModelConfig) -> GPT:
    """A copy of our GPT with DeepSpeed's layer in place of each of ours."""
    # the copy is of all but the experts, which may be most of the memory
    keep: dict[int, Any] = {id(block.feed_forward): nn.Identity() for block in gpt.blocks}
    theirs = copy.deepcopy(gpt, keep)
    pairs: Any = zip(gpt.blocks, theirs.blocks, strict=True)
    for ours, block in pairs:
        block.feed_forward = DeepSpeedFeedForward(deepspeed_layer(ours.feed_forward, model))
    return theirs


def set_drops(theirs: nn.Module, drops: bool) -> None:
    """Let every layer of DeepSpeed drop what is above its capacity, or pad every expert to the fullest."""
    from deepspeed.moe.sharded_moe import TopKGate

    for module in theirs.modules():
        if isinstance(module, TopKGate):
            module.drop_tokens = drops


def dropped_share(count_E: Tensor, *, tokens: int, top_k: int) -> float:
    """Share of the copies that DeepSpeed's layer drops at its capacity, for copies [E] that chose each expert."""
    room = capacity_of(
        tokens=tokens, top_k=top_k, num_experts=count_E.numel(), factor=CAPACITY_FACTOR, least=MIN_CAPACITY
    )
    return float((count_E - room).clamp(min=0).sum() / count_E.sum())


def _mixtral_config(model: ModelConfig) -> Any:
    import transformers

    moe = model.moe
    assert moe is not None
    make: Any = transformers.MixtralConfig
    return make(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=moe.d_expert or model.d_ff,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        max_position_embeddings=model.context,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )


def _mixtral_experts(layer: MoELayer) -> dict[str, Any]:
    return {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": layer.experts.w_in,
        "experts.down_proj": layer.experts.w_out,
    }
