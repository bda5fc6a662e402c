"""Conversations to tokens: what has a loss is what the assistant says, token by token."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from moetrain.data.build import hold_together, open_counted
from moetrain.data.corpus import Prepared, open_prepared
from moetrain.data.loader import NOT_COUNTED, HeldOutText, Sequences, held_out_batches
from moetrain.errors import DataError
from moetrain.instruct.build import instruction_directory, prepare_instructions
from moetrain.instruct.template import TEMPLATE as DEFAULT
from moetrain.instruct.template import Part, check_template, parts_of
from moetrain.prepare.reading import Options

TEMPLATE = {"system": "<s>{content}\n", "user": "<u>{content}\n", "assistant": "<a> {content}!\n"}
PAIRS = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(40)]
CHAT = {"messages": [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]}


def prepared(directory: Path, rows: list[dict[str, Any]], **changed: Any) -> Prepared:
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"text": [str(directory / "rows.jsonl")], "template": TEMPLATE, "held_out": 0.3, "vocab_size": 300,
                "tokenizer": None, "options": Options(), "progress": lambda stage, done, total: None}  # fmt: skip
    return prepare_instructions(directory / "p", **settings | changed)


def test_a_pair_and_a_chat_are_pieces_with_and_without_a_loss():
    assert parts_of(PAIRS[1], template=TEMPLATE, where="") == [
        Part("<u>", False), Part("What is 1 and 1?\n", False), Part("<a> ", False), Part("It is 2.!\n", True)
    ]  # fmt: skip
    chat = parts_of(CHAT, template=TEMPLATE, where="")
    assert [part.text for part in chat if part.counted] == [f"assistant {n}!\n" for n in range(3)]
    assert "".join(part.text for part in chat).startswith("<u>user 0\n<a> assistant 0!\n<u>user 1\n")


def test_the_flags_tell_what_the_assistant_says_and_the_end(tmp_path):
    found = prepared(tmp_path, [*PAIRS, CHAT])
    counted = open_counted(found)
    tokenizer = Tokenizer.from_file(str(found.tokenizer_path))
    said = []
    for file, flags in ((found.train, counted.train), (found.held_out, counted.held_out)):
        assert file.num_documents > 0
        ends = [*file.documents[1:], file.num_tokens]
        for start, end in zip(file.documents, ends, strict=True):
            ids, own = np.asarray(file.tokens[start:end]), np.asarray(flags[start:end]).astype(bool)
            assert ids[-1] == found.meta.end_of_text
            assert own[-1], "to end the text is learnt, too"
            said.append(tokenizer.decode(ids[own][:-1].tolist()))
    expected = [f"It is {2 * n}.!\n" for n in range(40)] + ["assistant 0!\nassistant 1!\nassistant 2!\n"]
    assert sorted(said) == sorted(expected)


def test_targets_without_a_loss_are_marked_in_training_and_in_evaluation(tmp_path):
    found = prepared(tmp_path, PAIRS)
    counted = open_counted(found)
    sequences = Sequences(found.train.tokens, sequence_length=16, seed=1, counted=counted.train)
    index = np.arange(sequences.per_epoch)
    for place, flags in zip(sequences.places(index), sequences.read_counted(index), strict=True):
        np.testing.assert_array_equal(flags, np.asarray(counted.train[16 * place : 16 * place + 17]).astype(bool))
    text = HeldOutText(found.held_out.tokens, num_bytes=1, counted=counted.held_out)
    batches = held_out_batches(text, sequence_length=16, rank=0, world_size=1, micro_batch=4, max_sequences=None)
    targets = np.concatenate([batch.targets.reshape(-1) for batch in batches])
    expected = np.where(counted.held_out[1:], found.held_out.tokens[1:].astype(np.int64), NOT_COUNTED)
    np.testing.assert_array_equal(targets[: len(expected)], expected)
    assert (targets[len(expected) :] == NOT_COUNTED).all()


def test_other_flags_are_other_data(tmp_path):
    found = prepared(tmp_path, PAIRS)
    digests = hold_together({"a": found}).digests()
    assert {"loss mask (train)", "loss mask (held_out)", "training text"} <= set(digests)


def test_what_is_there_is_not_made_again_and_compressed_rows_are_the_same(tmp_path):
    first = prepared(tmp_path, PAIRS)
    assert prepared(tmp_path, []).meta == first.meta
    (tmp_path / "b").mkdir()
    packed = tmp_path / "b" / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, PAIRS)).encode()))
    (tmp_path / "c").mkdir()
    again = prepared(tmp_path / "c", PAIRS, text=[str(packed)])
    assert again.meta.train.sha256 == first.meta.train.sha256


def test_another_template_is_another_directory(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIRS[0]))
    settings = {"name": "a", "text": [str(tmp_path / "rows.jsonl")], "held_out": 0.1, "vocab_size": 300,
                "tokenizer": None, "options": Options()}  # fmt: skip
    assert instruction_directory(tmp_path, template=None, **settings) != instruction_directory(
        tmp_path, template=TEMPLATE, **settings
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "row 1 is no conversation: write prompt and response, or messages"),
        ({"messages": [{"role": "user"}]}, "row 1 is no conversation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool', but the template has system, user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no message of the assistant"),
        (["a"], "row 1 is not an object"),
        ({"prompt": "\ud800", "response": "x"}, "row 1 holds half of a surrogate pair"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl, {message}" if "row 1" in message else message):
        prepared(tmp_path, [row])
    assert not (tmp_path / "p").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"], "nothing half-written"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"user": "x", "assistant": "{content}"}, "data.template.user"),
        ({"user": "{content}"}, "no text for 'as"),
    ],
)
def test_a_template_has_a_place_for_the_content(template, message):
    with pytest.raises(DataError, match=message):
        check_template(template)


def test_where_the_assistant_says_nothing_is_counted_and_left_out(tmp_path):
    nothing = {"prompt": "What?", "response": " "}
    found = prepared(tmp_path, [nothing, *PAIRS, nothing])
    assert found.meta.empty_documents == 2
    assert found.train.num_documents + found.held_out.num_documents == len(PAIRS)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="holds only empty documents"):
        prepared(tmp_path / "b", [nothing])


def test_a_file_cut_short_is_told(tmp_path):
    content = gzip.compress("\n".join(map(json.dumps, PAIRS)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz is cut short"):
        prepared(tmp_path, PAIRS, text=[str(tmp_path / "cut.jsonl.gz")])
    assert not (tmp_path / "p").exists()


def test_a_tokenizer_trained_on_conversations_is_as_the_settings_say(tmp_path):
    options = Options(tokenizer_kind="unigram", special_tokens=("<|tool|>",))
    found = prepared(tmp_path, PAIRS, options=options)
    about = json.loads(found.tokenizer_path.read_text())
    assert about["model"]["type"] == "Unigram"
    assert "<|tool|>" in {token["content"] for token in about["added_tokens"]}
    where = {"name": "a", "text": [str(tmp_path / "rows.jsonl")], "template": None, "held_out": 0.1, "vocab_size": 300,
             "tokenizer": None}  # fmt: skip
    assert instruction_directory(tmp_path, options=options, **where) != instruction_directory(
        tmp_path, options=Options(), **where
    )


def test_too_few_conversations_are_told(tmp_path):
    with pytest.raises(DataError, match="hold too few conversations"):
        prepared(tmp_path, PAIRS[:1])


def test_a_damaged_mask_is_told(tmp_path):
    found = prepared(tmp_path, PAIRS)
    np.save(found.directory / "train.counted.npy", np.zeros(3, dtype=np.uint8))
    with pytest.raises(DataError, match="the loss masks are not as long as the tokens"):
        open_counted(open_prepared(found.directory))
    (found.directory / "train.counted.npy").unlink()
    with pytest.raises(DataError, match="is damaged"):
        open_counted(found)


def test_a_prompt_written_as_a_whole_has_the_tokens_it_was_trained_with(tmp_path):
    """`moetrain sample` encodes all of it at once; so the template must not make other tokens where pieces meet."""
    rows = [*PAIRS, {"messages": [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]}]
    found = prepared(tmp_path, rows, template=None, vocab_size=330)
    tokenizer = Tokenizer.from_file(str(found.tokenizer_path))
    for row in rows:
        pieces = [part.text for part in parts_of(row, template=DEFAULT, where="")]
        ids = [id_ for piece in pieces for id_ in tokenizer.encode(piece).ids]
        assert tokenizer.encode("".join(pieces)).ids == ids


def test_two_runs_that_prepare_the_same_at_once_share_it(tmp_path):
    """Whoever is second takes what is there."""
    other = prepared(tmp_path, PAIRS).directory.rename(tmp_path / "made by the other run")

    def other_is_faster(stage: str, done: int, total: int) -> None:
        if stage == "encode" and not (tmp_path / "p").exists():
            shutil.copytree(other, tmp_path / "p")

    assert prepared(tmp_path, PAIRS, progress=other_is_faster).directory == tmp_path / "p"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made by the other run", "p", "rows.jsonl"]
