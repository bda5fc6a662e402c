"""Model families of `transformers`, and which of our settings each can say. No torch.

A family is asked what of a model it cannot say (``unfit``); the first that can say all is the one a model leaves as.
``config_of`` writes its config.json, ``settings_of`` reads one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moetrain.config.routers import resolve_router
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.errors import ConfigError

GATED = {"swiglu": "silu", "geglu": "gelu"}
PLAIN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
SYNONYMS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture of `transformers` is like."""

    model_type: str
    architecture: str
    weights: tuple[str, ...] = ()
    """How its router may weigh the chosen experts (``weighing``); none: it is dense."""
    qk_norm: tuple[str | None, ...] = (None,)
    bias: str = "none"
    """Where its maps may have biases: none, attention, all, or always."""
    shared: tuple[str, ...] = ("none",)
    """Shared experts: none, plain or gated."""
    every: bool = False
    """Whether some blocks may be dense."""
    free_head: bool = True
    """Whether heads may be of any width."""


FAMILIES = (
    Family(model_type="mixtral", architecture="MixtralForCausalLM", weights=("renormalized",)),
    Family(model_type="olmoe", architecture="OlmoeForCausalLM", weights=("renormalized", "softmax"), qk_norm=("all",),
           bias="attention", free_head=False),
    Family(model_type="qwen3_moe", architecture="Qwen3MoeForCausalLM", weights=("renormalized", "softmax"),
           qk_norm=("head",), bias="attention", every=True),
    Family(model_type="qwen2_moe", architecture="Qwen2MoeForCausalLM", weights=("renormalized", "softmax"),
           shared=("gated",), every=True),
    Family(model_type="glm4_moe", architecture="Glm4MoeForCausalLM", weights=("sigmoid",), qk_norm=(None, "head"),
           shared=("plain",)),
    Family(model_type="llama", architecture="LlamaForCausalLM", bias="all"),
    Family(model_type="qwen3", architecture="Qwen3ForCausalLM", qk_norm=("head",)),
    Family(model_type="gpt2", architecture="GPT2LMHeadModel", bias="always", free_head=False),
)  # fmt: skip
BY_TYPE = {family.model_type: family for family in FAMILIES}


def family_of(model: ModelConfig) -> Family:
    """The family a model leaves as.

    Raises:
        ConfigError: none can say all of its settings; with those that the nearest one cannot.
    """
    candidates = [(family, list(unfit(model, family))) for family in FAMILIES
                  if bool(family.weights) == (model.moe is not None)]  # fmt: skip
    family, problems = min(candidates, key=lambda each: len(each[1]))
    if problems:
        raise ConfigError([f"{each} (the nearest architecture of transformers is {family.model_type})"
                           for each in problems])  # fmt: skip
    return family


def unfit(model: ModelConfig, family: Family) -> Iterator[str]:
    """Settings that the family cannot say, a sentence each."""
    is_gpt2 = family.model_type == "gpt2"
    wanted = {"norm": "layernorm" if is_gpt2 else "rmsnorm", "positions": "learned" if is_gpt2 else "rope"}
    for name, value in wanted.items():
        if getattr(model, name) != value:
            yield f"model.{name} is {getattr(model, name)}, but {family.model_type} has {value}"
    yield from _unfit_activation(model, family)
    if model.qk_norm not in family.qk_norm:
        allowed = " or ".join("none" if each is None else each for each in family.qk_norm)
        yield f"model.qk_norm is {model.qk_norm or 'null'}, but {family.model_type} has {allowed}"
    has_dense = model.moe is None or model.moe.every > 1
    if model.bias and (family.bias == "none" or (family.bias == "attention" and has_dense)):
        yield f"model.bias is true, but {family.model_type} has no biases{'' if family.bias == 'none' else ' there'}"
    if is_gpt2 and (model.num_kv_heads or model.num_heads) != model.num_heads:
        yield f"model.num_kv_heads is {model.num_kv_heads}, but gpt2 has as many as query heads, {model.num_heads}"
    if not family.free_head and model.d_head and model.d_head * model.num_heads != model.d_model:
        yield f"model.d_head is {model.d_head}, but {family.model_type} has d_model / num_heads"
    if model.moe is not None and family.weights:
        yield from _unfit_moe(resolve_router(model.moe), family)


