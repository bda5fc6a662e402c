"""The verbs around data: prepare, data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetrain.cli.options import Options, corpus_of, own_words, settings
from moetrain.errors import ConfigError

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
run they describe; what is not prepared yet is prepared.

  step=N         counted from 0, the first step (default)
  samples=N      how many of its samples to write out (default 4; 0: all)
  picture=FILE   the lengths of the documents, as a PNG

examples:
  moetrain data show
  moetrain data show step=12 samples=1 picture=lengths.png
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
    from moetrain.data.build import view_batch
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.report import batch

    key, _, place = rest[0].partition("=") if len(rest) == 1 else ("", "", "")
    is_there = key == "run_dir" and (Path(place) / RUN_FILE).is_file()
    run = read_run(Path(place)) if is_there else settings(Options.read(rest))[0]
    corpus = corpus_of(run)
    view = view_batch(run, corpus, step=int(own["step"]))
    decode = load_tokenizer(corpus.first.tokenizer_path).decode
    batch.show(view, decode=lambda ids: decode(ids, skip_special_tokens=False), samples=int(own["samples"]))
    if own["picture"]:
        batch.draw_lengths(view, Path(str(own["picture"])))
    return 0
