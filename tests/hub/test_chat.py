"""A model that has learnt from conversations leaves with the template they were written in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers
from own_runs import write_own_run
from tokenizers import Tokenizer

from moetrain.config.schema import ModelConfig, MoEConfig
from moetrain.data.tokenizer import train_tokenizer
from moetrain.hub.export import export
from moetrain.instruct.template import TEMPLATE, parts_of

MODEL = ModelConfig(vocab_size=300, context=32, num_layers=1, d_model=16, num_heads=2, d_ff=24,
                    moe=MoEConfig(num_experts=3, top_k=2, d_expert=8))  # fmt: skip
ODD = {"user": """<u>'"\\n{content}\n\t{{ "é" }} {% if %} 😀\n""", "assistant": "{content}"}
MESSAGES = [{"role": "user", "content": "What is {{ 1 }}?"}, {"role": "assistant", "content": " It's \"1\".\n"},
            {"role": "user", "content": ""}, {"role": "assistant", "content": "\\n"}]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["What is 1 and 2? It is 3. " * 3]), vocab_size=290)


def exported(place: Path, tokenizer: Tokenizer, **data: Any) -> Any:
    """The tokenizer that `transformers` finds, and the card."""
    write_own_run(place / "run", MODEL, tokenizer, **data)
    export(place / "run", place / "hf", step=None, dtype=None, shard_bytes=1 << 30, check=False, warn=pytest.fail)
    return transformers.AutoTokenizer.from_pretrained(place / "hf"), (place / "hf" / "README.md").read_text()


@pytest.mark.parametrize("template", [None, ODD])
def test_a_conversation_is_the_text_that_was_learnt(tmp_path, tokenizer, template):
    found, card = exported(tmp_path, tokenizer, format="instruction", template=template)
    end, used = found.bos_token, template or TEMPLATE
    learnt = "".join(part.text for part in parts_of({"messages": MESSAGES}, template=used, where=""))
    assert found.apply_chat_template(MESSAGES, tokenize=False) == end + learnt + end
    asked = "".join(part.text for part in parts_of({"messages": MESSAGES[:2]}, template=used, where=""))
    asked += used["user"].replace("{content}", "") + used["assistant"].partition("{content}")[0]
    assert found.apply_chat_template(MESSAGES[:3], tokenize=False, add_generation_prompt=True) == end + asked
    with pytest.raises(jinja2.TemplateError, match=r"no such role; it has .*user, assistant"):
        found.apply_chat_template([{"role": "tool", "content": "a"}], tokenize=False)
    assert "apply_chat_template" in card


def test_who_has_read_text_alone_has_no_template(tmp_path, tokenizer):
    found, card = exported(tmp_path, tokenizer)
    assert found.chat_template is None
    assert "apply_chat_template" not in card


def test_one_of_several_sources_is_enough(tmp_path, tokenizer):
    sources = {"books": {"text": ["books.txt"]}, "chats": {"text": ["chats.jsonl"], "format": "instruction"}}
    found, _ = exported(tmp_path, tokenizer, sources=sources, template=ODD)
    assert "<u>" in found.apply_chat_template(MESSAGES, tokenize=False)
