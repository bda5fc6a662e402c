"""How many parameters a model has, and how many FLOPs a token costs, in all and per token.

Letters (one legend for the file):
    D d_model    V vocab_size    S sequence length    H query heads    G key/value heads    d width of one head
    F hidden width of a feed-forward net, dense or one expert    E experts in a block
    K experts per token, on average for a router in which that differs from token to token

The model is taken as ``config.checks`` lets it pass; nothing here checks it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from moetrain.config.schema import ModelConfig, MoEConfig

GATED = frozenset({"swiglu", "geglu"})
"""Activations whose feed-forward net has a third matrix, the gate (Shazeer 2020, arXiv:2002.05202)."""


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model, part by part. Biases count with the map they belong to."""

    embedding: int
    """Token embedding, V x D."""
    positions: int
    """Learned positions, context x D; 0 with rope."""
    attention: int
    """Query, key, value and output maps of all blocks."""
    dense_ffn: int
    """Feed-forward nets of the dense blocks."""
    router: int
    """Routers of the MoE blocks, D x E each, twice that with learned noise."""
    experts: int
    """All experts of the MoE blocks."""
    active_experts: int
    """The K of E experts that answer for one token, over all MoE blocks."""
    shared_experts: int
    """Experts that every token visits, with their gates, over all MoE blocks."""
    norm: int
    """Two norms in each block and one at the end, and those of queries and keys."""
    output: int
    """Output layer, D x V; 0 when it shares the embedding's weights."""

    @property
    def non_expert(self) -> int:
        """Parameters that every token meets: all but the experts."""
        blocks = self.attention + self.dense_ffn + self.router + self.shared_experts + self.norm
        return self.embedding + self.positions + blocks + self.output

    @property
    def total(self) -> int:
        """All parameters, embeddings included: the "46.7 B" of Mixtral 8x7B."""
        return self.non_expert + self.experts

    @property
    def active(self) -> int:
        """Parameters one token meets, embeddings whole: the "12.9 B" of Mixtral 8x7B."""
        return self.non_expert + self.active_experts


def is_moe_block(model: ModelConfig, *, block: int) -> bool:
    """Whether block number ``block``, from 0, is sparse: the last of each ``moe.every``."""
    return model.moe is not None and (block + 1) % model.moe.every == 0


def count_parameters(model: ModelConfig) -> ParameterCount:
    """The parameters of a model, part by part, exact to the last one."""
    bias = model.bias
    d_head = _head_width(model)
    query = _linear(model.d_model, model.num_heads * d_head, bias=bias)
    key_or_value = _linear(model.d_model, (model.num_kv_heads or model.num_heads) * d_head, bias=bias)
    back = _linear(model.num_heads * d_head, model.d_model, bias=bias)
    norm = model.d_model * (2 if model.norm == "layernorm" and bias else 1)
    embedding = model.vocab_size * model.d_model

    sparse_blocks = _count_moe_blocks(model)
    router, expert, shared, chosen, num_experts = 0, 0, 0, 0, 0
    if model.moe is not None:
        router = _router_weights(model, moe=model.moe)
        expert = _expert_weights(model, moe=model.moe)
        shared = _shared_weights(model, moe=model.moe)
        chosen, num_experts = model.moe.top_k, model.moe.num_experts
    return ParameterCount(
        embedding=embedding,
        positions=model.context * model.d_model if model.positions == "learned" else 0,
        attention=model.num_layers * (query + 2 * key_or_value + back),
        dense_ffn=(model.num_layers - sparse_blocks) * _dense_ffn(model),
        router=sparse_blocks * router,
        experts=sparse_blocks * num_experts * expert,
        active_experts=sparse_blocks * chosen * expert,
        shared_experts=sparse_blocks * shared,
        norm=(2 * model.num_layers + 1) * norm + model.num_layers * _qk_norm(model),
        output=0 if model.tie_embeddings else embedding,
    )


