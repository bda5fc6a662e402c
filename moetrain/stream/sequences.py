"""The sequences of a stream, each once in an epoch; one that is not tokenized yet is waited for.

    first epoch    sequences 0, 1, 2, … in windows of blocks, each window shuffled by itself as soon as it is whole
    later epochs   all sequences shuffled together: by then their number is known

So the sample of a number follows from the seed, the number and the text. How fast tokens came, and who waited for
them, changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from moetrain.data.loader import permute
from moetrain.errors import DataError, LaunchError
from moetrain.parallel.seeds import derive_seed
from moetrain.stream.blocks import Blocks, End

Ints = npt.NDArray[np.int64]

_POLL_SECONDS = 0.03
_SAY_AFTER = 10.0  # seconds


class StreamedSequences:
    """What ``data.loader.Sequences`` is for prepared text.

    Args:
        blocks: where they lie, and how they are cut up.
        seed: the order follows from it.
        together: how many samples are read at a time, over all ranks: every rank waits for what any of them needs, so
            that none waits in a collective for another that waits here, and all fail at the same step.
        want: called with how many blocks training wants when that grows, by one thread at a time.
        say: called with a line for the user.
    """

    has_uncounted = False

    def __init__(
        self, blocks: Blocks, *, seed: int, together: int, want: Callable[[int], None], say: Callable[[str], None]
    ) -> None:
        self._blocks, self._seed, self._together, self._want, self._say = blocks, seed, together, want, say
        self._wanted = self._whole = 0
        self._end: End | None = None
        # a batch is read ahead in one thread while another digests the next one for a checkpoint
        self._one_waits = threading.Lock()

    @property
    def sequence_length(self) -> int:
        """S."""
        return self._blocks.shape.sequence_length

    def read(self, index: Ints) -> Ints:
        """Tokens, [N, S+1], of those that come ``index``-th, [N].

        Raises:
            DataError: the text is at fault, or makes no sequence.
            LaunchError: the process that tokenizes was killed.
            RuntimeError: it failed otherwise.
        """
        places = self.places(index)
        return np.stack([self._blocks.read(place) for place in places.tolist()]).astype(np.int64)

    def read_counted(self, index: Ints) -> npt.NDArray[np.bool_]:
        """Every token has a loss as a target, [N, S+1]."""
        return np.ones((len(index), self.sequence_length + 1), dtype=np.bool_)

    def epochs(self, index: Ints) -> Ints:
        """How often all sequences were read before the one that comes ``index``-th, [N]; waits until that is known."""
        self._wait_for((int(index.max()) // self._together + 1) * self._together - 1)
        return np.zeros_like(index) if self._end is None else index // self._end.sequences

    def places(self, index: Ints) -> Ints:
        """Which sequence of the text comes ``index``-th, [N]; waits until that is known."""
        epochs, places = self.epochs(index), np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            if epoch == 0:
                places[now] = self._in_windows(index[now])
            else:
                assert self._end is not None
                total = self._end.sequences
                places[now] = permute(index[now] % total, size=total, seed=self._seed, epoch=epoch)
        return places

    def num_there(self) -> int | None:
        """How many can be read without waiting, from the first on; None: all, as the text is at its end."""
        if self._blocks.end() is not None:
            return None
        shape, window = self._blocks.shape, 0
        while self._blocks.is_full(shape.first_block(window + 1) - 1):
            window += 1
        return shape.first_block(window) * shape.sequences

    def _in_windows(self, index: Ints) -> Ints:
        shape, places = self._blocks.shape, np.empty_like(index)
        windows = np.array([shape.window_of(each) for each in index.tolist()])
        for window in np.unique(windows).tolist():
            now = windows == window
            first, end = (shape.first_block(each) * shape.sequences for each in (window, window + 1))
            if self._end is not None:
                end = min(end, self._end.sequences)
            seed = derive_seed(self._seed, "window", window)
            places[now] = first + permute(index[now] - first, size=end - first, seed=seed, epoch=0)
        return places

    def _wait_for(self, last: int) -> None:
        """Until the window of a sequence is whole, or the text at its end."""
        if last >= self._whole and self._end is None:
            with self._one_waits:
                if last >= self._whole and self._end is None:
                    self._await_window_of(last)

    def _await_window_of(self, last: int) -> None:
        shape = self._blocks.shape
        window = shape.window_of(last)
        # and one more, to be made while this one is read
        if (wanted := shape.first_block(window + 2)) > self._wanted:
            self._wanted = wanted
            self._want(wanted)
        last_block, since, is_said = shape.first_block(window + 1) - 1, time.monotonic(), False
        while True:
            fault = self._blocks.fault()  # looked at first: what was made before it counts
            if self._blocks.is_full(last_block):
                self._whole = shape.first_block(window + 1) * shape.sequences
                return
            if (end := self._blocks.end()) is not None:
                self._see(end)
                return
            if fault is not None:
                raise {"data": DataError, "lost": LaunchError}.get(fault.kind, RuntimeError)(fault.message)
            if not is_said and time.monotonic() - since > _SAY_AFTER:
                is_said = True
                self._say(
                    "waiting for text to be tokenized: set prepare.workers higher, or let `moetrain prepare` do it "
                    "beforehand"
                )
            time.sleep(_POLL_SECONDS)

    def _see(self, end: End) -> None:
        self._end = end
        counts = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in end.left_out.items())
        self._say(
            f"the text is read to its end: {end.documents:,} documents, {end.tokens:,} tokens, {end.sequences:,} "
            f"sequences in an epoch{f'; left out: {counts}' if counts else ''}"
        )