def _unfit_activation(model: ModelConfig, family: Family) -> Iterator[str]:
    known = PLAIN if family.model_type == "gpt2" else GATED
    moe = model.moe
    used = {"model.activation": model.activation} if moe is None or moe.every > 1 else {}
    if moe is not None:
        used["model.moe.activation" if moe.activation else "model.activation"] = moe.activation or model.activation
    for name, value in used.items():
        if value not in known:
            yield f"{name} is {value}, but {family.model_type} has {' or '.join(known)}"
    if len(set(used.values())) > 1:
        yield f"model.moe.activation is not model.activation, but {family.model_type} has one for all blocks"


def _unfit_moe(moe: MoEConfig, family: Family) -> Iterator[str]:
    how = weighing(moe)
    if how not in family.weights:
        renormalize = "" if moe.renormalize is None else f" (renormalize {str(moe.renormalize).lower()})"
        yield (
            f"model.moe.router is {moe.router}{renormalize}, but {family.model_type} weighs its experts by "
            + " or ".join(_WEIGHINGS[each] for each in family.weights)
        )
    if moe.evaluation_capacity_factor is not None:
        yield f"model.moe.evaluation_capacity_factor is {moe.evaluation_capacity_factor}, but transformers drops no one"
    if moe.num_groups is not None and how != "sigmoid":
        yield f"model.moe.num_groups is {moe.num_groups}, but {family.model_type} has no groups"
    if moe.num_groups is not None and moe.num_experts == moe.num_groups:
        yield f"model.moe.num_groups is {moe.num_groups}, but {family.model_type} wants two experts in a group at least"
    if moe.every > 1 and not family.every:
        yield f"model.moe.every is {moe.every}, but every block of {family.model_type} is sparse"
    shared = shared_kind(moe)
    if shared not in family.shared:
        count = f"model.moe.num_shared_experts is {moe.num_shared_experts}"
        gate = f" with shared_gate {str(moe.shared_gate).lower()}" if moe.num_shared_experts else ""
        allowed = {"none": "none", "plain": "some, without a gate", "gated": "some, with a gate"}
        yield f"{count}{gate}, but {family.model_type} has {' or '.join(allowed[each] for each in family.shared)}"


_WEIGHINGS = {
    "renormalized": "a softmax over those chosen",
    "softmax": "their share of the softmax over all",
    "sigmoid": "sigmoids, with a bias for the choice (sigmoid_bias)",
}


def weighing(moe: MoEConfig) -> str:
    """How a router weighs the experts in evaluation; ``other`` for what no family can say."""
    match moe.router:
        case "top_k":
            return "renormalized" if moe.renormalize else "softmax"
        case "gshard" | "noisy_top_k":
            # without their noise and their chance: the softmax over those chosen
            return "renormalized"
        case "switch":
            return "softmax"
        case "sinkhorn" if moe.gate == "softmax":
            return "softmax"
        case "dense" if moe.pooling == "soft":
            return "softmax"
        case "sigmoid_bias":
            return "sigmoid"
    return "other"


def shared_kind(moe: MoEConfig) -> str:
    """none, plain or gated."""
    return "none" if not moe.num_shared_experts else "gated" if moe.shared_gate else "plain"


def config_of(model: ModelConfig, family: Family, *, end_of_text: int, dtype: str) -> dict[str, Any]:
    """config.json of a model that fits the family.

    Args:
        end_of_text: id of the token that ends and begins a document.
        dtype: of the weights, as torch names it.
    """
    first = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype,
             "bos_token_id": end_of_text, "eos_token_id": end_of_text, "vocab_size": model.vocab_size,
             "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.init_std}  # fmt: skip
    if family.model_type == "gpt2":
        return first | {
            "n_positions": model.context, "n_embd": model.d_model, "n_layer": model.num_layers,
            "n_head": model.num_heads, "n_inner": model.d_ff, "activation_function": PLAIN[model.activation],
            "layer_norm_epsilon": model.norm_eps, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        }  # fmt: skip
    moe = model.moe
    is_dense = moe is None or moe.every > 1
    activation = model.activation if is_dense or moe is None else moe.activation or model.activation
    config = first | {
        "max_position_embeddings": model.context, "hidden_size": model.d_model, "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads, "hidden_act": GATED[activation],
        "head_dim": model.d_head or model.d_model // model.num_heads, "rms_norm_eps": model.norm_eps,
        # the one is read by transformers 4, the other by 5
        "rope_theta": model.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }  # fmt: skip
    if family.bias in ("attention", "all"):
        config["attention_bias"] = model.bias
    if family.bias == "all":
        config["mlp_bias"] = model.bias
    return config if moe is None else config | _moe_config(model, resolve_router(moe), family)


