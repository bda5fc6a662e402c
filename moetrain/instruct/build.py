"""Conversations to token files: a prepared directory with, beside the tokens, whether each has a loss."""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moetrain.data.build import write_counted
from moetrain.data.corpus import (
    FORMAT_VERSION,
    META,
    SPLITS,
    TOKENIZER,
    Meta,
    Prepared,
    SourceFile,
    SplitWriter,
    file_sha256,
    open_prepared,
    write_meta,
)
from moetrain.data.tokenizer import end_of_text, fingerprint, train_tokenizer, vocabulary_size
from moetrain.errors import DataError
from moetrain.instruct.template import TEMPLATE, Part, check_template, parts_of
from moetrain.prepare.baselines import LIMITS, measure
from moetrain.prepare.build import OUT, check_fits, tokenizer_sha256
from moetrain.prepare.directory import fill
from moetrain.prepare.encoding import Progress
from moetrain.prepare.reading import Options
from moetrain.sources.text import check_whole, expand, nothing_to_read, values_of
from moetrain.tokenization.formats import read_tokenizer


def instruction_directory(
    base: Path, *, name: str, text: Sequence[str], template: Mapping[str, str] | None, held_out: float, vocab_size: int,
    tokenizer: str | None, options: Options,
) -> Path:  # fmt: skip
    """BASE/NAME-DIGEST: where the token files of these settings belong; the digest covers the files' content.

    Raises:
        DataError: a file cannot be found.
    """
    covered = {
        "format_version": FORMAT_VERSION,
        "template": dict(template or TEMPLATE),
        "files": [file_sha256(path) for path in expand(text)],
        "held_out": held_out,
        "vocab_size": vocab_size,
        "tokenizer": [options.tokenizer_kind, *options.special_tokens] if tokenizer is None
                     else tokenizer_sha256(Path(tokenizer)),
    }  # fmt: skip
    return base / f"{name}-{hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:8]}"


def prepare_instructions(
    directory: Path, *, text: Sequence[str], template: Mapping[str, str] | None, held_out: float, vocab_size: int,
    tokenizer: str | None, options: Options, progress: Progress, verify: bool = False,
) -> Prepared:  # fmt: skip
    """Make the token files of conversations, unless they are there.

    Args:
        directory: made whole by one rename.
        text: patterns of .jsonl and .json files, also compressed, see ``sources.text.expand``.
        template: text for each role (``instruct.template``); None: ours.
        held_out: share of the conversations kept for evaluation; which ones depends on their text alone.
        vocab_size: rows of the model's embedding.
        tokenizer: see ``tokenization.formats.read_tokenizer``; None: one is trained on the conversations.
        options: of these the kind and the special tokens of a tokenizer that is trained here.
        progress: called with a stage, bytes done and bytes in all.
        verify: compare the files with their digests, but for the loss masks (``data.build.open_counted``).

    Raises:
        DataError: a file cannot be read, a row is no conversation, the tokenizer does not fit, there are too few
            conversations, or the disk is full.
    """
    if not (directory / META).exists():
        used = dict(template or TEMPLATE)
        check_template(used)
        fill(directory, lambda work: _build(work / OUT, expand(text), template=used, held_out=held_out,
                                            vocab_size=vocab_size, tokenizer=tokenizer, options=options,
                                            progress=progress))  # fmt: skip
    prepared = open_prepared(directory, verify=verify)
    check_fits(prepared.vocab_size, what=f"the prepared directory {directory}", vocab_size=vocab_size)
    return prepared


@dataclass(frozen=True)
class _Conversation:
    parts: list[Part]  # none where it is empty

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    def is_held_out(self, share: float) -> bool:
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * (1 << 64)


def _build(
    out: Path, files: list[Path], *, template: dict[str, str], held_out: float, vocab_size: int,
    tokenizer: str | None, options: Options, progress: Progress,
) -> None:  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)  # of an earlier start
    out.mkdir()

    def conversations(stage: str) -> Iterator[_Conversation]:
        return _read(files, template=template, stage=stage, progress=progress)

    if tokenizer is None:
        texts = (each.text for each in conversations("tokenizer") if each.parts and not each.is_held_out(held_out))
        chosen = train_tokenizer(texts, vocab_size=vocab_size, kind=options.tokenizer_kind,
                                 special_tokens=options.special_tokens)  # fmt: skip
    else:
        chosen = read_tokenizer(Path(tokenizer))
        check_fits(vocabulary_size(chosen), what=f"the tokenizer {tokenizer}", vocab_size=vocab_size)
    samples = {split: bytearray() for split in SPLITS}
    limits = dict(zip(SPLITS, LIMITS, strict=True))
    counted = {split: array("B") for split in SPLITS}
    empty = 0
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(out, split=split, vocab_size=vocabulary_size(chosen)))
                   for split in SPLITS}  # fmt: skip
        for each in conversations("encode"):
            if not each.parts:
                empty += 1
                continue
            split = "held_out" if each.is_held_out(held_out) else "train"
            ids, flags = _encode(each, chosen)
            data = each.text.encode()
            writers[split].add(ids, num_bytes=len(data))
            counted[split].frombytes(flags)
            samples[split] += data[: limits[split] - len(samples[split])]
        if not any(counted.values()):
            raise nothing_to_read(files, num_empty=empty)
        if not all(counted.values()):
            raise DataError(
                f"{files[0].name} and the like hold too few conversations for a training and a held-out part: add "
                "some, or set a larger data.held_out"
            )
        train, kept = writers["train"].finish(), writers["held_out"].finish()
    write_counted(out, {split: np.frombuffer(flags, dtype=np.uint8) for split, flags in counted.items()},
                  template=template)  # fmt: skip
    (out / TOKENIZER).write_text(chosen.to_str(), encoding="utf-8")
    meta = Meta(
        format_version=FORMAT_VERSION,
        vocab_size=vocabulary_size(chosen),
        end_of_text=end_of_text(chosen),
        tokenizer_fingerprint=fingerprint(chosen),
        empty_documents=empty,
        train=train,
        held_out=kept,
        sources=tuple(SourceFile(name=path.name, size=path.stat().st_size, sha256=file_sha256(path)) for path in files),
        baselines=measure(bytes(samples["train"]), bytes(samples["held_out"]),
                          truncated=sum(map(len, samples.values())) < train.bytes + kept.bytes),
    )  # fmt: skip
    write_meta(out, meta=meta)


def _encode(conversation: _Conversation, tokenizer: Tokenizer) -> tuple[list[int], bytes]:
    """Ids with the end-of-text token, and for each whether it is learnt."""
    ids: list[int] = []
    flags = bytearray()
    for part in conversation.parts:
        own = tokenizer.encode(part.text, add_special_tokens=False).ids
        ids += own
        flags += bytes([part.counted]) * len(own)
    # after the user's last word it is not for the model to end the text
    return [*ids, end_of_text(tokenizer)], bytes(flags) + bytes([conversation.parts[-1].counted])


def _read(files: list[Path], *, template: dict[str, str], stage: str, progress: Progress) -> Iterator[_Conversation]:
    sizes = [path.stat().st_size for path in files]
    for number, path in enumerate(files):

        def tell(position: int, *, before: int = sum(sizes[:number])) -> None:
            progress(stage, before + position, sum(sizes))

        for row, value in values_of(path, tell=tell):
            where = f"{path}, row {row:,}"
            if not isinstance(value, dict):
                raise DataError(f"{where} is not an object: write prompt and response, or messages")
            conversation = _Conversation(parts_of(value, template=template, where=where))
            check_whole(conversation.text, where=partial(str, where))
            yield conversation
