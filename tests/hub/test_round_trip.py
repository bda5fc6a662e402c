"""Models come from `transformers`, go back, and are the same: tensors bit for bit, scores to rounding, words too."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from own_runs import write_own_run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from moetrain.archive.doctor import examine
from moetrain.archive.expected import expected_tensors
from moetrain.archive.stored import Stored
from moetrain.config.checks import check
from moetrain.config.freeze import flatten, to_dict
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import end_of_text, train_tokenizer, vocabulary_size
from moetrain.errors import CheckpointError, ConfigError, DataError
from moetrain.hub.adopt import adopt
from moetrain.hub.export import export
from moetrain.hub.generate import load_model
from moetrain.hub.parity import our_scores, probe

VOCABULARY = 300
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": VOCABULARY,
         "initializer_range": 0.4}  # fmt: skip
MOE = {"num_experts_per_tok": 2}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", LLAMA | MOE | {"num_local_experts": 4}),
    "mixtral tied, wide heads": ("Mixtral", LLAMA | MOE | {"num_local_experts": 4, "tie_word_embeddings": True,
                                                           "head_dim": 8}),
    "olmoe": ("Olmoe", LLAMA | MOE | {"num_experts": 4}),
    "olmoe with biases": ("Olmoe", LLAMA | MOE | {"num_experts": 4, "attention_bias": True, "norm_topk_prob": True}),
    "qwen3_moe": ("Qwen3Moe", LLAMA | MOE | {"num_experts": 4, "moe_intermediate_size": 8, "norm_topk_prob": True,
                                             "head_dim": 8}),
    "qwen3_moe every other": ("Qwen3Moe", LLAMA | MOE | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 4,
                                                         "decoder_sparse_step": 2}),
    "qwen2_moe": ("Qwen2Moe", LLAMA | MOE | {"num_experts": 4, "moe_intermediate_size": 8, "qkv_bias": False,
                                             "shared_expert_intermediate_size": 16}),
    "glm4_moe": ("Glm4Moe", LLAMA | MOE | {"n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 2,
                                           "topk_group": 1, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0,
                                           "use_qk_norm": True, "head_dim": 4, "partial_rotary_factor": 1.0,
                                           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                               "partial_rotary_factor": 1.0}}),
    "llama": ("Llama", LLAMA),
    "llama with biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY,
                      "initializer_range": 0.4}),
    "gpt2 untied, relu": ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_inner": 24,
                                   "vocab_size": VOCABULARY, "activation_function": "relu",
                                   "tie_word_embeddings": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the state of the union is strong " * 3]), vocab_size=280)


@pytest.fixture
def save(tmp_path: Path, tokenizer: Tokenizer):
    """``save(kind, **changed)``: a directory with a random model of `transformers`."""

    def build(kind: str, **changed: Any) -> Path:
        name, settings = THEIRS[kind]
        torch.manual_seed(0)
        end = end_of_text(tokenizer)
        config = getattr(transformers, f"{name}Config")(
            **settings, bos_token_id=end, eos_token_id=end, pad_token_id=None
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # norms and biases too: at 1 and 0 it would not show where they went
                parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if "correction_bias" in name:
                    buffer.copy_(torch.randn_like(buffer) / 4)
        path = tmp_path / "theirs"
        model.save_pretrained(path, **changed)
        tokenizer.save(str(path / "tokenizer.json"))
        return path

    return build


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in directory.glob("*.safetensors") for name, each in load_file(path).items()}


def tensors_of_run(run_dir: Path) -> dict[str, torch.Tensor]:
    (directory,) = (run_dir / "checkpoints").glob("step_*")
    stored = Stored(directory)
    return {name: stored.read(name, 0, each.numel) for name, each in stored.tensors.items()}


def export_plainly(run_dir: Path, out: Path, **changed: Any) -> Any:
    wanted = {"step": None, "dtype": None, "shard_bytes": 1 << 30, "check": True, "warn": pytest.fail}
    return export(run_dir, out, **(wanted | changed))


@pytest.mark.parametrize("kind", THEIRS)
def test_a_model_comes_in_and_goes_out_as_it_was(kind, save, tmp_path, tokenizer):
    theirs = save(kind)
    came = adopt(theirs, tmp_path / "run", check=True, warn=pytest.fail)
    assert came.parity is not None
    assert came.parity.scale > 1, "a model that says nothing proves nothing"
    assert came.parity.largest < 2e-5 * came.parity.scale
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert [each for each in examine(checkpoint, expect=expected_tensors) if each.passed is False] == []
    check(came.run, flatten(to_dict(came.run)))

    went = export_plainly(tmp_path / "run", tmp_path / "out")
    assert went.parity.largest < 2e-5 * went.parity.scale
    before, after = tensors(theirs), tensors(tmp_path / "out")
    assert {name: each for name, each in before.items() if not torch.equal(each, after[name])} == {}
    assert went.family == json.loads((theirs / "config.json").read_text())["architectures"][0]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (theirs / "tokenizer.json").read_bytes()
    again = adopt(tmp_path / "out", tmp_path / "again", check=False, warn=pytest.fail)
    assert replace(again.run.model, moe=None) == replace(came.run.model, moe=None)
    if came.run.model.moe is not None:
        assert replace(again.run.model.moe, balance_weight=0) == replace(came.run.model.moe, balance_weight=0)
        assert again.run.model.moe.balance_weight == pytest.approx(came.run.model.moe.balance_weight)


OURS = {
    "mixtral": ModelConfig(moe=MoEConfig(num_experts=4, d_expert=24)),
    "gshard": ModelConfig(moe=MoEConfig(num_experts=4, d_expert=24, router="gshard")),
    "noisy_top_k": ModelConfig(moe=MoEConfig(num_experts=4, d_expert=24, router="noisy_top_k")),
    "olmoe, one expert": ModelConfig(
        qk_norm="all", moe=MoEConfig(num_experts=4, d_expert=24, router="switch", top_k=1)
    ),
    "qwen3_moe, every expert": ModelConfig(
        qk_norm="head", moe=MoEConfig(num_experts=4, top_k=4, d_expert=24, router="dense")
    ),
    "sinkhorn": ModelConfig(
        qk_norm="head",
        moe=MoEConfig(num_experts=4, router="sinkhorn", gate="softmax", allow_noncausal=True, d_expert=8),
    ),
    "qwen2_moe": ModelConfig(
        num_layers=3, moe=MoEConfig(num_experts=4, d_expert=8, every=3, num_shared_experts=2, shared_gate=True)
    ),
    "glm4_moe": ModelConfig(moe=MoEConfig(num_experts=4, d_expert=24, router="sigmoid_bias", num_shared_experts=1)),
    "llama, geglu": ModelConfig(activation="geglu", bias=True, moe=None),
    "gpt2 without biases": ModelConfig(positions="learned", norm="layernorm", activation="gelu", moe=None),
}
LOST = {"noisy_top_k": {"router.noise_weight"}}
"""What has no place in theirs, and no part in what the model says in evaluation."""


@pytest.fixture
def own(tmp_path: Path, tokenizer: Tokenizer):
    """``own(model)``: the run directory of a random model of ours."""

    def build(model: ModelConfig) -> Path:
        model = replace(model, vocab_size=VOCABULARY, context=32, d_model=16, num_heads=2, d_ff=24,
                        num_layers=min(3, model.num_layers))  # fmt: skip
        write_own_run(tmp_path / "own", model, tokenizer)
        return tmp_path / "own"

    return build


@pytest.mark.parametrize("kind", OURS)
def test_a_model_of_ours_goes_out_and_comes_back_bit_for_bit(kind, own, tmp_path):
    run_dir = own(OURS[kind])
    went = export_plainly(run_dir, tmp_path / "out")
    assert went.parity.scale > 1
    adopt(tmp_path / "out", tmp_path / "back", check=False, warn=pytest.fail)
    before, after = tensors_of_run(run_dir), tensors_of_run(tmp_path / "back")
    gone = {name for name in before if name not in after}
    assert {name.partition("feed_forward.")[2].partition("/")[0] for name in gone} == LOST.get(kind, set())
    assert [name for name in after if name in before and not torch.equal(after[name], before[name])] == []
    biases = {name for name in after if name not in before}
    # gpt2 has biases, and of those that we had none of, 0
    assert bool(biases) == (kind == "gpt2 without biases")
    assert all("bias" in name and not after[name].any() for name in biases)


@pytest.mark.parametrize("kind", OURS)
def test_transformers_writes_what_we_write(kind, own, tmp_path, tokenizer):
    run_dir = own(OURS[kind])
    export_plainly(run_dir, tmp_path / "out", check=False)
    prompt = [end_of_text(tokenizer), *tokenizer.encode("the state of").ids]
    _, gpt = load_model(run_dir, warn=pytest.fail)
    ours = list(prompt)
    while len(ours) < 30 and (ours[-1] != prompt[0] or len(ours) == len(prompt)):
        with torch.no_grad():
            ours.append(int(gpt(torch.tensor([ours])).logit_BSV[0, -1, : vocabulary_size(tokenizer)].argmax()))
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tokenizer.bos_token_id == prompt[0]
    assert their_tokenizer("the state of").input_ids == prompt[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=30 - len(prompt), do_sample=False)[0]
    assert theirs.tolist() == ours
    assert len(ours) > len(prompt) + 3


def test_many_files_are_one_model(own, tmp_path):
    run_dir = own(OURS["mixtral"])
    export_plainly(run_dir, tmp_path / "one")
    went = export_plainly(run_dir, tmp_path / "many", shard_bytes=20_000)
    assert went.files > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in many.values())
    largest = max(each.nbytes for each in many.values())
    for path in (tmp_path / "many").glob("*.safetensors"):
        assert sum(each.nbytes for each in load_file(path).values()) <= max(20_000, largest)


@pytest.mark.parametrize("kind", ["mixtral", "glm4_moe"])
def test_what_goes_out_in_bf16_is_compared_in_bf16(own, tmp_path, kind):
    run_dir = own(OURS[kind])
    went = export_plainly(run_dir, tmp_path / "out", dtype="bf16")
    assert went.parity.largest < 2e-5 * went.parity.scale
    back = adopt(tmp_path / "out", tmp_path / "the way back", check=True, warn=pytest.fail)
    assert (back.run.model.dtype, back.run.name, back.experiment) == ("bf16", "the_way_back", "the_way_back")
    export_plainly(tmp_path / "the way back", tmp_path / "again")
    once, twice = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert all(torch.equal(once[name], twice[name]) for name in once)
    fp32 = tensors_of_run(run_dir)["embedding.weight/fp32"].view(VOCABULARY, -1)
    assert torch.equal(tensors(tmp_path / "out")["model.embed_tokens.weight"], fp32.bfloat16())


def test_gpt2_is_known_by_its_short_names_too(save, tmp_path):
    """As it lies on the hub: without the model's name before the tensors', and with buffers that nobody reads."""
    path = save("gpt2")
    held = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): each for name, each in held.items()}
    assert short.keys() != held.keys()
    short["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(short, path / "model.safetensors", metadata={"format": "pt"})
    came = adopt(path, tmp_path / "run", check=True, warn=pytest.fail)
    assert came.parity.largest < 2e-5 * came.parity.scale


def test_the_card_says_how_it_was_trained(own, tmp_path):
    export_plainly(own(OURS["mixtral"]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("MixtralForCausalLM", "4 experts, 2 for each token", "3,584 tokens in 7 steps", "3.2500 nats"):
        assert fact in card


def test_every_setting_in_the_way_is_told_at_once(own, tmp_path):
    model = ModelConfig(norm="layernorm", activation="gelu", moe=MoEConfig(num_experts=4, top_k=1, router="hash"))
    with pytest.raises(ConfigError) as caught:
        export_plainly(own(replace(model, moe=replace(model.moe, router="switch"), bias=True)), tmp_path / "out")
    told = str(caught.value)
    for setting in ("model.norm is layernorm", "model.activation is gelu", "model.qk_norm is null"):
        assert setting in told
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_says_something_else_is_not_left_there(own, tmp_path, monkeypatch):
    from moetrain.hub import export as module

    run_dir = own(OURS["mixtral"])
    real = module.config_of
    monkeypatch.setattr(module, "config_of", lambda *a, **k: real(*a, **k) | {"rms_norm_eps": 0.5})
    with pytest.raises(CheckpointError, match="transformers makes something else"):
        export_plainly(run_dir, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_rounding_is_what_the_last_bit_of_every_weight_does(own):
    _, gpt = load_model(own(OURS["mixtral"]), warn=pytest.fail)
    before = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    calm = our_scores(gpt, probe(VOCABULARY, context=32), dtype=torch.float32)
    assert 0 < calm.rounding < 1e-4 * calm.score_BSV.abs().max()
    for name, parameter in gpt.named_parameters():
        moved = (parameter.double() / before[name].double() - 1).abs()
        assert 0 < moved.max() <= 2**-22, name


def test_what_is_there_already_stays(own, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_plainly(own(OURS["mixtral"]), tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        adopt(tmp_path / "nowhere", tmp_path / "out", check=False, warn=pytest.fail)


def _shorten(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def _rewrite(path: Path, change: Any) -> None:
    held = load_file(path / "model.safetensors")
    change(held)
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})


GATE = "model.layers.1.block_sparse_moe.gate.weight"
FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "cut short": (_shorten, CheckpointError, "model.safetensors is cut short or damaged"),
    "a key is missing": (lambda path: _rewrite(path, lambda held: held.pop(GATE)), CheckpointError, f"missing: {GATE}"),
    "a key too many": (
        lambda path: _rewrite(path, lambda held: held.update(extra=torch.zeros(2))), CheckpointError,
        "theirs is not what its config.json says: not part of such a model: extra",
    ),
    "another shape": (
        lambda path: _rewrite(path, lambda held: held.update({GATE: torch.zeros(5, 16)})), CheckpointError,
        rf"{GATE} \[5, 16\] instead of \[4, 16\]",
    ),
    "integers": (
        lambda path: _rewrite(path, lambda held: held.update({GATE: torch.zeros(4, 16, dtype=torch.int8)})),
        CheckpointError, f"no fp32, bf16 or fp16: {GATE} I8",
    ),
    "not a number": (
        lambda path: _rewrite(path, lambda held: held[GATE].view(-1)[3:4].fill_(math.nan)), CheckpointError,
        f"holds NaN or infinity in {GATE}",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), CheckpointError, "holds no weights"),
    "pickled weights": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), CheckpointError, "pickled weights"
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), DataError, "tokenizer.json is not a file"),
    "no config": (lambda path: (path / "config.json").unlink(), CheckpointError, "config.json does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_model_is_named(fault, save, tmp_path):
    spoil, kind, told = FAULTS[fault]
    path = save("mixtral")
    spoil(path)
    with pytest.raises(kind, match=told):
        adopt(path, tmp_path / "run", check=False, warn=pytest.fail)
    assert not list(tmp_path.glob("run*"))


def test_a_file_that_the_index_names_must_be_there(save, tmp_path):
    path = save("mixtral", max_shard_size="20KB")
    next(iter(sorted(path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match=r"is missing, but model\.safetensors\.index\.json names it"):
        adopt(path, tmp_path / "run", check=False, warn=pytest.fail)


def test_another_models_tokenizer_is_told(save, tmp_path):
    path = save("mixtral")
    train_tokenizer(iter([chr(x) * 2 + chr(x + 1) for x in range(65, 500)]), vocab_size=400).save(
        str(path / "tokenizer.json")
    )
    with pytest.raises(DataError, match="it is another model's tokenizer"):
        adopt(path, tmp_path / "run", check=False, warn=pytest.fail)
    train_tokenizer(iter(["aa"]), vocab_size=260).save(str(path / "tokenizer.json"))
    told: list[str] = []
    adopt(path, tmp_path / "run", check=False, warn=told.append)
    assert [each.partition("tokenizer.json ")[2] for each in told] == [
        "has 257 ids, but the model 300 rows: is it another model's?"
    ]


@pytest.mark.parametrize(
    ("kind", "changed", "told"),
    [
        ("mixtral", {"model_type": "mamba"}, "model_type is 'mamba', but must be one of mixtral, olmoe"),
        ("mixtral", {"sliding_window": 8}, "sliding_window is 8"),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("llama", {"hidden_size": None}, "hidden_size is None, but must be a number"),
        ("llama", {"num_attention_heads": 3}, "model.num_kv_heads is 2, but must divide model.num_heads, 3"),
        ("llama", {"hidden_act": "tanh"}, "hidden_act is 'tanh', but must be one of silu, gelu"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True, but a llama that our model can be has False"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv is 3.0, but a olmoe"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers is"),
        ("glm4_moe", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ],
)  # fmt: skip
def test_what_our_model_cannot_be_is_told(kind, changed, told, save, tmp_path):
    path = save(kind)
    config = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json: ") as caught:
        adopt(path, tmp_path / "run", check=False, warn=pytest.fail)
    assert told in str(caught.value)
    shutil.rmtree(path)
