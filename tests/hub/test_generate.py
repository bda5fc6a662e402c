"""A model writes: reproducibly, whole characters, to the end of the document, within its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from moetrain.checkpoint import state, store
from moetrain.config.freeze import freeze, to_dict, write_run
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import end_of_text, train_tokenizer
from moetrain.errors import CheckpointError, ConfigError
from moetrain.hub.generate import generate, load_model
from moetrain.model.build import build_model, initialize
from moetrain.model.gpt import GPT, GPTOutput

CONTEXT = 12
TEXT = "the state of the union is strong, señor; the price was 5 € or 😀 smiles. "
MODEL = ModelConfig(
    vocab_size=320, context=CONTEXT, num_layers=2, d_model=16, num_heads=2, d_ff=32, init_std=0.4,
    moe=MoEConfig(num_experts=3, d_expert=16),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter([TEXT * 3]), vocab_size=300)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    gpt = build_model(MODEL)
    initialize(gpt, init_std=MODEL.init_std, seed=1)
    return gpt.eval()


class Scripted:
    """Stands for a model: scores one token after another highest, whatever came before; keeps what it was asked."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.asked = list(ids), []

    def __call__(self, token_BS: torch.Tensor) -> GPTOutput:
        self.asked.append(token_BS[0].tolist())
        logit_BSV = torch.zeros(1, token_BS.shape[1], MODEL.vocab_size)
        logit_BSV[0, -1, self.ids[len(self.asked) - 1]] = 50.0
        return GPTOutput(logit_BSV=logit_BSV, moe=[])


def pieces(gpt: Any, tokenizer: Tokenizer, **changed: Any) -> list[str]:
    wanted = {"prompt": "the", "max_tokens": 30, "temperature": 1.0, "top_k": 0, "seed": 0, "context": CONTEXT}
    return list(generate(gpt, tokenizer, **(wanted | changed)))


def bytes_as_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each byte, as the worst of tokenizers would."""
    return [tokenizer.token_to_id(_byte_letter(byte)) for byte in text.encode()]


def _byte_letter(byte: int) -> str:
    """How byte-level BPE writes a byte (GPT-2's encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def test_the_same_seed_writes_the_same_and_another_seed_another_text(gpt, tokenizer):
    first = pieces(gpt, tokenizer, seed=3)
    assert first == pieces(gpt, tokenizer, seed=3)
    assert first != pieces(gpt, tokenizer, seed=4)


def test_the_text_does_not_depend_on_draws_made_elsewhere(gpt, tokenizer):
    torch.manual_seed(1)
    first = pieces(gpt, tokenizer)
    torch.manual_seed(2)
    assert pieces(gpt, tokenizer) == first


def greedy(gpt: GPT, tokenizer: Tokenizer, prompt: str, *, number: int) -> str:
    ids = [end_of_text(tokenizer), *tokenizer.encode(prompt).ids]
    before = len(ids)
    while len(ids) < before + number:
        with torch.no_grad():
            scores = gpt(torch.tensor([ids[-CONTEXT:]])).logit_BSV[0, -1, : tokenizer.get_vocab_size()]
        ids.append(max(range(len(scores)), key=lambda id_: float(scores[id_])))
        if ids[-1] == end_of_text(tokenizer):
            break
    return tokenizer.decode(ids[before:])


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.0, "top_k": 7}])
@pytest.mark.parametrize("prompt", ["", "the state", "the state of the union is strong, the state of the union"])
def test_no_temperature_or_a_single_candidate_is_the_likeliest_token_always(gpt, tokenizer, prompt, how):
    written = "".join(pieces(gpt, tokenizer, prompt=prompt, max_tokens=20, **how))
    assert written == greedy(gpt, tokenizer, prompt, number=20).rstrip("\ufffd")


def test_a_tiny_temperature_is_the_likeliest_token_too(gpt, tokenizer):
    cold = pieces(gpt, tokenizer, temperature=1e-38)
    assert cold == pieces(gpt, tokenizer, temperature=0.0)


def test_only_the_likeliest_are_drawn(tokenizer):
    """Of three candidates with equal scores all are drawn, of the rest none."""
    chosen = bytes_as_ids(tokenizer, "xyz")

    class Three(Scripted):
        def __call__(self, token_BS: torch.Tensor) -> GPTOutput:
            logit_BSV = torch.zeros(1, token_BS.shape[1], MODEL.vocab_size)
            logit_BSV[0, -1, chosen] = 1.0
            return GPTOutput(logit_BSV=logit_BSV, moe=[])

    written = "".join(pieces(Three([]), tokenizer, top_k=3, max_tokens=60, temperature=5.0))
    assert set(written) == set("xyz")
    assert set("".join(pieces(Three([]), tokenizer, top_k=0, max_tokens=60, temperature=5.0))) - set("xyz")


def test_a_top_k_beyond_the_vocabulary_is_the_whole_vocabulary(gpt, tokenizer):
    assert pieces(gpt, tokenizer, top_k=10_000) == pieces(gpt, tokenizer, top_k=0)


def test_it_stops_at_the_end_of_the_document_and_does_not_write_it(tokenizer):
    ids = [*bytes_as_ids(tokenizer, "so."), end_of_text(tokenizer), *bytes_as_ids(tokenizer, "no")]
    assert "".join(pieces(Scripted(ids), tokenizer, temperature=0.0)) == "so."


