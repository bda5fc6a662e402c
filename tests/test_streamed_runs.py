"""Runs that stream their text, with real processes: killed and resumed, on other layouts, with bad text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from as_typed import assert_told
from stream_texts import opened, rows_of, run_of, write_rows
from test_end_to_end import STEPS, final, losses, metrics, run, start, wait_for_step, workers

from moetrain.config.checks import check
from moetrain.config.freeze import flatten, read_run, to_dict
from moetrain.errors import DataError
from moetrain.launch.local import run_local
from moetrain.sources.text import expand, read_documents

pytestmark = pytest.mark.slow

# 16 sequences in a block; the text has some 150, so that the runs go on into a second epoch
STREAM = ["data.stream=true", "data.stream_block=512", "data.stream_window=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a very small corpus of real text."""
    place = tmp_path_factory.mktemp("place")
    documents = read_documents(expand(["builtin:sotu"]), text_column="text")
    rows = [json.dumps({"text": next(documents)[: 600 + number]}) for number in range(24)]
    (place / "corpus.jsonl").write_text("\n".join(rows))
    return place


@pytest.fixture(scope="module")
def unbroken(place: Path) -> list[float]:
    """The losses of a run that nothing disturbed."""
    done = run(place, "unbroken", *STREAM)
    assert done.returncode == 0, done.stderr
    end = json.loads((place / "runs/unbroken/stream/end.json").read_text())
    assert 8 * 10 < end["sequences"] < 8 * STEPS, "the kill falls into the first epoch, and the end into the second"
    assert "the text is read to its end" in done.stdout
    assert "is finished" in done.stdout
    assert len(losses(place, "unbroken")) == STEPS
    return losses(place, "unbroken")


def test_a_streamed_run_killed_half_way_ends_with_the_same_losses_bit_for_bit(place, unbroken):
    process = start(place, "killed", *STREAM)
    wait_for_step(place, "killed", 8, process)
    process.kill()
    process.communicate()
    while workers(place, "killed"):
        pass
    assert metrics(place, "killed")[-1]["step"] < STEPS
    done = run(place, "killed", *STREAM)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert losses(place, "killed") == unbroken
    assert final(place, "killed")["held_out_loss"] == final(place, "unbroken")["held_out_loss"]


def test_one_rank_streams_as_two_do(place, unbroken):
    done = run(place, "one", *STREAM, "launch.processes=1", "batch.micro_batch=4")
    assert done.returncode == 0, done.stderr
    assert losses(place, "one") == pytest.approx(unbroken, rel=1e-5)
    assert final(place, "one")["held_out_loss"] == pytest.approx(final(place, "unbroken")["held_out_loss"], rel=1e-5)


def test_the_settings_that_a_streamed_run_keeps_are_usable_as_they_stand(place, unbroken):
    """As the doctor of its checkpoints takes them."""
    kept = read_run(place / "runs/unbroken")
    check(kept, flatten(to_dict(kept)))


def test_a_stream_that_changed_is_not_gone_on_with(place, unbroken):
    corpus = place / "corpus.jsonl"
    was = corpus.read_text()
    try:
        corpus.write_text(was.replace("the", "THE"))
        done = run(place, "unbroken", *STREAM, f"schedule.steps={STEPS + 2}")
    finally:
        corpus.write_text(was)
    assert_told(done, "was trained on other data: the text (corpus.jsonl) changed since")


def test_bad_text_ends_a_streamed_run_with_one_message(tmp_path, monkeypatch):
    """Two ranks and a producer come to a row that the opening, which looks at the beginning alone, has not seen."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "torch_extensions"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = write_rows(tmp_path / "a.jsonl", rows_of(40))
    model = {"vocab_size": 400, "context": 32, "num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 16,
             "moe": {"num_experts": 2, "d_expert": 16}}  # fmt: skip
    run_dir = tmp_path / "run"
    opened(run_of([text], run_dir, model=model, log={"wandb": "off", "every_steps": 1}, launch={"processes": 2}))
    text.write_text(text.read_text() + '\n{"words": "bad"}\n')
    about = run_dir / "stream/opening/stream.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sizes": [text.stat().st_size]}))
    with pytest.raises(DataError) as told:
        run_local(run_dir, processes=2)
    assert str(told.value) == (
        f"{text}, row 41 has no column 'text'; it has 'words': set data.text_column to the column with the text"
    )
    assert (run_dir / "metrics.jsonl").read_text(), "what was there before the row was trained on"
