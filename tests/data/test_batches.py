"""Settings to batches: weights, epochs, limits and stages as the settings say, the same on every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze
from moetrain.config.schema import RunConfig
from moetrain.data.build import Corpus, hold_together, make_batches, usage
from moetrain.data.corpus import Baselines, Meta, Prepared, Split, TokenFile
from moetrain.errors import ConfigError, DataError

LENGTH, BATCH = 4, 16


def run_of(*, steps: int = 50, **data: Any) -> RunConfig:
    settings = {"data": data, "schedule": {"steps": steps, "warmup_steps": 0},
                "batch": {"global_batch": BATCH, "sequence_length": LENGTH}}  # fmt: skip
    return resolve(freeze(settings), default_processes=1)


def part(first: int, *, sequences: int, tokenizer: str = "t") -> Prepared:
    """Tokens that tell their source and place: first, first + 1, …"""
    tokens: Any = first + np.arange(sequences * LENGTH + 1)
    split = Split(documents=1, tokens=len(tokens), bytes=1, sha256=f"sha {first}", documents_sha256="")
    file = TokenFile(path=Path(), tokens=tokens, documents=np.zeros(1, dtype=np.int64), num_bytes=1)
    meta = Meta(1, 10**9, 0, tokenizer, 0, split, split, (), Baselines(0, 0, 0, 0, False))
    return Prepared(directory=Path(f"p{first}"), tokenizer_path=Path(f"p{first}/t.json"), train=file, held_out=file,
                    meta=meta)  # fmt: skip


CORPUS = Corpus({"a": part(0, sequences=100), "b": part(10_000, sequences=400), "c": part(20_000, sequences=25)})
NAMES = list("abc")


def of_sources(**each: dict[str, Any]) -> dict[str, Any]:
    return {name: {"prepared": name} | each.get(name, {}) for name in NAMES}


def read_by(run: RunConfig, *, steps: range) -> dict[str, int]:
    """Sequences of each source in some steps, by the tokens that were read."""
    batches = make_batches(run, CORPUS)
    first = np.concatenate([batches.at(step).tokens[:, 0] for step in steps])
    return {name: int((first // 10_000 == number).sum()) for number, name in enumerate(NAMES)}


def test_sources_weigh_what_they_are_given():
    run = run_of(sources=of_sources(a={"weight": 1}, b={"weight": 2}, c={"weight": 1}))
    assert read_by(run, steps=range(50)) == {"a": 200, "b": 400, "c": 200}


@pytest.mark.parametrize(("temperature", "weights"), [(1.0, (100, 400, 25)), (2.0, (10, 20, 5))])
def test_without_weights_the_sizes_count_flattened_by_the_temperature(temperature, weights):
    counts = read_by(run_of(sources=of_sources(), temperature=temperature), steps=range(50))
    for name, weight in zip(NAMES, weights, strict=True):
        assert abs(counts[name] - 800 * weight / sum(weights)) <= 1


def test_epochs_are_counted_over_the_whole_run_and_the_others_share_the_rest():
    run = run_of(sources=of_sources(a={"epochs": 2}, b={"weight": 3}, c={"weight": 1}))
    counts = read_by(run, steps=range(50))
    assert abs(counts["a"] - 200) <= 1
    assert abs(counts["b"] - 450) <= 1


def test_a_source_is_read_max_epochs_times_and_no_more():
    run = run_of(sources=of_sources(a={"weight": 1}, b={"weight": 1}, c={"weight": 2, "max_epochs": 3}))
    counts = read_by(run, steps=range(50))
    assert counts["c"] == 75
    assert abs(counts["a"] - counts["b"]) <= 2
    used = {each.name: each for each in usage(run, CORPUS)}
    assert used["c"].used_up_at == 9  # half of each batch of 16: 75 sequences are gone in the tenth
    assert used["c"].epochs == 3
    assert (used["a"].used_up_at, used["a"].sequences) == (None, counts["a"])
    assert sum(each.share for each in used.values()) == pytest.approx(1)


def test_when_all_sources_end_before_the_run_that_is_told_at_once():
    run = run_of(sources=of_sources(), max_epochs=1)  # 525 sequences, 800 wanted
    with pytest.raises(DataError, match="as often as max_epochs lets it after step 32 of 50: raise max_epochs"):
        make_batches(run, CORPUS)
    make_batches(replace(run, schedule=replace(run.schedule, steps=32)), CORPUS)


def test_the_batch_after_the_last_has_no_fingerprint_where_nothing_is_left():
    run = run_of(sources=of_sources(), max_epochs=1, steps=32)
    batches = make_batches(run, CORPUS)
    assert batches.fingerprint(31)
    assert not batches.fingerprint(32)


def test_more_epochs_than_the_run_is_long_are_refused():
    run = run_of(sources=of_sources(b={"epochs": 3}, a={"weight": 1}, c={"weight": 1}))
    with pytest.raises(ConfigError, match="to read b 3 times takes 1,200 sequences, but the run has 800"):
        make_batches(run, CORPUS)


def test_a_schedule_changes_the_mixture_at_a_step():
    stages = [{"until": 0.9, "weights": {"a": 1, "b": 1}}, {"weights": {"c": 1}}]
    run = run_of(sources=of_sources(), mixture=stages)
    assert read_by(run, steps=range(45)) == {"a": 360, "b": 360, "c": 0}
    assert read_by(run, steps=range(45, 50)) == {"a": 0, "b": 0, "c": 80}


def test_every_sequence_of_a_source_comes_once_in_its_epoch():
    run = run_of(sources=of_sources(a={"weight": 1}, b={"weight": 1}, c={"weight": 2}))
    rows = np.concatenate([make_batches(run, CORPUS).at(step).tokens for step in range(50)])
    of_c = rows[rows[:, 0] // 10_000 == 2][:, 0]
    for epoch in range(16):
        assert sorted(of_c[25 * epoch : 25 * (epoch + 1)]) == list(range(20_000, 20_100, LENGTH))


MIXED = run_of(sources=of_sources(a={"weight": 1}, b={"weight": 5}, c={"weight": 2, "max_epochs": 4}),
               mixture=[{"until": 0.3}, {"weights": {"a": 2, "c": 1}}])  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_every_layout_and_every_restart_reads_the_same_batches(world_size, accumulation):
    unbroken = make_batches(MIXED, CORPUS)
    micro_batch = BATCH // (world_size * accumulation)
    for restart in (0, 3, 14, 15, 31, 49):
        batches = make_batches(MIXED, CORPUS)
        slices = [batches.rank_slice(restart, rank=rank, world_size=world_size, micro_batch=micro_batch).tokens
                  for rank in range(world_size)]  # fmt: skip
        rows = [piece[micro, row] for micro in range(accumulation) for piece in slices for row in range(micro_batch)]
        np.testing.assert_array_equal(np.stack(rows), unbroken.at(restart).tokens)


def test_sources_of_one_size_are_read_in_orders_of_their_own():
    corpus = Corpus({"a": part(0, sequences=100), "b": part(10_000, sequences=100)})
    run = run_of(sources={name: {"prepared": name, "weight": 1} for name in "ab"})
    rows = np.concatenate([make_batches(run, corpus).at(step).tokens[:, 0] for step in range(12)])
    assert (rows[rows < 10_000] != rows[rows >= 10_000] - 10_000).any()


def test_a_run_of_one_source_reads_what_it_did_before_there_were_several():
    """The order of the recorded results: epoch 0 of 100 sequences with seed 1234."""
    run = run_of(text=["x"], name="a")
    from moetrain.data.loader import permute

    order = permute(np.arange(BATCH), size=100, seed=1234, epoch=0)
    np.testing.assert_array_equal(
        make_batches(run, Corpus({"a": part(0, sequences=100)})).at(0).tokens[:, 0], order * LENGTH
    )


def test_sources_of_two_tokenizers_are_refused():
    with pytest.raises(DataError, match=r"the source b \(p5\) was prepared with another tokenizer than a \(p0\).*"
                                        r"data\.tokenizer=p0/t\.json"):  # fmt: skip
        hold_together({"a": part(0, sequences=1), "b": part(5, sequences=1, tokenizer="u")})


def test_a_source_shorter_than_a_sequence_is_named():
    corpus = Corpus({"a": part(0, sequences=100), "b": part(0, sequences=0)})
    with pytest.raises(DataError, match="the training text of b has 1 tokens, but one sequence takes 5"):
        make_batches(run_of(sources={name: {"prepared": name} for name in "ab"}), corpus)


def test_digests_name_the_source():
    assert CORPUS.digests() == {"tokenizer": "t"} | {
        f"{split} text of {name}": f"sha {first}"
        for name, first in (("a", 0), ("b", 10_000), ("c", 20_000)) for split in ("training", "held-out")
    }  # fmt: skip
    assert set(Corpus({"a": part(0, sequences=1)}).digests()) == {"tokenizer", "training text", "held-out text"}


class Trillion:
    """As many tokens as no disk here holds: each tells its place."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, where: slice) -> Any:
        return np.arange(where.start, where.stop, dtype=np.int64)


