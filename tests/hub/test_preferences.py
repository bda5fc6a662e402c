"""Preferences by TRL: the recipe runs on an exported model, and what comes out says what it should, to us too."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from own_runs import write_own_run
from tokenizers import Tokenizer

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import end_of_text, train_tokenizer
from moetrain.evaluation.harness import likelihoods
from moetrain.hub.adopt import adopt
from moetrain.hub.export import export
from moetrain.hub.generate import load_model

MODEL = ModelConfig(vocab_size=300, context=32, num_layers=2, d_model=16, num_heads=2, d_ff=24,
                    moe=MoEConfig(num_experts=3, top_k=2, d_expert=8))  # fmt: skip
PAIRS = [{"prompt": f"{a} and {b} is", "chosen": f" {a + b}, friend", "rejected": f" {a * b + 40} or so"}
         for a in range(8) for b in range(5)]  # fmt: skip
HELD_OUT = PAIRS[-4:]
BETA = 0.5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["1 and 2 is 3, friend or 42 or so " * 3]), vocab_size=290)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A directory with a run in run, the same exported in hf, and pairs.jsonl."""
    place = tmp_path_factory.mktemp("preferences")
    write_own_run(place / "run", MODEL, tokenizer, spread=0.05)
    export(place / "run", place / "hf", step=None, dtype=None, shard_bytes=1 << 30, check=False, warn=pytest.fail)
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return place


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``script(*words)``: name -> (before, after), as the script tells it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import preferences

    def run(*words: str) -> dict[str, tuple[float, float]]:
        monkeypatch.setattr(sys, "argv", ["preferences.py", *words])
        preferences.main()
        rows = re.findall(r"^(\w+) +(\S+) before +(\S+) after$", capsys.readouterr().out, flags=re.MULTILINE)
        return {name: (float(before), float(after)) for name, before, after in rows}

    return run


def margins(run_dir: Path, tokenizer: Tokenizer) -> list[float]:
    """How much likelier our model holds what is chosen than what is not, nats, for each held-out pair."""
    _, gpt = load_model(run_dir, warn=pytest.fail)
    end, found = end_of_text(tokenizer), []
    for pair in HELD_OUT:
        before = [end, *tokenizer.encode(pair["prompt"]).ids]
        answers = [[*tokenizer.encode(pair[name]).ids, end] for name in ("chosen", "rejected")]
        (chosen, _), (rejected, _) = likelihoods(gpt, [(before, answer) for answer in answers], context=MODEL.context)
        found.append(chosen - rejected)
    return found


def test_dpo_makes_the_chosen_likelier_and_the_model_comes_back(script, place, tokenizer):
    pytest.importorskip("trl", reason="needs trl: pip install 'moetrain[trl]'")
    told = script("dpo", str(place / "hf"), str(place / "pairs.jsonl"), str(place / "dpo"), "--lr", "3e-3",
                  "--epochs", "4", "--beta", str(BETA))  # fmt: skip
    assert told["loss"][1] < told["loss"][0] - 0.2
    assert told["margins"][0] == pytest.approx(0, abs=1e-4)
    assert told["accuracies"][1] == 1
    came = adopt(place / "dpo", place / "tuned", check=True, warn=pytest.fail)
    assert came.run.model.moe.num_experts == 3
    gained = [after - before for after, before in
              zip(margins(place / "tuned", tokenizer), margins(place / "run", tokenizer), strict=True)]  # fmt: skip
    assert min(gained) > 0
    assert told["margins"][1] == pytest.approx(BETA * sum(gained) / len(gained), rel=1e-3)


def test_a_reward_model_orders_the_pairs(script, place):
    pytest.importorskip("trl", reason="needs trl: pip install 'moetrain[trl]'")
    told = script("reward", str(place / "hf"), str(place / "pairs.jsonl"), str(place / "reward"), "--lr", "3e-3",
                  "--epochs", "4")  # fmt: skip
    assert told["loss"][1] < told["loss"][0] - 0.2
    assert told["accuracy"][1] == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "reward").eval()
    gaps = []
    for pair in HELD_OUT:
        with torch.no_grad():
            chosen, rejected = (
                float(model(torch.tensor([tokenizer(tokenizer.bos_token + pair["prompt"] + pair[name] +
                                                    tokenizer.eos_token).input_ids])).logits)
                for name in ("chosen", "rejected")
            )  # fmt: skip
        gaps.append(chosen - rejected)
    assert min(gaps) > 0
    assert told["margin"][1] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)


def test_rloo_earns_more_of_the_reward_and_the_model_comes_back(script, place):
    pytest.importorskip("trl", reason="needs trl: pip install 'moetrain[trl]'")
    # a judge of strong words: what a weak one gives to 40 answers is lost in the noise of drawing them
    script("reward", str(place / "hf"), str(place / "pairs.jsonl"), str(place / "judge"), "--lr", "1e-2",
           "--epochs", "10")  # fmt: skip
    told = script("rloo", str(place / "hf"), str(place / "pairs.jsonl"), str(place / "rloo"), "--lr", "1e-2",
                  "--epochs", "15", "--beta", "1e-3", "--tokens", "8", "--held-out", "0.25",
                  "--reward", str(place / "judge"))  # fmt: skip
    assert told["kl"][0] == pytest.approx(0, abs=1e-3)
    assert told["reward"][1] > told["reward"][0] + 0.7
    adopt(place / "rloo", place / "rewarded", check=True, warn=pytest.fail)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"prompt": "a", "chosen": "b"}', r"has no text rejected"),
        ('{"prompt": "a", "chosen": ["b"], "rejected": 3}', r"has no text chosen, rejected"),
        ('["a", "b", "c"]', r"pairs.jsonl:1 must be an object with the texts prompt, chosen, rejected"),
        ('{"prompt": ', r"pairs.jsonl:1 is no JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', r"has 1 pairs, but some are learnt and some held out"),
    ],
)
def test_pairs_that_are_none_are_told(script, place, tmp_path, capsys, row, told):
    (tmp_path / "pairs.jsonl").write_text(row)
    with pytest.raises(SystemExit) as ended:
        script("dpo", str(place / "hf"), str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"))
    assert ended.value.code == 2
    assert re.search(told, capsys.readouterr().err)


def test_what_cannot_be_is_told_before_anything_runs(script, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    pairs = str(place / "pairs.jsonl")
    for words, told in (
        (("dpo", str(place / "run"), pairs, str(tmp_path / "out")), "run has no config.json"),
        (("dpo", str(place / "hf"), pairs, str(tmp_path)), "exists already"),
        (("dpo", str(place / "hf"), pairs, str(tmp_path / "out"), "--held-out", "1"), "--held-out is 1.0"),
        (("dpo", str(place / "hf"), str(tmp_path / "no.jsonl"), str(tmp_path / "out")), "no.jsonl"),
        (("rloo", str(place / "hf"), pairs, str(tmp_path / "out")), "--reward names a reward model, which rloo needs"),
        (("dpo", str(place / "hf"), pairs, str(tmp_path / "out")), "pip install 'moetrain[trl]'"),
    ):
        with pytest.raises(SystemExit) as ended:
            script(*words)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
