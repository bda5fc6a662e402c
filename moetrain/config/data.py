"""What a training step reads: the settings of sources and their mixture, and their rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

from moetrain.errors import DataError

FORMATS = ("text", "instruction")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources (``data.sources.NAME``), prepared by itself."""

    text: list[str] | None = None
    """As data.text. null: prepared names a directory that is there."""
    text_column: str | None = None
    """null: data.text_column."""
    format: str | None = None
    """null: data.format."""
    held_out: float | None = None
    """Share of this source's documents kept for evaluation. null: data.held_out."""
    prepared: str | None = None
    """Directory of its token files. null: prepared/NAME-DIGEST."""
    weight: float | None = None
    """Its share of the sequences, against the weights of the others. null: its size ^ (1 / data.temperature)."""
    epochs: float | None = None
    """Instead of a weight: how often the run reads it; sources with weights share the rest."""
    max_epochs: float | None = None
    """It is read so often at most; from there on the others share its weight. null: data.max_epochs."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a schedule of mixtures (an element of ``data.mixture``)."""

    until: float = 1.0
    """Where it ends, as a share of the run's steps; the last one ends at 1."""
    weights: dict[str, float] | None = None
    """Source -> weight; a source that is not named is not read. null: the sources' own."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """From text to the tokens of each step."""

    name: str | None = None
    """A label for the corpus, used in the name of the prepared directory. null: that of the first of text."""
    text: list[str] = field(default_factory=lambda: ["builtin:sotu"])
    """Files, directories or globs of .txt, .jsonl, .json, .csv (also .gz, .xz, .zst), .parquet or Megatron's .idx;
    hf:NAME[/CONFIG][@SPLIT] is a dataset of the hub, builtin:sotu ships with moetrain."""
    format: str = "text"
    """text, or instruction: .jsonl rows of prompt and response, or of messages with role and content; what the
    assistant says has a loss, the rest has none."""
    template: dict[str, str] | None = None
    """instruction: role -> text with {content} in it. null: ### User: and ### Assistant:, a line above each message."""
    text_column: str = "text"
    """Column of jsonl and parquet rows that holds the text."""
    held_out: float = 0.05
    """Share of the documents kept for evaluation, in (0, 0.5]."""
    tokenizer: str | None = None
    """Path of a tokenizer.json, of a Hugging Face directory, a sentencepiece .model or a tiktoken file. null: one of
    model.vocab_size entries, trained on the training documents (with data.sources: that of the first source)."""
    prepared: str | None = None
    """Directory of the token files. null: prepared/NAME-DIGEST, the digest covering text and tokenizer settings."""
    sources: dict[str, SourceConfig] | None = None
    """Several sources instead of data.text: {wiki: {text: [...], weight: 2}, code: {prepared: DIR, epochs: 3}}."""
    temperature: float = 1.0
    """Sources without a weight have size ^ (1 / temperature): 1 is by size, above it small ones are read more often
    (Conneau et al. 2020, arXiv:1911.02116, section 3.1; there alpha = 1 / temperature)."""
    max_epochs: float | None = None
    """No source is read more often. null: no limit."""
    mixture: list[StageConfig] | None = None
    """A schedule of mixtures: [{until: 0.9}, {until: 1, weights: {wiki: 1}}]. null: one mixture throughout."""
    mask_documents: bool = False
    """Attention stays within a document; else documents that lie in one sequence see those before them."""
    reset_positions: bool = False
    """Positions count from the start of each document instead of the sequence's."""
    fill_in_middle: float = 0.0
    """Share of the documents rearranged so that the middle comes last (Bavarian et al. 2022, arXiv:2207.14255), cut
    between tokens; the tokenizer must have the tokens that mark the parts."""
    fill_in_middle_spm: float = 0.5
    """Share of those with the suffix before the prefix (SPM, ibid., section 3.1), the rest the other way (PSM)."""
    stream: bool = False
    """Train while the text is tokenized, without token files prepared before; the tokens go to RUN_DIR/stream."""
    stream_block: int = 1 << 19
    """Tokens in a file of a stream, about: a whole number of sequences."""
    stream_window: int = 64
    """Files of a stream whose sequences are shuffled together in the first epoch (the first windows have 1, 2, 4, …);
    later epochs shuffle all."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which documents are taken, and how their tokens are made."""

    workers: int | None = None
    """Processes that read and encode. null: one for each core. Their number changes nothing in the token files."""
    fast_encoder: bool = True
    """Encode with fastokens where it is installed and gives the ids of tokenizers."""
    min_characters: int = 1
    """Shorter documents are left out."""
    max_characters: int | None = None
    """Longer documents are left out. null: none."""
    duplicates: str = "keep"
    """keep: all documents; exact: of equal ones the first; near: also of similar ones (MinHash, needs rensa)."""
    similarity: float = 0.8
    """Jaccard similarity of the sets of word 5-grams from which on documents are near duplicates, in (0, 1)."""
    tokenizer_kind: str = "bpe"
    """Of the tokenizer trained here: bpe (byte-level; Radford et al. 2019) or unigram (Kudo 2018)."""
    special_tokens: list[str] = field(default_factory=list)
    """Tokens that a tokenizer trained here has beside the end of text; no text is ever encoded to them."""


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Every source by its name, with all that it takes from ``data``; one source where none are named."""
    if data.sources is None:
        only = SourceConfig(text=data.text, prepared=data.prepared)
        return {label_of(data): _filled(only, data)}
    return {name: _filled(source, data) for name, source in data.sources.items()}


def label_of(data: DataConfig) -> str:
    """What the corpus is called where it is the only source: as the first file, directory or dataset of its text."""
    if data.name is not None:
        return data.name
    address = (data.text or [""])[0].removeprefix("builtin:").removeprefix("hf:").partition("@")[0]
    words = [
        re.sub(r"[^\w-]+", "-", part.partition(".")[0]) for part in address.split("/") if not set(part) & set("*?[")
    ]
    return next(filter(None, reversed(words)), "text")


def _filled(source: SourceConfig, data: DataConfig) -> SourceConfig:
    return replace(
        source,
        text_column=source.text_column or data.text_column,
        format=source.format or data.format,
        held_out=data.held_out if source.held_out is None else source.held_out,
        max_epochs=data.max_epochs if source.max_epochs is None else source.max_epochs,
    )


_OF_A_SOURCE = re.compile(
    # no path, and nothing in quotes: those are the user's own words
    rf"(?<![\w./'\"-])data\.({'|'.join(each.name for each in fields(SourceConfig))})\b(?![/'\"]|\.\w)"
)


@contextmanager
def told_of(name: str, data: DataConfig) -> Iterator[None]:
    """Whatever is wrong with the text of one of several sources is told by the settings of that source.

    What reads text knows nothing of sources, and speaks of ``data.text``.
    """
    try:
        yield
    except DataError as error:
        if data.sources is not None:
            error.args = (_OF_A_SOURCE.sub(rf"data.sources.{name}.\1", str(error)),)
        raise


def with_prepared(data: DataConfig, directories: dict[str, str]) -> DataConfig:
    """The settings with the directory of each source's token files."""
    if data.sources is None:
        return replace(data, prepared=directories[label_of(data)])
    placed = {name: replace(source, prepared=directories[name]) for name, source in data.sources.items()}
    return replace(data, sources=placed)


