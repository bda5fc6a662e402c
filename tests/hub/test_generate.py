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
from moetrain.config.routers import sees_others
from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import end_of_text, train_tokenizer
from moetrain.errors import CheckpointError, ConfigError
from moetrain.hub.generate import Sampling, Written, generate, load_model
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
        self.device = torch.device("cpu")

    def __call__(self, token_BS: torch.Tensor) -> GPTOutput:
        self.asked.append(token_BS[0].tolist())
        logit_BSV = torch.zeros(1, token_BS.shape[1], MODEL.vocab_size)
        logit_BSV[0, -1, self.ids[len(self.asked) - 1]] = 50.0
        return GPTOutput(logit_BSV=logit_BSV, moe=[])


def pieces(gpt: Any, tokenizer: Tokenizer, **changed: Any) -> list[str]:
    return [piece.text for piece in written(gpt, tokenizer, **changed)]


def written(gpt: Any, tokenizer: Tokenizer, **changed: Any) -> list[Written]:
    given = {"prompt": "the", "context": CONTEXT, "cache": isinstance(gpt, GPT), "watch": None}
    given |= {"max_tokens": 30, "temperature": 1.0, "top_k": 0, "seed": 0}
    given |= changed
    names = ("prompt", "context", "cache", "watch")
    prompt, context, cache, watch = (given.pop(name) for name in names)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return list(generate(gpt, tokenizer, prompts, sampling=Sampling(**given), context=context, cache=cache,
                         watch=watch))  # fmt: skip


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


ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {}, "gshard": {}, "noisy_top_k": {}, "sinkhorn": {"allow_noncausal": True}, "sigmoid_bias": {},
    "switch": {"top_k": 1}, "hash": {"top_k": 1}, "dense": {"top_k": 3},
    "top_k with dropped copies in training": {"router": "top_k", "capacity_factor": 1.0},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {"num_heads": 4, "num_kv_heads": 2, "moe": None},
    "learned positions": {"positions": "learned", "norm": "layernorm", "bias": True, "moe": None},
    "norms of queries and keys": {"qk_norm": "head", "moe": None},
    "norms of all queries and keys": {"qk_norm": "all", "num_kv_heads": 1, "moe": None},
}
MODELS = {
    **{name: replace(MODEL, moe=replace(MODEL.moe, **({"router": name} | own))) for name, own in ROUTERS.items()},
    **{name: replace(MODEL, **changed) for name, changed in VARIANTS.items()},
}


def model_of(kind: str) -> GPT:
    model = MODELS[kind]
    assert sees_others(model.moe) is None
    gpt = build_model(model, expert_V=torch.arange(model.vocab_size) % 3)
    initialize(gpt, init_std=MODEL.init_std, seed=2)
    return gpt.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_changes_no_token(kind, tokenizer):
    """Also past the context, where there is nothing to keep."""
    gpt, prompts = model_of(kind), ["the state", "", "the state of the union"]
    how = {"prompt": prompts, "max_tokens": 20, "temperature": 0.0}
    kept = written(gpt, tokenizer, cache=True, **how)
    assert kept == written(gpt, tokenizer, cache=False, **how)
    assert len(kept) > 10