def test_a_trillion_tokens_cost_no_more_than_a_thousand(monkeypatch):
    import time
    import tracemalloc

    sources = {name: part(0, sequences=1) for name in "abc"}
    corpus = Corpus(
        {name: replace(each, train=replace(each.train, tokens=Trillion())) for name, each in sources.items()}
    )
    run = run_of(sources=of_sources(a={"weight": 5}, b={"weight": 3}, c={"weight": 2, "max_epochs": 1}),
                 steps=5 * 10**10, mixture=[{"until": 0.9}, {"weights": {"c": 1, "a": 1}}])  # fmt: skip
    batches = make_batches(run, corpus)
    tracemalloc.start()
    seconds = []
    for step in (0, 10**6, 10**9, 44 * 10**9, 45 * 10**9, 5 * 10**10 - 1):
        begun = time.perf_counter()
        rows = batches.at(step).tokens
        seconds.append(time.perf_counter() - begun)
        assert (np.diff(rows) == 1).all()
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes
    tracemalloc.stop()
    assert sorted(seconds)[len(seconds) // 2] < 0.01


def test_the_middle_is_filled_in_where_the_tokenizer_has_marks(tmp_path):
    from tokenizers import AddedToken

    from moetrain.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a b c"], vocab_size=300)
    tokenizer.add_special_tokens([AddedToken(f"<fim_{part}>") for part in ("prefix", "middle", "suffix")])
    (tmp_path / "t.json").write_text(tokenizer.to_str())
    ids = {tokenizer.token_to_id(f"<fim_{part}>") for part in ("prefix", "middle", "suffix")}
    one = replace(part(1000, sequences=100), tokenizer_path=tmp_path / "t.json")
    run = run_of(text=["x"], name="a", fill_in_middle=1.0)
    rows = make_batches(run, Corpus({"a": one})).at(3).tokens
    plain = make_batches(run_of(text=["x"], name="a"), Corpus({"a": one})).at(3).tokens
    assert all(ids & set(row) for row in rows.tolist())
    assert rows.shape == plain.shape
    assert all(set(new) - ids <= set(old) for new, old in zip(rows.tolist(), plain.tolist(), strict=True))