def flops_per_token(model: ModelConfig, *, sequence_length: int) -> int:
    """FLOPs to train on one token of a sequence of ``sequence_length`` tokens: forward and backward.

    Counted: matrix products, 2 FLOPs per multiply-add, with the weights one token meets (K of E experts, the router,
    the output layer; not the embedding look-up), and the two products of attention. Backward is twice forward, the
    gradients to the input and to the weights. Recomputed activations are not counted.

    Attention is counted causal: a token looks back on S/2 keys on average. PaLM (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B: 6N + 12 L H d S) and Chinchilla (Hoffmann et al. 2022, arXiv:2203.15556, appendix F)
    count all S keys, so their attention term is twice ours. Chinchilla also counts the softmax and the embedding
    look-up as a product with V; PaLM counts neither softmax nor norms, like us.
    """
    d_head = _head_width(model)
    num_kv_heads = model.num_kv_heads or model.num_heads
    attention_weights = model.d_model * d_head * (2 * model.num_heads + 2 * num_kv_heads)
    # 2 FLOPs x 2 products (query-key, probability-value) x S/2 keys, each over all H x d query channels
    attention_scores = 2 * model.num_heads * d_head * sequence_length

    sparse_blocks = _count_moe_blocks(model)
    dense_weights = _ffn_weights(model.d_model, model.d_ff, activation=model.activation)
    weights = model.num_layers * attention_weights + (model.num_layers - sparse_blocks) * dense_weights
    if model.moe is not None:
        met = _router_weights(model, moe=model.moe) + _shared_weights(model, moe=model.moe)
        met += model.moe.top_k * _expert_weights(model, moe=model.moe)
        weights += sparse_blocks * met
    weights += model.d_model * model.vocab_size
    return 3 * (2 * weights + model.num_layers * attention_scores)


def expert_share(model: ModelConfig, *, sequence_length: int) -> float:
    """Share of a token's FLOPs that its routed experts do."""
    return 6 * count_parameters(model).active_experts / flops_per_token(model, sequence_length=sequence_length)


def format_count(count: int) -> str:
    """A count in three significant digits, for people: 46_702_792_704 -> "46.7 B"."""
    if count < 1000:
        return str(count)
    scaled, units = float(count), ["K", "M", "B", "T"]
    unit = ""
    # 999.5 would print as "1000" in three digits, so the next unit begins there
    while units and scaled >= 999.5:
        scaled /= 1000
        unit = units.pop(0)
    decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{decimals}f} {unit}"


def _head_width(model: ModelConfig) -> int:
    return model.d_head or model.d_model // model.num_heads


def _linear(inputs: int, outputs: int, *, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _ffn_weights(d_model: int, hidden: int, *, activation: str) -> int:
    return (3 if activation in GATED else 2) * d_model * hidden


def _qk_norm(model: ModelConfig) -> int:
    heads = {None: 0, "head": 2, "all": model.num_heads + (model.num_kv_heads or model.num_heads)}[model.qk_norm]
    return heads * _head_width(model)


def _dense_ffn(model: ModelConfig) -> int:
    weights = _ffn_weights(model.d_model, model.d_ff, activation=model.activation)
    maps_into_hidden = 2 if model.activation in GATED else 1
    biases = maps_into_hidden * model.d_ff + model.d_model
    return weights + (biases if model.bias else 0)


def _expert_weights(model: ModelConfig, *, moe: MoEConfig) -> int:
    return _ffn_weights(model.d_model, moe.d_expert or model.d_ff, activation=moe.activation or model.activation)


def _router_weights(model: ModelConfig, *, moe: MoEConfig) -> int:
    matrices = {"hash": 0, "balanced": 0, "noisy_top_k": 2}.get(moe.router, 1)
    return matrices * model.d_model * moe.num_experts


def _shared_weights(model: ModelConfig, *, moe: MoEConfig) -> int:
    gate = model.d_model if moe.num_shared_experts and moe.shared_gate else 0
    return moe.num_shared_experts * _expert_weights(model, moe=moe) + gate


def _count_moe_blocks(model: ModelConfig) -> int:
    return sum(is_moe_block(model, block=block) for block in range(model.num_layers))