def _moe_config(model: ModelConfig, moe: MoEConfig, family: Family) -> dict[str, Any]:
    width, kind = moe.d_expert or model.d_ff, family.model_type
    config: dict[str, Any] = {
        "num_experts_per_tok": moe.top_k,
        # transformers adds the shares up over the choices, we average them
        "router_aux_loss_coef": (moe.balance_weight or 0.0) / moe.top_k,
    }
    if kind == "mixtral":
        return config | {"num_local_experts": moe.num_experts, "intermediate_size": width, "sliding_window": None,
                         "router_jitter_noise": moe.jitter or 0.0}  # fmt: skip
    if kind == "glm4_moe":
        return config | {
            "n_routed_experts": moe.num_experts, "moe_intermediate_size": width, "norm_topk_prob": True,
            "routed_scaling_factor": moe.weight_scale or 1.0, "n_group": moe.num_groups or 1,
            "topk_group": moe.top_groups or 1, "n_shared_experts": moe.num_shared_experts, "first_k_dense_replace": 0,
            "use_qk_norm": model.qk_norm == "head", "partial_rotary_factor": 1.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta, "partial_rotary_factor": 1.0},
        }  # fmt: skip
    config |= {"num_experts": moe.num_experts, "norm_topk_prob": weighing(moe) == "renormalized"}
    if kind == "olmoe":
        return config | {"intermediate_size": width, "clip_qkv": None, "pad_token_id": None}
    config |= {"moe_intermediate_size": width, "decoder_sparse_step": moe.every, "mlp_only_layers": [],
               "use_sliding_window": False}  # fmt: skip
    if kind == "qwen2_moe":
        config |= {"shared_expert_intermediate_size": moe.num_shared_experts * width, "qkv_bias": False}
    return config


def settings_of(config: dict[str, Any]) -> tuple[ModelConfig, Family]:
    """The settings of a model from its config.json.

    Raises:
        ConfigError: it is of no family here, or is what our model cannot be; all of it at once.
    """
    family = BY_TYPE.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError([f"model_type is {config.get('model_type')!r}, but must be one of {', '.join(BY_TYPE)}"])
    fields = _Fields(config)
    model = _gpt2_settings(fields) if family.model_type == "gpt2" else _llama_settings(fields, family)
    problems = fields.problems + list(_foreign(config, family))
    if problems or model is None:
        raise ConfigError(problems)
    return model, family