def broken_rules(data: DataConfig) -> Iterator[str]:
    """What is wrong with them: field, value, rule, a way out."""
    formats = {"data.format": data.format} | {
        f"data.sources.{name}.format": each.format or data.format for name, each in (data.sources or {}).items()
    }
    for name, kind in formats.items():
        if kind not in FORMATS:
            yield f"{name} is {kind!r}, but must be one of {', '.join(FORMATS)}"
    if data.template is not None and "instruction" not in formats.values():
        yield "data.template is set, but no text is of the format instruction: set data.format, or template to null"
    for name, share in (("fill_in_middle", data.fill_in_middle), ("fill_in_middle_spm", data.fill_in_middle_spm)):
        if not 0 <= share <= 1:
            yield f"data.{name} is {share}, but must lie in [0, 1]: it is a share of the documents"
    if data.stream:
        yield from _stream(data, formats=formats.values())
    if data.sources is None:
        if data.mixture is not None:
            yield "data.mixture is set, but there is one source alone: name several in data.sources, or set it to null"
        return
    if not data.sources:
        yield "data.sources is {}, but must name at least one source: add one, or set it to null and use data.text"
        return
    if data.prepared is not None or data.text != DataConfig().text:
        name = "data.prepared" if data.prepared is not None else "data.text"
        yield f"{name} is set, but data.sources says what is read: make it a source, or set data.sources to null"
    for name, source in data.sources.items():
        yield from _source(name, source, data=data)
    yield from _weights(data.sources)
    yield from _stages(data)


