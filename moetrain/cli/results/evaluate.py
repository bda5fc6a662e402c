"""The verb on what a trained model is worth: held-out text by source, experts by source, tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli.options import paths_and_settings, warn
from moetrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig
    from moetrain.data.build import Corpus
    from moetrain.data.loader import HeldOutText
    from moetrain.evaluation.experts import TokenCounts
    from moetrain.evaluation.text import SourceResult

HELP = {
    "evaluate": """usage: moetrain evaluate RUN [data=DIR …] [split=train] [step=N] [max_sequences=N] [micro_batch=N]
                         [tasks=NAME …] [include=DIR] [limit=N] [shots=N] [json=true]

What the newest whole checkpoint of a run (or step N) makes of text: loss, perplexity and bits per byte of each source,
and which experts each source uses. One process, whatever the run's layout. On the run's own held-out text it also
counts which tokens each expert takes, in RUN/experts.json, which `moetrain report RUN` shows.

  data            directories of prepared text, each a source; without it, the held-out text of the run
  max_sequences   of each source, evenly spread; without it, all
  tasks           instead of text: tasks of the lm-evaluation-harness (pip install 'moetrain[lm_eval]'), by its names or
                  from files of your own in the directory include; limit: examples of each, shots: solved ones before
  json            the numbers for a script, with those of every expert

examples:
  moetrain evaluate runs/tiny
  moetrain evaluate runs/tiny data=prepared/letters data=prepared/code max_sequences=200
  moetrain evaluate runs/tiny tasks=my_task include=tasks limit=50
