"""Batches: what each rank reads at each step, as pure functions; nothing is kept between steps, so resuming is free.

    training tokens   t0 t1 t2 t3 t4 t5 t6 ...         S = sequence_length, here 2
    sequence 0        t0 t1 t2                         S+1 tokens: the first S go in, the last S come out
    sequence 1              t2 t3 t4                   the next one starts on the last token of this one
    sample            step * global_batch + i          counted over the whole run
    source of it      mixture(sample)                  and how many samples of that source come before, its index
    sequence of it    permutation(epoch)[index % n]    n sequences, epoch = index // n

Shape suffixes: B global batch, A micro-batches of a step on one rank, M micro_batch, S sequence_length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from moetrain.data.mixture import Located, Mixture, one_source
from moetrain.errors import ConfigError, DataError

NOT_COUNTED = -1
"""The target of padding."""

Rearrange = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.int64]]

_ROUNDS = 8  # four make a permutation look random on large domains (Luby and Rackoff 1988); small ones need more


@dataclass(frozen=True)
class Rows:
    """Some sequences of a batch."""

    tokens: npt.NDArray[np.int64]  # [..., S+1]
    counted: npt.NDArray[np.bool_] | None  # [..., S+1], whether each has a loss as a target; None: all have

    def reshape(self, *shape: int) -> Rows:
        """The same in another shape, without the S+1."""
        length = self.tokens.shape[-1]
        counted = None if self.counted is None else self.counted.reshape(*shape, length)
        return Rows(self.tokens.reshape(*shape, length), counted)


class Source(Protocol):
    """Training sequences in the order of a run; those of prepared text are ``Sequences``."""

    @property
    def sequence_length(self) -> int: ...

    @property
    def has_uncounted(self) -> bool: ...

    def epochs(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def read(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def read_counted(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]: ...


class Sequences:
    """The training sequences of one source, each once in an epoch, in an order of that epoch's own.

    Args:
        tokens: [N] token ids of the training split.
        sequence_length: S, tokens per sequence.
        seed: the order follows from it.
        counted: [N] whether each token has a loss as a target, 0 or 1; None: all have.
        name: of the source, for messages.

    Raises:
        DataError: the tokens do not make one sequence.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        *,
        sequence_length: int,
        seed: int,
        counted: npt.NDArray[Any] | None = None,
        name: str = "",
    ) -> None:
        assert counted is None or len(counted) == len(tokens)
        self._tokens, self._counted, self.sequence_length, self._seed = tokens, counted, sequence_length, seed
        self.name = name
        self.per_epoch = (len(tokens) - 1) // sequence_length
        if self.per_epoch < 1:
            raise DataError(
                f"the training text{f' of {name}' if name else ''} has {len(tokens):,} tokens, but one sequence takes "
                f"{sequence_length + 1:,} (batch.sequence_length and one to predict): add text, or set a smaller "
                "batch.sequence_length"
            )

    @property
    def has_uncounted(self) -> bool:
        """Whether there may be tokens without a loss."""
        return self._counted is not None

    def read(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens, [N, S+1], of those that come ``index``-th, [N]."""
        return self._cut(self._tokens, self.places(index)).astype(np.int64)

    def read_counted(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each token of the same has a loss as a target, [N, S+1]."""
        if self._counted is None:
            return np.ones((len(index), self.sequence_length + 1), dtype=np.bool_)
        return self._cut(self._counted, self.places(index)).astype(np.bool_)

    def epochs(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How often all sequences were read before the one that comes ``index``-th, [N]."""
        return index // self.per_epoch

    def places(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which sequence of the text comes ``index``-th, [N]."""
        epochs, places = self.epochs(index), index % self.per_epoch
        sequences = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            sequences[now] = permute(places[now], size=self.per_epoch, seed=self._seed, epoch=int(epoch))
        return sequences

    def _cut(self, array: npt.NDArray[Any], places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        starts = places * self.sequence_length
        return np.stack([array[start : start + self.sequence_length + 1] for start in starts])


class Batches:
    """The training batches; the one at step s is a function of the sources, the mixture, the seeds and s alone.

    A batch may reach over the end of an epoch.

    Args:
        sources: all of one sequence length.
        global_batch: B, sequences per step over all ranks.
        mixture: which source each sample comes from; None: all from the only one.
        rearrange: what is done to the tokens of each sample, [N, S+1], with its number, [N]; sources with tokens
            that have no loss are left as they are.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        global_batch: int,
        mixture: Mixture | None = None,
        rearrange: Rearrange | None = None,
    ) -> None:
        assert len({source.sequence_length for source in sources}) == 1
        assert mixture is not None or len(sources) == 1
        self.sources, self._mixture = sources, mixture or one_source()
        self._global_batch, self._rearrange = global_batch, rearrange

    def at(self, step: int) -> Rows:
        """[B, S+1]: all sequences of a step, over all ranks."""
        return self._read(np.arange(self._global_batch), step=step)

    def located(self, step: int) -> Located:
        """Where the sequences of a step come from, each [B]."""
        return self._mixture.locate(step * self._global_batch + np.arange(self._global_batch))

    def rank_slice(self, step: int, *, rank: int, world_size: int, micro_batch: int) -> Rows:
        """[A, M, S+1]: what one rank reads at a step, and nothing else is read.

        Row i of ``at(step)`` belongs to micro-batch i // (world_size * micro_batch), and there to rank
        i // micro_batch % world_size, whatever the layout; so every layout trains on the same batch.

        Raises:
            ConfigError: the global batch does not divide into the ranks' micro-batches.
        """
        in_all_ranks = world_size * micro_batch
        if self._global_batch % in_all_ranks:
            raise ConfigError(
                [
                    f"batch.global_batch is {self._global_batch}, but must be a multiple of ranks x batch.micro_batch, "
                    f"{world_size} x {micro_batch} = {in_all_ranks}"
                ]
            )
        rows = np.arange(self._global_batch).reshape(-1, world_size, micro_batch)[:, rank]
        return self._read(rows.reshape(-1), step=step).reshape(*rows.shape)

    def counted_per_row(self, step: int) -> float | None:
        """Targets with a loss in a row of a step, on average over all of them; None: they all have one."""
        if not any(source.has_uncounted for source in self.sources):
            return None
        counted = self._counted(self.located(step))
        # a step without any has no loss at all, and no gradient
        return max(1, int(counted[:, 1:].sum())) / self._global_batch

    def fingerprint(self, step: int) -> str:
        """sha256 of ``at(step)`` as little-endian int64: equal runs read equal batches.

        Empty where the sources have nothing left to give.
        """
        if self._mixture.length is not None and self._mixture.length < (step + 1) * self._global_batch:
            return ""
        rows = self.at(step)
        digest = hashlib.sha256(rows.tokens.astype("<i8").tobytes())
        if rows.counted is not None:
            digest.update(rows.counted.tobytes())
        return digest.hexdigest()

    def _read(self, rows: npt.NDArray[np.int64], *, step: int) -> Rows:
        assert step >= 0, step
        samples = step * self._global_batch + rows
        located = self._mixture.locate(samples)
        tokens = np.empty((len(rows), self.sources[0].sequence_length + 1), dtype=np.int64)
        for source in np.unique(located.source):
            of_it = located.source == source
            tokens[of_it] = self.sources[source].read(located.index[of_it])
            if self._rearrange is not None and not self.sources[source].has_uncounted:
                tokens[of_it] = self._rearrange(tokens[of_it], samples[of_it])
        is_plain = not any(source.has_uncounted for source in self.sources)
        return Rows(tokens, counted=None if is_plain else self._counted(located))

    def _counted(self, located: Located) -> npt.NDArray[np.bool_]:
        counted = np.empty((len(located.source), self.sources[0].sequence_length + 1), dtype=np.bool_)
        for source in np.unique(located.source):
            of_it = located.source == source
            counted[of_it] = self.sources[source].read_counted(located.index[of_it])
        return counted


Read = TypeVar("Read")


class Ahead(Generic[Read]):
    """Reads for the next step while this one trains.

    In a thread: reading waits for the disk or copies, and neither keeps Python from running. Any step may be asked
    for; one that was not foreseen is read at once.

    Args:
        read: what to do for a step, a pure function.
        steps: of the run; nothing is read beyond.
    """

    def __init__(self, read: Callable[[int], Read], *, steps: int) -> None:
        self._read, self._steps = read, steps
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Read]] | None = None

    def __call__(self, step: int) -> Read:
        foreseen = self._next is not None and self._next[0] == step
        now = self._next[1].result() if foreseen and self._next is not None else self._read(step)
        if step + 1 < self._steps:
            self._next = step + 1, self._pool.submit(self._read, step + 1)
        return now


@dataclass(frozen=True)
class HeldOutText:
    """The held-out text of a source."""

    tokens: npt.NDArray[Any]  # [N]
    num_bytes: int  # of UTF-8 text
    counted: npt.NDArray[Any] | None = None  # [N], whether each has a loss as a target, 0 or 1; None: all have

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class HeldOutBatch:
    """One micro-batch of held-out text."""

    tokens: npt.NDArray[np.int64]  # [M, S], what goes in; 0 where there is only padding
    targets: npt.NDArray[np.int64]  # [M, S], what comes next; NOT_COUNTED where there is only padding, or no loss
    rows: int  # those with text; the rest is padding


def held_out_batches(
    text: HeldOutText,
    *,
    sequence_length: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    max_sequences: int | None,
) -> Iterator[HeldOutBatch]:
    """The held-out text for one rank: over all ranks, every token but the first is a target exactly once.

    Every rank gets the same number of batches, all of the same shape, for a forward pass holds collectives that all
    ranks must enter: what the last sequence, the last batch or the last ranks lack is padding, which causal attention
    keeps away from the rest. Whoever counts anything on these batches must leave out the places where the target is
    ``NOT_COUNTED``.

    Args:
        text: the held-out split.
        sequence_length: S, tokens per sequence; the last one may be shorter.
        rank: this rank.
        world_size: all of them.
        micro_batch: M, sequences per batch.
        max_sequences: read only so many, evenly spread over the text, the same ones every time; None: all.

    Raises:
        DataError: there are fewer than two tokens, so nothing can be predicted.
    """
    if text.num_tokens < 2:
        raise DataError(
            f"the held-out text has {text.num_tokens} tokens, too few to predict one: set a larger data.held_out"
        )
    assert max_sequences is None or max_sequences > 0, max_sequences
    total = -(-(text.num_tokens - 1) // sequence_length)
    used = total if max_sequences is None else min(total, max_sequences)
    sequences = np.arange(used) * total // used
    offset = rank * micro_batch
    return (
        _held_out_batch(
            text, sequences[first : first + micro_batch], sequence_length=sequence_length, micro_batch=micro_batch
        )
        for first in range(offset, offset + used, world_size * micro_batch)
    )


def _held_out_batch(
    text: HeldOutText, sequences: npt.NDArray[np.int64], *, sequence_length: int, micro_batch: int
) -> HeldOutBatch:
    inputs = np.zeros((micro_batch, sequence_length), dtype=np.int64)
    targets = np.full((micro_batch, sequence_length), NOT_COUNTED, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        start = int(sequence) * sequence_length
        piece = text.tokens[start : start + sequence_length + 1]
        inputs[row, : len(piece) - 1] = piece[:-1]
        targets[row, : len(piece) - 1] = piece[1:]
        if text.counted is not None:
            flags = text.counted[start + 1 : start + len(piece)]
            targets[row, : len(flags)][flags == 0] = NOT_COUNTED
    return HeldOutBatch(tokens=inputs, targets=targets, rows=len(sequences))


def permute(places: npt.NDArray[np.int64], *, size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where a permutation of range(size), one for each seed and epoch, sends some places; without a table.

    A Feistel network is a bijection on numbers of an even count of bits; a result beyond ``size`` is sent through again
    until it falls inside, which keeps it a bijection ("cycle walking", Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains", section 4). The domain is at most four times ``size``, so that takes few rounds.

    Args:
        places: any shape, each in range(size).
        size: how many there are.
        seed: of the run.
        epoch: how often all of them have been read before.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS, person=b"moetrain epoch").digest()
    keys = np.frombuffer(digest, dtype="<u8")
    result = _feistel(places.astype(np.uint64), keys=keys, half_bits=half_bits)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], keys=keys, half_bits=half_bits)
    return result.astype(np.int64)


def _feistel(
    numbers: npt.NDArray[np.uint64], *, keys: npt.NDArray[np.uint64], half_bits: int
) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    result: npt.NDArray[np.uint64] = left << bits | right
    return result


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    result: npt.NDArray[np.uint64] = numbers ^ numbers >> np.uint64(31)
    return result
