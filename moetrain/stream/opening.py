"""What must be there before a stream is trained on: the tokenizer, the held-out text, and what the text was.

RUN_DIR/stream/opening is a prepared directory (``data/corpus.py``) of the beginning of the text: its held-out split
holds the held-out documents there, its training split only the very first others, whose tokens come again in the
blocks. ``stream.json`` beside them says what the stream is made of. One rename makes it whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moetrain.config.schema import RunConfig
from moetrain.data.build import OPENING
from moetrain.data.corpus import (
    FORMAT_VERSION,
    TOKENIZER,
    Baselines,
    Meta,
    Prepared,
    RoundTrip,
    SourceFile,
    Split,
    SplitWriter,
    open_prepared,
    write_meta,
)
from moetrain.data.tokenizer import end_of_text, fingerprint, load_tokenizer, train_tokenizer, vocabulary_size
from moetrain.errors import DataError
from moetrain.prepare.baselines import LIMITS, measure
from moetrain.prepare.build import Request, check_fits, tokenizer_sha256
from moetrain.prepare.reading import Options, hub_sha256, size_of
from moetrain.sources.hub import HubDataset
from moetrain.sources.spool import cut_between, read_json, write_json
from moetrain.sources.text import files_of, inputs, is_tokenized, nothing_to_read
from moetrain.stream.blocks import ABOUT, Blocks, open_again
from moetrain.stream.documents import documents_of
from moetrain.stream.encode import Encoder
from moetrain.tokenization.formats import read_tokenizer

HEAD = 64 << 20
"""Bytes of text whose held-out documents are evaluated on; of the files as they lie, so many are digested."""

TOKENIZER_TEXT = 16 << 20
"""Bytes of text that a tokenizer is trained on."""

_TRAINING_TEXT = 1 << 20  # bytes of it in the opening
_TRY_ONE_OF = 8  # documents of the opening that are decoded again

Progress = Callable[[str, int, int | None], None]


def request_of(run: RunConfig) -> Request:
    """Which text a run streams, and what of it is taken.

    Raises:
        DataError: there is no such text.
    """
    options = Options(**asdict(run.prepare) | {"special_tokens": tuple(run.prepare.special_tokens)})
    found = inputs(run.data.text)
    if is_tokenized(found[0]):
        raise DataError(f"{found[0]} holds token ids, and a stream tokenizes text: set data.stream=false")
    return Request(
        inputs=found,
        text_column=run.data.text_column,
        held_out=run.data.held_out,
        vocab_size=run.model.vocab_size,
        tokenizer=run.data.tokenizer,
        options=options,
    )


def open_stream(run: RunConfig, run_dir: Path, *, is_begun: bool, progress: Progress) -> Prepared:
    """The opening of a run's stream, made now if it is not there. Nobody else works on the stream meanwhile.

    Args:
        run: resolved.
        run_dir: of the run.
        is_begun: whether the run has checkpoints, which would not fit another text.
        progress: called with the stage and how much is done, of how much.

    Raises:
        DataError: the text cannot be read, has fewer than two different documents at its beginning, changed since the
            run began, or the tokenizer does not fit.
    """
    request = request_of(run)
    plan = _plan(run, request)
    directory = run_dir / OPENING
    about = read_json(directory / ABOUT)
    if about is None or about["plan"] != plan:
        if about is not None and is_begun:
            raise DataError(
                f"{run_dir} was trained on other data: {_changed(about['plan'], plan)} changed since; set it back, or "
                "choose another name=… or run_dir=… for another run"
            )
        shutil.rmtree(directory.parent, ignore_errors=True)
        _make(directory, request, plan=plan, progress=progress)
    else:
        _sweep(open_again(run, run_dir).blocks)
    return open_prepared(directory)


def _sweep(blocks: Blocks) -> None:
    """Of blocks that are not all there, leave none: training would take the last for a sign that the others are."""
    position, _ = blocks.read_position()
    end = blocks.end()
    rest = 0 if end is None else end.sequences - position.blocks * blocks.shape.sequences
    if end is not None and (rest < 0 or (rest and not blocks.has(position.blocks, sequences=rest))):
        (blocks.directory / "end.json").unlink()
        end = None
    if not position.blocks and end is None:
        for path in [*blocks.directory.glob("block_*"), blocks.directory / "position", blocks.directory / "wanted"]:
            path.unlink(missing_ok=True)


def _plan(run: RunConfig, request: Request) -> dict[str, Any]:
    """All that the tokens of the stream depend on, as it can be known without reading all the text."""
    return {
        "format_version": FORMAT_VERSION,
        "sources": [asdict(source) for source in _sources(request)],
        "text_column": request.text_column,
        "held_out": request.held_out,
        "vocab_size": request.vocab_size,
        "tokenizer": None if request.tokenizer is None else tokenizer_sha256(Path(request.tokenizer)),
        "sequence_length": run.sequence_length,
        "stream_block": run.data.stream_block,
        **request.options.covered(),
    }


def _sources(request: Request) -> list[SourceFile]:
    """Names and sizes of the files, and sha256 of what of each lies in the first ``HEAD`` bytes of all."""
    found, left = [], HEAD
    for one in request.inputs:
        if isinstance(one, HubDataset):
            found.append(SourceFile(name=str(one), size=0, sha256=hub_sha256(one)))
        for path in files_of(one):
            try:
                with open(path, "rb") as file:
                    content = file.read(left)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read ({error}): data.text must name files that can be read"
                ) from error
            left -= len(content)
            found.append(SourceFile(path.name, size=path.stat().st_size, sha256=hashlib.sha256(content).hexdigest()))
    return found


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a plan is another, for a message."""
    names = [name for name in now if before.get(name) != now[name] and name != "sources"]
    old, new = ([tuple(source.values()) for source in each["sources"]] for each in (before, now))
    files = [str(source[0]) for source in [*old, *new] if (source in old) != (source in new)]
    if old != new:
        names.append(f"the text ({', '.join(dict.fromkeys(files[:4])) or 'the order of its files'})")
    return ", ".join(names)


