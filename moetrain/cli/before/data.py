"""The verbs around data: prepare, data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli.options import Options, corpus_of, opening_of, own_words, settings
from moetrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig
    from moetrain.data.build import BatchView, Corpus
    from moetrain.data.loader import Source

HELP = {
    "prepare": """usage: moetrain prepare [key=value …] [--config-dir DIR]

Reads data.text, trains the tokenizer (or takes data.tokenizer) and writes token files to data.prepared
(prepared/NAME-DIGEST), on all cores. What is there already is not made again but compared with its digests; after a
crash or an interrupt the same command goes on where it was.

examples:
  moetrain prepare
  moetrain prepare 'data.text=[books/*.txt]' data.name=books model.vocab_size=16384
  moetrain prepare data.text=wiki.parquet data.text_column=body data.tokenizer=tokenizer.json
  moetrain prepare data.text=notes.jsonl data.name=notes prepare.duplicates=exact prepare.min_characters=20
""",
    "data": """usage: moetrain data show [step=N] [samples=N] [picture=FILE] [key=value …] [--config-dir DIR]

Shows what a step of the run reads: its samples as text, each with its source and the borders of its documents, the
tokens of each source, and how long the documents are. With run_dir=DIR alone it is the run in DIR, with settings the
run they describe; what is not prepared yet is prepared, and a stream is tokenized as far as the step reads.

  step=N         counted from 0, the first step (default)
  samples=N      how many of its samples to write out (default 4; 0: all)
  picture=FILE   the lengths of the documents, as a PNG

examples:
  moetrain data show
  moetrain data show step=12 samples=1 picture=lengths.png
  moetrain data show data.stream=true data.text=notes.jsonl
  moetrain data show run_dir=runs/tiny step=3
""",
}


def prepare(words: Sequence[str]) -> int:
    """The verb `prepare`."""
    run, _ = settings(Options.read(words))
    from moetrain.report.screen import prepared_text

    for part in corpus_of(run, verify=True).parts.values():
        print(prepared_text(part.directory, part))
    return 0


def data(words: Sequence[str]) -> int:
    """The verb `data`."""
    if not words or words[0] != "show":
        said = f"data has no verb '{words[0]}'" if words else "data wants to know what to do"
        raise ConfigError([f"{said}: write `moetrain data show`"])
    own, rest = own_words(words[1:], defaults={"step": 0, "samples": 4, "picture": ""})
    from moetrain.config.freeze import RUN_FILE, read_run
    from moetrain.report import batch

    key, _, place = rest[0].partition("=") if len(rest) == 1 else ("", "", "")
    run_dir = Path(place) if key == "run_dir" else None
    if run_dir is not None and not (run_dir / RUN_FILE).is_file():
        raise ConfigError([f"run_dir is {place}, but there is no run in it: name the directory of one"])
    run = settings(Options.read(rest))[0] if run_dir is None else read_run(run_dir)
    seen = _see(run, run_dir, step=int(own["step"]))
    batch.show(seen.view, decode=seen.decode, samples=int(own["samples"]))
    if own["picture"]:
        batch.draw_lengths(seen.view, Path(str(own["picture"])))
    return 0


@dataclass(frozen=True)
class _Seen:
    view: BatchView
    decode: Callable[[Sequence[int]], str]


def _see(run: RunConfig, run_dir: Path | None, *, step: int) -> _Seen:
    """The batch of a step of a run; ``run_dir`` is None where it is only described."""
    from moetrain.config.freeze import write_run
    from moetrain.data.build import check_step, open_corpus
    from moetrain.stream.feed import streamed

    check_step(run, step=step)
    if not run.data.stream:
        return _seen(run, corpus_of(run), step=step)
    if run_dir is None:
        with tempfile.TemporaryDirectory(prefix="moetrain-") as place:
            corpus = opening_of(run, Path(place), is_begun=False)
            write_run(run, Path(place))
            with streamed(run, Path(place), is_first=True) as sequences:
                return _seen(run, corpus, step=step, streamed=sequences)
    with streamed(run, run_dir, is_first=False) as sequences:
        assert sequences is not None
        there = sequences.num_there()
        if there is not None and step >= (steps := there // run.batch.global_batch):
            raise DataError(
                f"the stream of {run_dir} is tokenized for its first {steps:,} steps so far, and step {step:,} is not "
                "among them: let the run go on, or give its settings instead of run_dir"
            )
        return _seen(run, open_corpus(run, run_dir), step=step, streamed=sequences)


def _seen(run: RunConfig, corpus: Corpus, *, step: int, streamed: Source | None = None) -> _Seen:
    from moetrain.data.build import view_batch
    from moetrain.data.tokenizer import load_tokenizer

    view, tokenizer = view_batch(run, corpus, step=step, streamed=streamed), load_tokenizer(corpus.first.tokenizer_path)
    return _Seen(view, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