def _stream(data: DataConfig, *, formats: Iterable[str]) -> Iterator[str]:
    way = "leave it out, or set data.stream=false"
    if data.sources is not None:
        yield f"data.stream is true, but data.sources names several sources, and a stream has one: {way}"
    elif "instruction" in formats:
        yield f"data.stream is true, but data.format is instruction, and only text can be streamed: {way}"
    if data.prepared is not None:
        yield f"data.stream is true, but data.prepared is {data.prepared!r}, which needs no stream: {way}"
    if data.max_epochs is not None:
        yield f"data.stream is true, but data.max_epochs is {data.max_epochs}, and its length is unknown: {way}"


def _source(name: str, source: SourceConfig, *, data: DataConfig) -> Iterator[str]:
    key = f"data.sources.{name}"
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"):
        yield f"{key}: the name of a source must be one word of letters, digits, '_' and '-': rename it"
    if not source.text and source.prepared is None:
        yield f"{key} has neither text nor prepared, but must say where its text or its token files are: set one"
    if source.held_out is not None and not 0 < source.held_out <= 0.5:
        yield f"{key}.held_out is {source.held_out}, but must lie in (0, 0.5]: it is a share of the documents"
    if source.weight is not None and not 0 <= source.weight < math.inf:
        yield f"{key}.weight is {source.weight}, but must be at least 0 and finite"
    for field_name, value in (("epochs", source.epochs), ("max_epochs", source.max_epochs)):
        if value is not None and not _above_0(value):
            yield f"{key}.{field_name} is {value}, but must be above 0 and finite"
    if source.weight is not None and source.epochs is not None:
        yield f"{key} has weight {source.weight} and epochs {source.epochs}, but one follows from the other: set one"
    most = data.max_epochs if source.max_epochs is None else source.max_epochs
    if source.epochs is not None and most is not None and source.epochs > most:
        yield f"{key}.epochs is {source.epochs}, but must be at most its max_epochs, {most}: use less, or raise it"


def _weights(sources: dict[str, SourceConfig]) -> Iterator[str]:
    by_weight = {name: source.weight for name, source in sources.items() if source.epochs is None}
    given = [name for name, weight in by_weight.items() if weight is not None]
    missing = [name for name in by_weight if name not in given]
    if given and missing:
        yield (
            f"data.sources.{missing[0]}.weight is null, but data.sources.{given[0]}.weight is {by_weight[given[0]]}: "
            "give every source a weight (or epochs), or none, so that their sizes count"
        )
    if given and not missing and not any(by_weight.values()) and len(given) == len(sources):
        yield f"data.sources.{given[0]}.weight is 0, and so are the others, but one must be read: set one above 0"


def _stages(data: DataConfig) -> Iterator[str]:
    if data.mixture is None or data.sources is None:
        return
    if not data.mixture:
        yield "data.mixture is [], but must have at least one stage: add one, or set it to null"
        return
    for name, source in data.sources.items():
        if source.epochs is not None:
            yield (
                f"data.sources.{name}.epochs is {source.epochs}, but data.mixture tells shares of stages: use weight, "
                "and max_epochs as a limit"
            )
    before = 0.0
    for number, stage in enumerate(data.mixture):
        key = f"data.mixture[{number}]"
        if not before < stage.until <= 1:
            yield f"{key}.until is {stage.until}, but must be above {before} and at most 1: it is a share of the run"
        before = stage.until
        for name, weight in (stage.weights or {}).items():
            if name not in data.sources:
                yield f"{key}.weights names '{name}', but the sources are {', '.join(data.sources)}"
            if not 0 <= weight < math.inf:
                yield f"{key}.weights.{name} is {weight}, but must be at least 0 and finite"
        if stage.weights is not None and not any(stage.weights.values()):
            yield f"{key}.weights has nothing above 0, but a source must be read: set one, or null"
    if before != 1:
        yield f"data.mixture ends at {before}, but must end at 1, the end of the run: set until=1 in the last stage"


def _above_0(value: float) -> bool:
    return 0 < value < math.inf
