"""Conversations to token files: a prepared directory with, beside the tokens, whether each has a loss."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from tokenizers import Tokenizer

from moetrain.data.build import write_counted
from moetrain.data.corpus import (
    FORMAT_VERSION,
    META,
    SPLITS,
    TOKENIZER,
    Baselines,
    Meta,
    Prepared,
    Source,
    SplitWriter,
    file_sha256,
    open_prepared,
    write_meta,
)
from moetrain.data.tokenizer import end_of_text, fingerprint, train_tokenizer, vocabulary_size
from moetrain.errors import DataError
from moetrain.instruct.template import TEMPLATE, Part, check_template, parts_of
from moetrain.prepare.baselines import trigram_bits_per_byte, xz_bits_per_byte
from moetrain.prepare.build import BASELINE_LIMITS, check_fits, tokenizer_sha256
from moetrain.prepare.encoding import Progress
from moetrain.prepare.text import expand
from moetrain.tokenization.formats import read_tokenizer


def instruction_directory(
    base: Path, *, name: str, text: Sequence[str], template: Mapping[str, str] | None, held_out: float, vocab_size: int,
    tokenizer: str | None,
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
        "tokenizer": None if tokenizer is None else tokenizer_sha256(Path(tokenizer)),
    }
    return base / f"{name}-{hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:8]}"


def prepare_instructions(
    directory: Path, *, text: Sequence[str], template: Mapping[str, str] | None, held_out: float, vocab_size: int,
    tokenizer: str | None, progress: Progress,
) -> Prepared:  # fmt: skip
    """Make the token files of conversations, unless they are there.

    Args:
        directory: made whole by one rename.
        text: patterns of .jsonl and .jsonl.gz files, see ``prepare.text.expand``.
        template: text for each role (``instruct.template``); None: ours.
        held_out: share of the conversations kept for evaluation; which ones depends on their text alone.
        vocab_size: rows of the model's embedding.
        tokenizer: see ``tokenization.formats.read_tokenizer``; None: one is trained on the conversations.
        progress: called with a stage, bytes done and bytes in all.

    Raises:
        DataError: a row is no conversation, the tokenizer does not fit, or there are too few conversations.
    """
    if not (directory / META).exists():
        used = dict(template or TEMPLATE)
        check_template(used)
        partial = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _build(partial, expand(text), template=used, held_out=held_out, vocab_size=vocab_size,
                   tokenizer=tokenizer, progress=progress)  # fmt: skip
            try:
                os.rename(partial, directory)
            except OSError:
                # a run beside this one may have made the same meanwhile
                if not (directory / META).exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    prepared = open_prepared(directory)
    check_fits(prepared.vocab_size, what=f"the prepared directory {directory}", vocab_size=vocab_size)
    return prepared


@dataclass(frozen=True)
class _Conversation:
    parts: list[Part]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    def is_held_out(self, share: float) -> bool:
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * (1 << 64)


def _build(
    partial: Path, files: list[Path], *, template: dict[str, str], held_out: float, vocab_size: int,
    tokenizer: str | None, progress: Progress,
) -> None:  # fmt: skip
    def conversations(stage: str) -> Iterator[_Conversation]:
        return _read(files, template=template, stage=stage, progress=progress)

    if tokenizer is None:
        texts = (each.text for each in conversations("tokenizer") if not each.is_held_out(held_out))
        chosen = train_tokenizer(texts, vocab_size=vocab_size)
    else:
        chosen = read_tokenizer(Path(tokenizer))
    check_fits(vocabulary_size(chosen), what=f"the tokenizer {tokenizer}", vocab_size=vocab_size)
    samples = {split: bytearray() for split in SPLITS}
    limits = dict(zip(SPLITS, BASELINE_LIMITS, strict=True))
    counted = {split: array("B") for split in SPLITS}
    with ExitStack() as stack:
        writers = {split: stack.enter_context(SplitWriter(partial, split=split, vocab_size=vocabulary_size(chosen)))
                   for split in SPLITS}  # fmt: skip
        for each in conversations("encode"):
            split = "held_out" if each.is_held_out(held_out) else "train"
            ids, flags = _encode(each, chosen)
            data = each.text.encode()
            writers[split].add(ids, num_bytes=len(data))
            counted[split].frombytes(flags)
            samples[split] += data[: limits[split] - len(samples[split])]
        if not all(counted.values()):
            raise DataError(
                f"{files[0].name} and the like hold too few conversations for a training and a held-out part: add "
                "some, or set a larger data.held_out"
            )
        train, kept = writers["train"].finish(), writers["held_out"].finish()
    write_counted(partial, {split: np.frombuffer(flags, dtype=np.uint8) for split, flags in counted.items()},
                  template=template)  # fmt: skip
    (partial / TOKENIZER).write_text(chosen.to_str(), encoding="utf-8")
    meta = Meta(
        format_version=FORMAT_VERSION,
        vocab_size=vocabulary_size(chosen),
        end_of_text=end_of_text(chosen),
        tokenizer_fingerprint=fingerprint(chosen),
        empty_documents=0,
        train=train,
        held_out=kept,
        sources=tuple(Source(name=path.name, size=path.stat().st_size, sha256=file_sha256(path)) for path in files),
        baselines=Baselines(
            xz=xz_bits_per_byte(bytes(samples["held_out"])),
            trigram=trigram_bits_per_byte(bytes(samples["train"]), bytes(samples["held_out"])),
            train_bytes=len(samples["train"]),
            held_out_bytes=len(samples["held_out"]),
            truncated=len(samples["train"]) < train.bytes or len(samples["held_out"]) < kept.bytes,
        ),
    )
    write_meta(partial, meta=meta)


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
        progress(stage, sum(sizes[: number + 1]), sum(sizes))
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            raise DataError(f"{path} is no .jsonl or .jsonl.gz, but conversations are: name such files in data.text")
        with _open(path) as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    where = f"{path}, line {line}"
                    yield _Conversation(parts_of(_row(text, where=where), template=template, where=where))


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _row(text: bytes, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}): each line must be a row") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is no row with fields: write prompt and response, or messages")
    return row