def test_it_stops_at_the_number_of_tokens(tokenizer):
    model = Scripted(bytes_as_ids(tokenizer, "abcdefgh"))
    assert "".join(pieces(model, tokenizer, temperature=0.0, max_tokens=5)) == "abcde"
    assert len(model.asked) == 5


def test_rows_past_the_vocabulary_are_never_written(tokenizer):
    row = tokenizer.get_vocab_size()
    assert row < MODEL.vocab_size
    model = Scripted([row] * 10)
    pieces(model, tokenizer, temperature=0.0, max_tokens=10)
    assert all(max(ids) < row for ids in model.asked)


def test_a_character_of_several_bytes_comes_out_whole(tokenizer):
    text = "5 € é 😀!"
    ids = bytes_as_ids(tokenizer, text)
    assert len(ids) > len(text)
    assert pieces(Scripted(ids), tokenizer, temperature=0.0, max_tokens=len(ids)) == list(text)


def test_a_character_cut_off_at_the_end_does_not_hide_what_came_before(tokenizer):
    ids = bytes_as_ids(tokenizer, "ab€")[:-1]
    assert "".join(pieces(Scripted(ids), tokenizer, temperature=0.0, max_tokens=len(ids))) == "ab"


def test_bytes_that_are_no_character_do_not_stop_the_rest(tokenizer):
    broken = bytes_as_ids(tokenizer, "€")[:2]
    ids = [*bytes_as_ids(tokenizer, "a"), *broken, *bytes_as_ids(tokenizer, "bc")]
    written = "".join(pieces(Scripted(ids), tokenizer, temperature=0.0, max_tokens=len(ids)))
    assert (written[0], written[-2:]) == ("a", "bc")
    assert set(written[1:-2]) == {"\ufffd"}


def test_the_prompt_is_read_and_not_written(tokenizer):
    model = Scripted(bytes_as_ids(tokenizer, "x"))
    assert pieces(model, tokenizer, prompt="the", temperature=0.0, max_tokens=1) == ["x"]
    assert model.asked == [[end_of_text(tokenizer), *tokenizer.encode("the").ids]]


def test_no_prompt_begins_a_document(tokenizer):
    model = Scripted(bytes_as_ids(tokenizer, "x"))
    pieces(model, tokenizer, prompt="", temperature=0.0, max_tokens=1)
    assert model.asked == [[end_of_text(tokenizer)]]


def test_a_prompt_longer_than_the_context_is_read_from_its_end(tokenizer):
    prompt = TEXT * 2
    ids = tokenizer.encode(prompt).ids
    assert len(ids) > CONTEXT
    model = Scripted(bytes_as_ids(tokenizer, "xy"))
    pieces(model, tokenizer, prompt=prompt, temperature=0.0, max_tokens=2)
    assert model.asked == [ids[-CONTEXT:], [*ids[-CONTEXT + 1 :], *bytes_as_ids(tokenizer, "x")]]


def test_a_prompt_that_spells_the_end_of_text_is_text(tokenizer):
    model = Scripted(bytes_as_ids(tokenizer, "x"))
    pieces(model, tokenizer, prompt="<|endoftext|>", temperature=0.0, max_tokens=1, context=100)
    assert model.asked[0].count(end_of_text(tokenizer)) == 1


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("router", ["top_k", "sigmoid_bias", "hash"])
def test_a_checkpoint_gives_back_the_model_that_was_saved(router, tmp_path, alone):
    top_k = 1 if router == "hash" else MODEL.moe.top_k
    model = replace(MODEL, moe=replace(MODEL.moe, router=router, top_k=top_k))
    # the table of a hash router is read back, not made again from data that may have changed
    gpt = build_model(model, expert_V=torch.arange(model.vocab_size) % 2)
    initialize(gpt, init_std=MODEL.init_std, seed=1)
    for tensor in gpt.moe_state().values():
        if tensor.is_floating_point():
            tensor += torch.tensor([0.5, -0.25, 0.125])
    run = freeze({"name": "a", "model": to_dict(freeze({}))["model"] | vars(model) | {"moe": vars(model.moe)}})
    write_run(run, tmp_path)
    saved = dict(gpt.named_parameters()) | gpt.moe_state()
    assert len(gpt.moe_state()) == (2 if router == "top_k" else 4)
    kinds = {name: "state" if name in gpt.moe_state() else "fp32" for name in saved}
    fragments = [state.Fragment(f"{n}/{kinds[n]}", p.detach().view(-1), 0, p.numel()) for n, p in saved.items()]
    manifest = store.Manifest(step=3, tokens=0, seed=0, world_size=1, expert_parallel=1, run={}, data={}, files=[])
    state.save(tmp_path / "checkpoints", fragments, manifest=manifest, group=alone)
    found, loaded = load_model(tmp_path, warn=pytest.fail)
    assert found == run
    assert not loaded.training
    parameters = dict(loaded.named_parameters()) | loaded.moe_state()
    assert parameters.keys() == saved.keys()
    assert all(torch.equal(parameters[name], saved[name]) for name in saved)


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(ConfigError, match="does not exist: name the directory of a run"):
        load_model(tmp_path, warn=pytest.fail)
    write_run(freeze({}), tmp_path)
    with pytest.raises(CheckpointError, match="has no whole checkpoint yet: train it first"):
        load_model(tmp_path, warn=pytest.fail)