""",
}
SPLITS = ("held_out", "train")


@dataclass(frozen=True, kw_only=True)
class _Evaluate:
    data: list[str] = field(default_factory=list)
    split: str = "held_out"
    step: int | None = None
    max_sequences: int | None = None
    micro_batch: int | None = None
    tasks: list[str] = field(default_factory=list)
    include: str | None = None
    limit: int | None = None
    shots: int | None = None
    json: bool = False


def evaluate(words: Sequence[str]) -> int:
    """The verb `evaluate`."""
    (run_dir,), wanted = paths_and_settings(words, _Evaluate, paths=["RUN"])
    problems = [f"{name} is 0, but must be at least 1" for name in ("max_sequences", "micro_batch", "limit")
                if getattr(wanted, name) == 0]  # fmt: skip
    if wanted.split not in SPLITS:
        problems.append(f"split is {wanted.split!r}, but must be one of {', '.join(SPLITS)}")
    # of the one or of the other
    idle = ("data", "split", "max_sequences") if wanted.tasks else ("include", "limit", "shots")
    what = "the text, which tasks=… takes the place of" if wanted.tasks else "tasks=…"
    problems += [f"{name} is set, but belongs to {what}: leave it out" for name in idle
                 if getattr(wanted, name) != getattr(_Evaluate(), name)]  # fmt: skip
    if wanted.include is not None and not Path(wanted.include).is_dir():
        problems.append(f"include is {wanted.include}, but must be a directory of task files")
    if problems:
        raise ConfigError(problems)
    return _tasks(run_dir, wanted) if wanted.tasks else _text(run_dir, wanted)


def _text(run_dir: Path, wanted: _Evaluate) -> int:
    measured = _measured(run_dir, wanted, shown=not wanted.json)
    stored = None if wanted.data or wanted.split != "held_out" else _store(run_dir, measured)
    if wanted.json:
        both = (measured.everything, *measured.results)
        all_of_it, *sources = (asdict(each) | {"perplexity": each.perplexity} for each in both)
        told = {"run": str(run_dir), "split": wanted.split, "all": all_of_it, "sources": sources}
        print(json.dumps(told, indent=1))
        return 0
    _print(measured.results, measured.everything)
    if stored is not None:
        print(f"\nexperts by source and by token: {stored}, for moetrain report {run_dir}")
    return 0


def store_experts(run_dir: Path, *, max_sequences: int | None) -> None:
    """Count the experts' choices on the run's held-out text, for its report.

    Args:
        max_sequences: of each source.
    """
    _store(run_dir, _measured(run_dir, _Evaluate(max_sequences=max_sequences), shown=True))


@dataclass(frozen=True)
class _Measured:
    step: int
    results: list[SourceResult]
    everything: SourceResult
    counts: TokenCounts | None
    """None: a dense model."""


def _measured(run_dir: Path, wanted: _Evaluate, *, shown: bool) -> _Measured:
    from moetrain.checkpoint.store import step_of, whole_checkpoints
    from moetrain.evaluation.experts import TokenCounts
    from moetrain.evaluation.text import evaluate_sources, together
    from moetrain.hub.generate import best_device, load_model
    from moetrain.metrics.console import WorkBar

    run, gpt = load_model(run_dir, step=wanted.step, warn=warn, device=best_device())
    step = max(map(step_of, whole_checkpoints(run_dir / "checkpoints"))) if wanted.step is None else wanted.step
    corpus = _corpus(run, run_dir, data=wanted.data)
    texts = corpus.held_out() if wanted.split == "held_out" else corpus.training()
    length = run.sequence_length
    micro_batch = wanted.micro_batch or run.batch.micro_batch or 1
    moe, counts = run.model.moe, None
    if moe is not None:
        counts = TokenCounts(run.model.num_layers // moe.every, run.model.vocab_size, moe.num_experts)
    total = sum(_batches(text, length, micro_batch, wanted.max_sequences) for text in texts.values())
    with WorkBar("evaluate", total=total, unit="batches", shown=shown) as bar:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance_to(done)

        results = evaluate_sources(
            gpt,
            texts,
            sequence_length=length,
            micro_batch=micro_batch,
            packing=corpus.packing(run.data),
            max_sequences=wanted.max_sequences,
            counts=counts,
            on_batch=advance,
        )
    return _Measured(step, results, together(results, texts), counts)


def _store(run_dir: Path, measured: _Measured) -> Path | None:
    """Write RUN_DIR/experts.json in one step; None: nothing to write, or no room for it."""
    from moetrain.data.corpus import TOKENIZER
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.page.experts import EXPERTS_FILE, MOST_FAVOURITES

    if measured.counts is None:
        return None
    tokenizer = load_tokenizer(run_dir / TOKENIZER)

    def text_of(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False)
        # a part of a character has no text
        return str(tokenizer.id_to_token(token)) if not text or "\ufffd" in text else str(text)

    content = {
        "step": measured.step,
        "tokens": sum(each.tokens for each in measured.results),
        "all": measured.everything.share_LE,
        "sources": {each.name: each.share_LE for each in measured.results},
        "told_by_token": measured.counts.told_by_token(),
        "favourites": [
            [[{"text": text_of(each.token), "occurrences": each.occurrences, "share": each.share, "times": each.times}
              for each in best] for best in layer]
            for layer in measured.counts.favourites(most=MOST_FAVOURITES)
        ],
    }  # fmt: skip
    path = run_dir / EXPERTS_FILE
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror}): moetrain report will not show the experts' tokens")
        return None
    return path


def _print(results: list[SourceResult], everything: SourceResult) -> None:
    from moetrain.archive.listing import table
    from moetrain.page.experts import apart

    rows = [[each.name, f"{each.loss:.4f}", f"{each.perplexity:.4g}", f"{each.bits_per_byte:.4f}", f"{each.tokens:,}"]
            for each in (results if len(results) == 1 else [*results, everything])]  # fmt: skip
    print("\n".join(table(["source", "loss", "perplexity", "bits per byte", "tokens"], rows, left={0})))
    if not everything.share_LE:
        return
    several = len(results) > 1
    what = ", and how far it is from all sources together (0: the same ones)" if several else ""
    print(f"\nthe experts that each source uses most{what}")
    rows = []
    for layer, common_E in enumerate(everything.share_LE):
        for each in results:
            share_E = each.share_LE[layer]
            best = sorted(range(len(share_E)), key=share_E.__getitem__, reverse=True)[:3]
            far = [f"{apart(share_E, common_E):.3f}"] if several else []
            rows.append([str(layer), each.name, *far, "  ".join(f"{i}: {share_E[i]:.0%}" for i in best)])
    heads = ["MoE block", "source", *(["apart"] if several else []), "experts"]
    print("\n".join(table(heads, rows, left={1, len(heads) - 1})))


def _tasks(run_dir: Path, wanted: _Evaluate) -> int:
    from moetrain.archive.listing import table
    from moetrain.config.routers import sees_others
    from moetrain.data.corpus import TOKENIZER
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.evaluation.harness import run_tasks
    from moetrain.hub.generate import best_device, load_model

    run, gpt = load_model(run_dir, step=wanted.step, warn=warn, device=best_device())
    reason = sees_others(run.model.moe)
    if reason:
        warn(f"{reason}: each example is read by itself")
    found = run_tasks(
        gpt,
        load_tokenizer(run_dir / TOKENIZER),
        wanted.tasks,
        context=run.sequence_length,
        cache=reason is None,
        include=None if wanted.include is None else Path(wanted.include),
        limit=wanted.limit,
        shots=wanted.shots,
        batch=1 if reason else wanted.micro_batch or run.batch.micro_batch or 1,
    )
    if wanted.json:
        print(json.dumps({"run": str(run_dir), "tasks": found}, indent=1))
        return 0
    rows = [[task, name.partition(",")[0], f"{value:.4f}" if isinstance(value, float) else str(value)]
            for task, metrics in found.items() for name, value in metrics.items()]  # fmt: skip
    print("\n".join(table(["task", "metric", "value"], rows, left={0, 1})))
    return 0


def _corpus(run: RunConfig, run_dir: Path, *, data: list[str]) -> Corpus:
    from moetrain.config.data import sources_of
    from moetrain.data.build import hold_together, open_corpus
    from moetrain.data.corpus import TOKENIZER, open_prepared
    from moetrain.data.tokenizer import fingerprint, load_tokenizer

    if not data:
        if not run.data.stream and any(each.prepared is None for each in sources_of(run.data).values()):
            raise DataError(f"{run_dir} has no prepared text of its own: name some by data=DIR, prepared with "
                            f"data.tokenizer={run_dir / TOKENIZER}")  # fmt: skip
        return open_corpus(run, run_dir)
    if len(set(data)) < len(data):
        raise ConfigError([f"data names {each} more than once" for each in dict.fromkeys(data) if data.count(each) > 1])
    names = [Path(each).name for each in data]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, data, strict=True)]
    corpus = hold_together({name: open_prepared(Path(path)) for name, path in zip(names, data, strict=True)})
    own = fingerprint(load_tokenizer(run_dir / TOKENIZER))
    if corpus.first.meta.tokenizer_fingerprint != own:
        raise DataError(f"{corpus.first.directory} was prepared with another tokenizer than {run_dir} has: prepare it "
                        f"again with data.tokenizer={run_dir / TOKENIZER}")  # fmt: skip
    return corpus


def _batches(text: HeldOutText, length: int, micro_batch: int, most: int | None) -> int:
    sequences = -(-(text.num_tokens - 1) // length)
    return -(-min(sequences, most or sequences) // micro_batch)
