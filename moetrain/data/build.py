"""Settings to batches: the prepared sources of a run, how they are mixed, and what that comes to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moetrain.config.checks import steps_in_run
from moetrain.config.data import DataConfig, SourceConfig, label_of, sources_of
from moetrain.config.schema import RunConfig
from moetrain.data.corpus import Prepared, file_sha256, open_prepared
from moetrain.data.loader import Batches, HeldOutText, Sequences, Source
from moetrain.data.middle import MARKS, FillInMiddle
from moetrain.data.mixture import Mixture, Stage
from moetrain.data.packing import Packing
from moetrain.data.tokenizer import load_tokenizer
from moetrain.errors import ConfigError, DataError

COUNTED = "counted.json"

OPENING = Path("stream") / "opening"
"""In RUN_DIR: the prepared directory of the beginning of a text that is streamed."""


@dataclass(frozen=True)
class Counted:
    """Whether each token of a prepared directory has a loss as a target, uint8 [N], 0 or 1."""

    train: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    digests: dict[str, str]


def write_counted(directory: Path, flags: dict[str, npt.NDArray[np.uint8]], *, template: dict[str, str]) -> None:
    """Write ``train.counted.npy`` and ``held_out.counted.npy``, and ``counted.json`` on them; before ``meta.json``.

    Args:
        flags: by split.
        template: how conversations became text, for the record.
    """
    for split, each in flags.items():
        np.save(directory / f"{split}.counted.npy", each, allow_pickle=False)
    digests = {split: file_sha256(directory / f"{split}.counted.npy") for split in flags}
    (directory / COUNTED).write_text(json.dumps({"sha256": digests, "template": template}, indent=2), encoding="utf-8")


def open_counted(prepared: Prepared, *, verify: bool = False) -> Counted | None:
    """What ``write_counted`` wrote; None: every token counts.

    Args:
        verify: compare it with its digests.

    Raises:
        DataError: it does not fit the tokens.
    """
    directory = prepared.directory
    if not (directory / COUNTED).is_file():
        return None
    try:
        digests = dict(json.loads((directory / COUNTED).read_text(encoding="utf-8"))["sha256"])
        train, held_out = (np.load(directory / f"{split}.counted.npy", mmap_mode="r", allow_pickle=False)
                           for split in ("train", "held_out"))  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(f"{directory / COUNTED} or a file it names is damaged ({error}): prepare it again") from error
    if (len(train), len(held_out)) != (prepared.train.num_tokens, prepared.held_out.num_tokens):
        raise DataError(f"{directory}: the loss masks are not as long as the tokens: prepare it again")
    for split, digest in digests.items():
        if verify and file_sha256(path := directory / f"{split}.counted.npy") != digest:
            raise DataError(f"{path} does not have the sha256 that {COUNTED} tells: prepare it again")
    return Counted(train=train, held_out=held_out, digests=digests)


@dataclass(frozen=True)
class Corpus:
    """The prepared sources of a run, all of one tokenizer."""

    parts: dict[str, Prepared]
    """By the name of the source."""
    counted: dict[str, Counted | None] = field(default_factory=dict)
    """Which of their tokens have a loss; all, where a source is missing or None."""
    is_streamed: bool = False
    """Whether they are only the opening of a stream: then the text is told from another by its files."""

    @property
    def first(self) -> Prepared:
        """Its tokenizer is that of all."""
        return next(iter(self.parts.values()))

    def digests(self) -> dict[str, str]:
        """What a model trained on this must find again: its tokens and their meaning."""
        found: dict[str, str] = {}
        for name, part in self.parts.items():
            counted = self.counted.get(name)
            masks = {} if counted is None else {f"loss mask ({split})": each for split, each in counted.digests.items()}
            own = {what: digest for what, digest in (part.digests() | masks).items() if what != "tokenizer"}
            found |= own if len(self.parts) == 1 else {f"{what} of {name}": digest for what, digest in own.items()}
        if self.is_streamed:
            files = [asdict(file) for file in self.first.meta.sources]
            found["text files"] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        return found | {"tokenizer": self.first.meta.tokenizer_fingerprint}

    def held_out(self) -> dict[str, HeldOutText]:
        """The held-out text of each source."""
        found = {}
        for name, part in self.parts.items():
            counted = self.counted.get(name)
            text = part.held_out
            found[name] = HeldOutText(
                tokens=text.tokens, num_bytes=text.num_bytes, counted=None if counted is None else counted.held_out
            )
        return found

    def training(self) -> dict[str, HeldOutText]:
        """The training text of each source, in the order in which it lies."""
        found = {}
        for name, part in self.parts.items():
            counted = self.counted.get(name)
            found[name] = HeldOutText(
                tokens=part.train.tokens,
                num_bytes=part.train.num_bytes,
                counted=None if counted is None else counted.train,
            )
        return found

    def packing(self, data: DataConfig) -> Packing:
        """What documents in one sequence see of each other."""
        return Packing(
            end_of_text=self.first.meta.end_of_text,
            mask_documents=data.mask_documents,
            reset_positions=data.reset_positions,
        )

    def frequencies(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """How often each token id occurs at the beginning of the sources, [vocab_size]."""
        found = np.zeros(vocab_size, dtype=np.int64)
        for part in self.parts.values():
            found += part.train.frequencies(vocab_size)
        return found


@dataclass(frozen=True)
class SourceUse:
    """What a run reads of one source."""

    name: str
    sequences: int
    """Over the whole run."""
    share: float
    """Of all the sequences."""
    epochs: float
    used_up_at: int | None
    """The step at which it had nothing left to give (``max_epochs``); None: it lasts."""


def open_corpus(run: RunConfig, run_dir: Path) -> Corpus:
    """Open the token files of every source; ``run.data`` says where they are, but for a stream's opening.

    Raises:
        DataError: one cannot be opened, or has another tokenizer than the first.
    """
    if run.data.stream:
        return Corpus({label_of(run.data): open_prepared(run_dir / OPENING)}, is_streamed=True)
    return hold_together({name: open_prepared(Path(str(each.prepared))) for name, each in sources_of(run.data).items()})


def hold_together(parts: dict[str, Prepared], *, verify: Collection[str] = ()) -> Corpus:
    """Make one corpus of prepared sources.

    Args:
        verify: those whose loss masks are compared with their digests.

    Raises:
        DataError: one has another tokenizer than the first.
    """
    (first, its), *others = parts.items()
    for name, part in others:
        if part.meta.tokenizer_fingerprint != its.meta.tokenizer_fingerprint:
            raise DataError(
                f"the source {name} ({part.directory}) was prepared with another tokenizer than {first} "
                f"({its.directory}), and a model knows one: prepare it again with data.tokenizer={its.tokenizer_path}"
            )
    return Corpus(parts, {name: open_counted(part, verify=name in verify) for name, part in parts.items()})


def make_batches(run: RunConfig, corpus: Corpus, *, streamed: Source | None = None) -> Batches:
    """The batches of a run, resolved.

    Args:
        streamed: the training sequences, where they are no token files.

    Raises:
        DataError: a source is shorter than one sequence, or all of them end before the run does.
        ConfigError: the epochs of the sources take more than there is.
    """
    if streamed is not None:
        return Batches([streamed], global_batch=run.batch.global_batch, rearrange=_fill_in_middle(run, corpus))
    sources = _sequences(run, corpus)
    mixture = _mixture(run, sources)
    total = _steps(run) * run.batch.global_batch
    if mixture.length is not None and mixture.length < total:
        raise DataError(
            f"every source has been read as often as max_epochs lets it after step "
            f"{mixture.length // run.batch.global_batch:,} of {_steps(run):,}: raise max_epochs, add text, or set "
            "schedule.steps to less"
        )
    return Batches(
        list(sources.values()),
        global_batch=run.batch.global_batch,
        mixture=mixture,
        rearrange=_fill_in_middle(run, corpus),
    )


def usage(run: RunConfig, corpus: Corpus) -> list[SourceUse]:
    """What a run will have read of each source at its end.

    Raises:
        ConfigError: as ``make_batches``.
    """
    sources = _sequences(run, corpus)
    mixture = _mixture(run, sources)
    total = _steps(run) * run.batch.global_batch
    if mixture.length is not None:
        total = min(total, mixture.length)
    counts = mixture.counts(total)
    used_up = {source: at // run.batch.global_batch for source, at in mixture.used_up.items() if at < total}
    return [
        SourceUse(name=name, sequences=count, share=count / total, epochs=count / sequences.per_epoch,
                  used_up_at=used_up.get(number))
        for number, ((name, sequences), count) in enumerate(zip(sources.items(), counts, strict=True))
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """What a step reads, for the eye. B samples of S+1 tokens."""

    step: int
    steps: int
    fingerprint: str
    names: tuple[str, ...]
    """Of the sources."""
    tokens: npt.NDArray[np.int64]
    """[B, S+1]."""
    counted: npt.NDArray[np.bool_] | None
    """[B, S+1], whether each has a loss as a target; None: all have."""
    samples: npt.NDArray[np.int64]
    """[B], counted over the whole run."""
    source: npt.NDArray[np.int64]
    """[B], number of its source."""
    epoch: npt.NDArray[np.int64]
    """[B], how often its source was read before."""
    end_of_text: int


def check_step(run: RunConfig, *, step: int) -> None:
    """Raises:
    ConfigError: the run has no such step.
    """
    if step >= _steps(run):
        raise ConfigError([f"step is {step:,}, but the run has {_steps(run):,}: use 0 to {_steps(run) - 1:,}"])


def view_batch(run: RunConfig, corpus: Corpus, *, step: int, streamed: Source | None = None) -> BatchView:
    """The very batch of a step, one that the run has.

    Args:
        streamed: as ``make_batches``.

    Raises:
        DataError: as ``make_batches``.
    """
    batches = make_batches(run, corpus, streamed=streamed)
    rows, located = batches.at(step), batches.located(step)
    epoch = np.empty_like(located.index)
    for number, source in enumerate(batches.sources):
        of_it = located.source == number
        epoch[of_it] = source.epochs(located.index[of_it]) if of_it.any() else 0
    return BatchView(
        step=step,
        steps=_steps(run),
        fingerprint=batches.fingerprint(step),
        names=tuple(corpus.parts),
        tokens=rows.tokens,
        counted=rows.counted,
        samples=step * run.batch.global_batch + np.arange(run.batch.global_batch),
        source=located.source,
        epoch=epoch,
        end_of_text=corpus.first.meta.end_of_text,
    )


def _fill_in_middle(run: RunConfig, corpus: Corpus) -> FillInMiddle | None:
    if not run.data.fill_in_middle:
        return None
    tokenizer = load_tokenizer(corpus.first.tokenizer_path)
    for names in MARKS:
        ids = [each for each in map(tokenizer.token_to_id, names) if each is not None]
        if len(ids) == len(names):
            prefix, middle, suffix = ids
            return FillInMiddle(
                rate=run.data.fill_in_middle,
                spm=run.data.fill_in_middle_spm,
                prefix=prefix,
                middle=middle,
                suffix=suffix,
                end_of_text=corpus.first.meta.end_of_text,
                seed=run.seed,
            )
    raise DataError(
        f"data.fill_in_middle is {run.data.fill_in_middle}, but {corpus.first.tokenizer_path} has no tokens that mark "
        f"the parts, such as {' '.join(MARKS[0])}: bring one with them (data.tokenizer), name them in "
        "prepare.special_tokens, or set it to 0"
    )


def _steps(run: RunConfig) -> int:
    return steps_in_run(run.schedule, tokens_per_step=run.batch.global_batch * run.sequence_length)


def _sequences(run: RunConfig, corpus: Corpus) -> dict[str, Sequences]:
    length = run.sequence_length
    return {
        name: Sequences(
            part.train.tokens,
            sequence_length=length,
            # sources of one size must not be read in one order; a run of one source has its seed alone
            seed=run.seed if run.data.sources is None else _seed_of(name, seed=run.seed),
            counted=None if (flags := corpus.counted.get(name)) is None else flags.train,
            name="" if run.data.sources is None else name,
        )
        for name, part in corpus.parts.items()
    }


def _seed_of(name: str, *, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8, person=b"moetrain source").digest()
    return int.from_bytes(digest, "little")


def _mixture(run: RunConfig, sources: dict[str, Sequences]) -> Mixture:
    settings, steps = sources_of(run.data), _steps(run)
    sizes = [each.per_epoch for each in sources.values()]
    most = [
        None if each.max_epochs is None else max(1, int(each.max_epochs * size))
        for each, size in zip(settings.values(), sizes, strict=True)
    ]
    own = _own_weights(settings, sizes=sizes, total=steps * run.batch.global_batch, temperature=run.data.temperature)
    if run.data.mixture is None:
        return Mixture([Stage(end=None, weights=own)], most=most)
    stages: list[Stage] = []
    begin = 0
    for stage in run.data.mixture:
        weights = own if stage.weights is None else tuple(stage.weights.get(name, 0.0) for name in settings)
        # the last one has no end: what the batch after the run would be is asked for by the last certificate
        end = None if stage.until == 1 else round(stage.until * steps) * run.batch.global_batch
        if end is None or end > begin:
            stages.append(Stage(end=end, weights=weights))
            begin = end or begin
    return Mixture(stages, most=most)


def _own_weights(
    settings: dict[str, SourceConfig], *, sizes: Sequence[int], total: int, temperature: float
) -> tuple[float, ...]:
    """The weight of each source: what it is given, by its size, or so that it is read ``epochs`` times in the run."""
    by_epochs = [0.0 if each.epochs is None else each.epochs * size
                 for each, size in zip(settings.values(), sizes, strict=True)]  # fmt: skip
    plain = [
        0.0 if each.epochs is not None else each.weight if each.weight is not None else size ** (1 / temperature)
        for each, size in zip(settings.values(), sizes, strict=True)
    ]
    rest = total - sum(by_epochs)
    if not any(plain):
        return tuple(by_epochs)
    if not any(by_epochs):
        return tuple(plain)
    if rest < 0:
        asked = ", ".join(f"{name} {each.epochs:g} times" for name, each in settings.items() if each.epochs is not None)
        raise ConfigError(
            [
                f"data.sources: to read {asked} takes {sum(by_epochs):,.0f} sequences, but the run has {total:,}, and "
                "nothing would be left for the others: set fewer epochs, or schedule.steps to more"
            ]
        )
    return tuple(fixed + weight / sum(plain) * rest for fixed, weight in zip(by_epochs, plain, strict=True))