@dataclass
class _Head:
    """The beginning of the text."""

    documents: list[bytes]
    places: list[int]


def _read_head(request: Request, *, sizes: list[int], progress: Progress) -> _Head:
    head, size, left_out = _Head([], []), 0, {"empty": 0}
    for document in documents_of(request, sizes=sizes):
        if document.left_out:
            left_out[document.left_out] = left_out.get(document.left_out, 0) + 1
            continue
        head.documents.append(document.text)
        head.places.append(document.place)
        size += len(document.text)
        if len(head.places) % 256 == 0:
            progress("read", size, HEAD)
        if size >= HEAD:
            break
    if not head.documents:
        empty = left_out.pop("empty")
        raise nothing_to_read(request.inputs, num_empty=empty, num_other=sum(left_out.values()))
    if min(head.places) == max(head.places):
        count = len(head.places)
        what = "one document" if count == 1 else f"{count:,} documents, all the same"
        raise DataError(
            f"data.text holds {what}{f' in its first {HEAD >> 20} MiB' if size >= HEAD else ''}, but training and "
            "held-out text need at least one each: split the text into several files or rows (a .txt file is one "
            "document)"
        )
    return head


def _make(directory: Path, request: Request, *, plan: dict[str, Any], progress: Progress) -> None:
    # the given tokenizer first: a fault there should not wait for the text to be read
    given = None if request.tokenizer is None else read_tokenizer(Path(request.tokenizer))
    sizes = [size_of(one) for one in request.inputs]
    head = _read_head(request, sizes=sizes, progress=progress)
    cut = cut_between(min(head.places), max(head.places), held_out=request.held_out)
    train = [text for text, place in zip(head.documents, head.places, strict=True) if place >= cut]
    held_out = [text for text, place in zip(head.documents, head.places, strict=True) if place < cut]
    tokenizer = given
    if tokenizer is None:
        progress("tokenizer", 0, 1)
        tokenizer = train_tokenizer(
            (text.decode() for text in _first(train, TOKENIZER_TEXT)),
            vocab_size=request.vocab_size,
            kind=request.options.tokenizer_kind,
            special_tokens=request.options.special_tokens,
        )
        progress("tokenizer", 1, 1)
    check_fits(vocabulary_size(tokenizer), what=f"the tokenizer {request.tokenizer}", vocab_size=request.vocab_size)
    out = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(out / ABOUT, {"plan": plan, "cut": cut, "sizes": sizes})
    tokenizer = load_tokenizer(out / TOKENIZER)
    progress("held-out text", 0, 1)
    encoder = Encoder(out / TOKENIZER)
    first = _first(train, _TRAINING_TEXT)
    splits = [_write(out, name, texts, encoder=encoder, vocab_size=vocabulary_size(tokenizer))
              for name, texts in (("train", first), ("held_out", held_out))]  # fmt: skip
    tried = first[::_TRY_ONE_OF]
    same = sum(tokenizer.decode(encoder([text.decode()])[:-1].tolist(), skip_special_tokens=False) == text.decode()
               for text in tried)  # fmt: skip
    assert given is not None or same == len(tried), "a byte-level tokenizer lost text"
    progress("held-out text", 1, 1)
    baselines = _baselines(train, held_out)
    write_meta(out, meta=_meta(tokenizer, splits, plan=plan, baselines=baselines, tried=RoundTrip(len(tried), same)))
    out.rename(directory)


def _first(texts: list[bytes], limit: int) -> list[bytes]:
    """The texts that begin in the first ``limit`` bytes."""
    found, size = [], 0
    for text in texts:
        if size >= limit:
            break
        found.append(text)
        size += len(text)
    return found


def _write(directory: Path, split: str, texts: list[bytes], *, encoder: Encoder, vocab_size: int) -> Split:
    with SplitWriter(directory, split=split, vocab_size=vocab_size) as writer:
        for text in texts:
            writer.add(encoder([text.decode()]), num_bytes=len(text))
        return writer.finish()


def _baselines(train: list[bytes], held_out: list[bytes]) -> Baselines:
    counted, measured = (b"".join(_first(texts, limit))[:limit]
                         for texts, limit in zip((train, held_out), LIMITS, strict=True))  # fmt: skip
    return measure(counted, measured, truncated=True)  # the training text goes on after the opening


def _meta(
    tokenizer: Tokenizer, splits: list[Split], *, plan: dict[str, Any], baselines: Baselines, tried: RoundTrip
) -> Meta:
    train, held_out = splits
    return Meta(
        format_version=FORMAT_VERSION,
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=end_of_text(tokenizer),
        tokenizer_fingerprint=fingerprint(tokenizer),
        empty_documents=0,
        train=train,
        held_out=held_out,
        sources=tuple(SourceFile(**source) for source in plan["sources"]),
        baselines=baselines,
        round_trip=tried,
    )
