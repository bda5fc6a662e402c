"""llama.cpp reads what leaves as GGUF, and says what our model says: tokens, scores and words."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_runs import write_own_run
from tokenizers import Tokenizer

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import end_of_text, train_tokenizer
from moetrain.errors import ConfigError
from moetrain.hub.generate import load_model
from moetrain.hub.gguf.export import FILE, export_gguf
from moetrain.model.gpt import GPT

pytest.importorskip("gguf", reason="needs gguf: pip install 'moetrain[gguf]'")

MIXTRAL = ModelConfig(vocab_size=300, context=48, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=24,
                      moe=MoEConfig(num_experts=4, top_k=2, d_expert=16))  # fmt: skip
MODELS = {
    "mixtral": MIXTRAL,
    "mixtral tied, wide heads": replace(MIXTRAL, tie_embeddings=True, d_head=16),
    "llama": replace(MIXTRAL, moe=None),
    "olmoe": replace(MIXTRAL, qk_norm="all", num_kv_heads=None, tie_embeddings=True,
                     moe=replace(MIXTRAL.moe, renormalize=False)),
    "qwen3_moe": replace(MIXTRAL, qk_norm="head", d_head=16),
    "qwen2_moe": replace(MIXTRAL, tie_embeddings=True, moe=replace(
        MIXTRAL.moe, router="switch", top_k=1, num_shared_experts=2, shared_gate=True)),
    "qwen3": replace(MIXTRAL, qk_norm="head", moe=None),
}  # fmt: skip
TEXT = "The state's of 12 and 345 unions:\n\n  it isn't strong, is it?  "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT * 3, "is it strong? the union is " * 3]), vocab_size=290)


class Cpp:
    """A GGUF file in llama.cpp, keys and values in fp32."""

    def __init__(self, path: Path) -> None:
        bindings = pytest.importorskip("xllamacpp", reason="needs xllamacpp, llama.cpp's bindings")
        params = bindings.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
        params.cache_type_k = params.cache_type_v = bindings.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = bindings.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = bindings.Server(params)

    def log_probabilities(self, ids: list[int], *, tokens: int) -> torch.Tensor:
        """Of what follows, [V]."""
        # what is drawn must be a letter, or nothing is told; the probabilities are those before the bias
        asked = {"prompt": ids, "n_predict": 1, "n_probs": tokens, "logit_bias": [["a", 1000]], "cache_prompt": False}
        (told,) = self.server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        found = {each["id"]: each["logprob"] for each in told["top_logprobs"]}
        return torch.tensor([found[i] for i in range(tokens)])

    def post(self, path: str, **body: Any) -> Any:
        """What its server answers."""
        address = f"{self.server.listening_address}{path}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture
def exported(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    """``exported(model, **how)``: our model, and what llama.cpp makes of its file."""

    def build(model: ModelConfig, *, dtype: str | None = None, **data: Any) -> tuple[GPT, Cpp]:
        write_own_run(tmp_path / "run", model, tokenizer, **data)
        export_gguf(tmp_path / "run", tmp_path / "out", step=None, dtype=dtype, warn=pytest.fail)
        _, gpt = load_model(tmp_path / "run", warn=pytest.fail)
        return gpt, Cpp(tmp_path / "out" / FILE)

    return build


def ours(gpt: GPT, ids: list[int], *, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return gpt(torch.tensor([ids])).logit_BSV[0, -1, :tokens].log_softmax(-1)


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_says_what_we_say(exported, tokenizer, kind):
    gpt, cpp = exported(MODELS[kind])
    tokens = tokenizer.get_vocab_size()
    ids = [end_of_text(tokenizer), *tokenizer.encode(TEXT).ids][:20]
    while len(ids) < 40:
        expected = ours(gpt, ids, tokens=tokens)
        assert expected.min() < -5, "a model that says nothing proves nothing"
        if len(ids) % 5 == 0:
            found = cpp.log_probabilities(ids, tokens=tokens)
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        ids.append(1 + int(expected[1:].argmax()))
    asked = {"prompt": ids[:20], "n_predict": 20, "temperature": 0.0, "return_tokens": True, "ignore_eos": True}
    assert cpp.post("/completion", **asked)["tokens"] == ids[20:]


@pytest.mark.parametrize(("dtype", "rounded"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_smaller_weights_are_rounded_and_no_more(exported, tokenizer, dtype, rounded):
    gpt, cpp = exported(MIXTRAL, dtype=dtype)
    ids, tokens = [end_of_text(tokenizer), *tokenizer.encode(TEXT).ids][:40], tokenizer.get_vocab_size()
    exactly = ours(gpt, ids, tokens=tokens)
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if parameter.dim() > 1 and "router" not in name:
                parameter.copy_(parameter.to(rounded))
    expected, found = ours(gpt, ids, tokens=tokens), cpp.log_probabilities(ids, tokens=tokens)
    # llama.cpp rounds what a matrix is multiplied with, too: as much again
    assert (found - expected).abs().max() < 3 * (exactly - expected).abs().max()


def test_the_tokenizer_cuts_as_ours_and_begins_a_document(exported, tokenizer):
    _, cpp = exported(MIXTRAL, format="instruction")
    end = end_of_text(tokenizer)
    for text in (TEXT, "", " ", "don't  DON'T 1234 \t\n x", "é 😀 ÿ"):
        assert cpp.post("/tokenize", content=text)["tokens"] == tokenizer.encode(text).ids, text
    assert cpp.post("/tokenize", content="is", add_special=True)["tokens"] == [end, *tokenizer.encode("is").ids]
    messages = [{"role": "user", "content": "Is it?"}]
    assert "### User:\nIs it?\n### Assistant:\n" in cpp.post("/apply-template", messages=messages)["prompt"]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (replace(MIXTRAL, moe=replace(MIXTRAL.moe, router="sigmoid_bias", num_shared_experts=1)),
         ["what leaves as glm4_moe has no place"]),
        (replace(MODELS["olmoe"], bias=True, num_kv_heads=1, moe=replace(MIXTRAL.moe, renormalize=True)),
         ["model.bias is true", "model.num_kv_heads is 1", "the weights of olmoe sum to less than 1"]),
        (replace(MODELS["qwen3_moe"], activation="geglu", moe=replace(MIXTRAL.moe, renormalize=False, every=2)),
         ["model.activation is geglu", "model.moe.every is 2", "the weights of qwen3_moe sum to 1"]),
    ],
)  # fmt: skip
def test_every_setting_in_the_way_is_told_at_once(tmp_path, tokenizer, model, told):
    write_own_run(tmp_path / "run", model, tokenizer)
    with pytest.raises(ConfigError) as caught:
        export_gguf(tmp_path / "run", tmp_path / "out", step=None, dtype=None, warn=pytest.fail)
    assert [each for each in told if each not in str(caught.value)] == [], str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_that_splits_otherwise_is_told(tmp_path):
    unigram = train_tokenizer(iter([TEXT * 9]), vocab_size=290, kind="unigram")
    write_own_run(tmp_path / "run", MIXTRAL, unigram)
    with pytest.raises(ConfigError, match="the tokenizer is no byte-level BPE that splits as GPT-2's"):
        export_gguf(tmp_path / "run", tmp_path / "out", step=None, dtype=None, warn=pytest.fail)