def test_the_cache_reads_each_token_once(gpt, tokenizer, monkeypatch):
    asked: list[int] = []
    real = GPT.forward

    def forward(self: GPT, token_BS: torch.Tensor, *args: Any, **kwargs: Any) -> GPTOutput:
        asked.append(token_BS.numel())
        return real(self, token_BS, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", forward)
    pieces(gpt, tokenizer, prompt="", max_tokens=8, temperature=0.0, context=100)
    assert asked == [1] * len(asked)


def test_several_prompts_get_what_each_gets_alone(gpt, tokenizer):
    prompts = ["the state of the union is", "", "strong"]
    together = written(gpt, tokenizer, prompt=prompts, seed=5, max_tokens=9)
    for number, prompt in enumerate(prompts):
        alone = "".join(pieces(gpt, tokenizer, prompt=prompt, seed=5 + number, max_tokens=9))
        assert "".join(piece.text for piece in together if piece.row == number) == alone


@pytest.mark.parametrize("stop", [("ef",), ("zz", "def"), ("d", "ef"), ("efgh!", "g", "ef")])
def test_it_ends_before_a_stop_and_shows_nothing_of_it(tokenizer, stop):
    ids = bytes_as_ids(tokenizer, "abcdefgh")
    end = min(at for text in stop if (at := "abcdefgh".find(text)) >= 0)
    model = Scripted(ids)
    shown = pieces(model, tokenizer, temperature=0.0, max_tokens=8, stop=stop)
    assert "".join(shown) == "abcdefgh"[:end]


def test_what_only_looked_like_a_stop_is_shown_in_the_end(tokenizer):
    ids = bytes_as_ids(tokenizer, "abcd")
    assert "".join(pieces(Scripted(ids), tokenizer, temperature=0.0, max_tokens=4, stop=("de",))) == "abcd"
    assert pieces(Scripted(ids), tokenizer, temperature=0.0, max_tokens=4, stop=("bx",)) == ["a", "bc", "d"]


def test_a_stop_in_the_prompt_stops_nothing(tokenizer):
    ids = bytes_as_ids(tokenizer, "xyz")
    assert (
        "".join(pieces(Scripted(ids), tokenizer, prompt="the", temperature=0.0, max_tokens=3, stop=("the",))) == "xyz"
    )


def test_the_nucleus_holds_its_share_of_the_probability(tokenizer):
    """Of probabilities 4/7, 2/7 and 1/7 the first two hold 0.8; the first alone holds 0.5."""
    chosen = bytes_as_ids(tokenizer, "xyz")

    class Three(Scripted):
        def __call__(self, token_BS: torch.Tensor) -> GPTOutput:
            logit_BSV = torch.full((1, token_BS.shape[1], MODEL.vocab_size), -1e9)
            logit_BSV[0, -1, chosen] = torch.tensor([4.0, 2.0, 1.0]).log()
            return GPTOutput(logit_BSV=logit_BSV, moe=[])

    for top_p, letters in ((1.0, "xyz"), (0.8, "xy"), (0.5, "x"), (1e-9, "x")):
        assert set("".join(pieces(Three([]), tokenizer, top_p=top_p, max_tokens=60))) == set(letters), top_p


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_piece_tells_what_its_token_chose(gpt, tokenizer, layer, cache):
    got = written(gpt, tokenizer, prompt=["the state", ""], temperature=0.0, max_tokens=6, context=100, watch=layer,
                  cache=cache)  # fmt: skip
    assert [(piece.row, piece.text) for piece in sorted(got, key=lambda piece: piece.row)] == [
        (row, text)
        for row, prompt in enumerate(["the state", ""])
        for text in pieces(gpt, tokenizer, prompt=prompt, temperature=0.0, max_tokens=6, context=100)
    ]
    text = "".join(piece.text for piece in got if piece.row == 0)
    ids = [end_of_text(tokenizer), *tokenizer.encode("the state").ids]
    while len(tokenizer.decode(ids)) < len("the state" + text):
        with torch.no_grad():
            ids.append(int(gpt(torch.tensor([ids])).logit_BSV[0, -1, : tokenizer.get_vocab_size()].argmax()))
    with torch.no_grad():
        choice = gpt(torch.tensor([ids])).moe[layer].choice.expert_TK
    pieces_of_first = [piece for piece in got if piece.row == 0]
    if len(pieces_of_first) == 6:  # each token was a piece
        assert [piece.experts for piece in pieces_of_first] == [tuple(each) for each in choice[-6:].tolist()]
    assert all(len(piece.experts) == 2 for piece in got)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"router": "expert_choice", "allow_noncausal": True}, "expert_choice"),
        ({"router": "balanced"}, "balanced"),
        ({"evaluation_capacity_factor": 1.0}, "evaluation_capacity_factor"),
    ],
)
def test_where_tokens_depend_on_each_other_there_is_no_cache(changed, reason):
    assert reason in sees_others(replace(MODEL.moe, **changed))


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