class _Fields:
    """Numbers of a config.json; what is missing or of another type is kept as a problem."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.problems = config, list[str]()

    def number(self, name: str, default: float | None = None) -> Any:
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) not in (int, float):
            self.problems.append(f"{name} is {value!r}, but must be a number" if name in self.config
                                 else f"{name} is missing")  # fmt: skip
            return 1
        return value

    def maybe(self, name: str) -> int | None:
        return None if self.config.get(name) is None else self.number(name)

    def choice(self, name: str, known: dict[str, str]) -> str:
        value = self.config.get(name)
        value = SYNONYMS.get(str(value), value)
        for ours, theirs in known.items():
            if value == theirs:
                return ours
        self.problems.append(f"{name} is {value!r}, but must be one of {', '.join(known.values())}")
        return next(iter(known))


def _gpt2_settings(fields: _Fields) -> ModelConfig:
    width = fields.number("n_embd")
    return ModelConfig(
        vocab_size=fields.number("vocab_size"),
        context=fields.number("n_positions"),
        num_layers=fields.number("n_layer"),
        d_model=width,
        num_heads=fields.number("n_head"),
        d_ff=fields.number("n_inner", 4 * width),
        activation=fields.choice("activation_function", PLAIN),
        norm="layernorm",
        norm_eps=float(fields.number("layer_norm_epsilon", 1e-5)),
        positions="learned",
        bias=True,
        tie_embeddings=bool(fields.config.get("tie_word_embeddings", True)),
        init_std=float(fields.number("initializer_range", 0.02)),
        moe=None,
    )


def _llama_settings(fields: _Fields, family: Family) -> ModelConfig:
    config, kind = fields.config, family.model_type
    width, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    kv_heads, d_head = fields.number("num_key_value_heads", heads), fields.maybe("head_dim")
    qk_norm = family.qk_norm[-1] if kind != "glm4_moe" or config.get("use_qk_norm") else None
    own_eps = 1e-5 if kind in ("mixtral", "olmoe", "glm4_moe") else 1e-6
    return ModelConfig(
        vocab_size=fields.number("vocab_size"),
        context=fields.number("max_position_embeddings"),
        num_layers=fields.number("num_hidden_layers"),
        d_model=width,
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        d_head=None if d_head is not None and d_head * heads == width else d_head,
        d_ff=fields.number("intermediate_size"),
        activation=fields.choice("hidden_act", GATED),
        norm="rmsnorm",
        norm_eps=float(fields.number("rms_norm_eps", own_eps)),
        positions="rope",
        rope_theta=float(_rope(config).get("rope_theta") or (1e6 if kind == "mixtral" else 1e4)),
        qk_norm=qk_norm,
        bias=bool(config.get("attention_bias")) and family.bias != "none",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(fields.number("initializer_range", 0.02)),
        moe=_moe_settings(fields, family) if family.weights else None,
    )


def _moe_settings(fields: _Fields, family: Family) -> MoEConfig:
    config, kind = fields.config, family.model_type
    names = {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts"}
    name = names.get(kind, "num_experts")
    # transformers 5 writes either name
    experts = fields.number(name if name in config else "num_local_experts")
    width = fields.number("intermediate_size" if kind in ("mixtral", "olmoe") else "moe_intermediate_size")
    top_k = fields.number("num_experts_per_tok")
    coefficient = float(fields.number("router_aux_loss_coef", 0.0)) * top_k
    common: dict[str, Any] = {"num_experts": experts, "top_k": top_k, "d_expert": width}
    if kind == "glm4_moe":
        groups = fields.number("n_group", 1)
        return resolve_router(MoEConfig(
            **common, router="sigmoid_bias", weight_scale=float(fields.number("routed_scaling_factor", 1.0)),
            num_groups=groups if groups > 1 else None, num_shared_experts=fields.number("n_shared_experts", 1),
            top_groups=fields.number("topk_group", 1) if groups > 1 else None,
        ))  # fmt: skip
    shared = 0
    if kind == "qwen2_moe":
        shared = fields.number("shared_expert_intermediate_size") // width
    return resolve_router(MoEConfig(
        **common, renormalize=kind == "mixtral" or bool(config.get("norm_topk_prob", False)),
        jitter=float(config.get("router_jitter_noise") or 0.0) if kind == "mixtral" else None,
        balance_weight=coefficient, every=fields.number("decoder_sparse_step", 1) if family.every else 1,
        num_shared_experts=shared, shared_gate=shared > 0,
    ))  # fmt: skip


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters")
    return {"rope_theta": config.get("rope_theta")} | (given if isinstance(given, dict) else {})


def _foreign(config: dict[str, Any], family: Family) -> Iterator[str]:
    """What our model has no word for."""
    kind = family.model_type
    if config.get("quantization_config"):
        yield "quantization_config is set, but weights must be fp32, bf16 or fp16: take the unquantised model"
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        yield f"rope_type is {rope_type!r}, but our rotation is the plain one, 'default'"
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if kind != "gpt2" and partial != 1.0:
        yield f"partial_rotary_factor is {partial}, but we rotate whole heads, 1.0"
    window = config.get("sliding_window")
    is_windowed = window is not None and window < int(config.get("max_position_embeddings") or 0)
    if is_windowed and (kind == "mixtral" or config.get("use_sliding_window")):
        yield f"sliding_window is {window}, but our attention has none: set it to null if you never go beyond it"
    if config.get("num_experts_per_tok") == 1 and (kind == "mixtral" or config.get("norm_topk_prob")):
        yield "num_experts_per_tok is 1 with weights that sum to 1: the router would learn nothing from the loss"
    wanted: dict[str, Any] = {
        "mixtral": {}, "qwen3": {"attention_bias": False}, "olmoe": {"clip_qkv": None},
        "llama": {"mlp_bias": bool(config.get("attention_bias", False))},
        "qwen3_moe": {"mlp_only_layers": []}, "qwen2_moe": {"mlp_only_layers": [], "qkv_bias": False},
        "glm4_moe": {"first_k_dense_replace": 0, "norm_topk_prob": True, "attention_bias": False},
        "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    }[kind]  # fmt: skip
    # what transformers takes where the key is missing, where that is not what we have
    missing = {"qkv_bias": True, "first_k_dense_replace": 1}
    if kind == "qwen3_moe" and int(config.get("decoder_sparse_step") or 1) > 1:
        wanted = wanted | {"attention_bias": False}
    for name, value in wanted.items():
        found = config.get(name, missing.get(name, value))
        if (found or None) != (value or None):
            yield f"{name} is {found}, but a {kind} that our model can be has {value if value is not None else 'null'}"
    if kind == "qwen2_moe":
        width, shared = config.get("moe_intermediate_size"), config.get("shared_expert_intermediate_size")
        if width and (not shared or shared % width):
            yield f"shared_expert_intermediate_size is {shared}, but must be moe_intermediate_size, {width}, times n"
