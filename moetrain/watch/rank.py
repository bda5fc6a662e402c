"""A rank under watch: marks in its model, from outside; what its own work takes; who is slow; its watchdog."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config.schema import WatchConfig
from moetrain.errors import HangError
from moetrain.model.gpt import GPT, BlockOutput
from moetrain.parallel.groups import Groups
from moetrain.parallel.lifeline import write_error
from moetrain.watch.board import Beat, read_beats
from moetrain.watch.hang import Hang, Patience, Watchdog
from moetrain.watch.incidents import Incidents
from moetrain.watch.progress import Progress

_BEATS_BETWEEN_LOOKS = 6
FORWARD, BACKWARD, REDUCTION = "the forward pass", "the backward pass", "the gradient reduction"


def mark_layers(gpt: GPT, progress: Progress) -> None:
    """Have every forward and backward pass say where it is.

    Hooks on the tensors between the blocks, for modules' own backward hooks would wrap what the blocks return.
    """
    last = len(gpt.blocks) - 1

    def enters(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            progress.at(FORWARD, index)
            if args[0].requires_grad:
                args[0].register_hook(leaves_backward)

        def leaves_backward(_: Tensor) -> None:
            if index:
                progress.at(BACKWARD, index - 1)
            else:
                progress.at(REDUCTION)

        return hook

    def is_over(_: nn.Module, __: tuple[Any, ...], output: BlockOutput) -> None:
        progress.at("the loss")
        if output.hidden_BSD.requires_grad:
            output.hidden_BSD.register_hook(lambda _: progress.at(BACKWARD, last))

    for index, block in enumerate(gpt.blocks):
        block.register_forward_pre_hook(enters(index))
    gpt.blocks[last].register_forward_hook(is_over)


class OwnTime:
    """What a rank's own work in a step takes: reading the batch, and the first forward pass without its collectives.

    Times on the device come from events on its stream, which are read a measurement later, when they are long past: the
    step waits for nothing. Collectives of the engine itself inside a forward pass (ZeRO 3) count as own work: a rank
    that waits there for a slow one then looks as slow, and neither stands out.

    Args:
        every: steps between two measurements.
        keep: measurements that the median is taken of.
    """

    def __init__(self, gpt: GPT, progress: Progress, *, device: torch.device, every: int, keep: int) -> None:
        self._progress, self._every, self._cuda = progress, every, device.type == "cuda"
        self._times: deque[float] = deque(maxlen=keep)
        self._reading = 0.0
        self._pending: tuple[float, list[Any]] | None = None
        if self._cuda:
            progress.stamp = _event
        gpt.register_forward_pre_hook(self._begins)
        gpt.register_forward_hook(self._ends)
        self._wanted = False

    def read_batch(self, step: int, read: Callable[[int], Any]) -> Any:
        """Read the batch of a step, and measure this step if it is one to be measured."""
        begun = time.perf_counter()
        batch = read(step)
        self._reading = time.perf_counter() - begun
        self._wanted = step % self._every == 0
        return batch

    def usual(self) -> float | None:
        """Seconds; None before all the measurements are there that the median is taken of."""
        times = list(self._times)
        return median(times) if times and len(times) == self._times.maxlen else None

    def _begins(self, module: nn.Module, _: Any) -> None:
        if self._wanted and module.training:
            self._settle()
            self._progress.stamps = [self._progress.stamp()]

    def _ends(self, module: nn.Module, _: Any, __: Any) -> None:
        stamps = self._progress.stamps
        if stamps is not None:
            self._progress.stamps, self._wanted = None, False
            self._pending = self._reading, [*stamps, self._progress.stamp()]
            if not self._cuda:
                self._settle()

    def _settle(self) -> None:
        if self._pending is not None:
            reading, stamps = self._pending
            # begin, (enter, leave) of each collective, end: own work lies between a leave and the next enter
            own = sum(map(self._seconds, stamps[0::2], stamps[1::2]))
            self._times.append(reading + own)
            self._pending = None

    def _seconds(self, begin: Any, end: Any) -> float:
        if not self._cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class Change:
    """A rank became slow, or is so no more."""

    rank: int
    is_slow: bool
    text: str


class Stragglers:
    """Who is slow; looked at again and again by one rank.

    Args:
        ratio: a rank is slow from this many times the median of the others on, and until it is half-way back.
    """

    def __init__(self, *, ratio: float) -> None:
        self._ratio = ratio
        self._slow: set[int] = set()

    def look(self, beats: Sequence[Beat | None]) -> list[Change]:
        """What has changed since the last look."""
        own = {each.rank: each.own_seconds for each in beats if each is not None and each.own_seconds is not None}
        if len(own) < max(2, len(beats)):
            return []
        changes = []
        for rank, seconds in own.items():
            others = median(time for other, time in own.items() if other != rank)
            was = rank in self._slow
            is_slow = seconds > others * (self._ratio if not was else (1 + self._ratio) / 2)
            if is_slow != was:
                self._slow ^= {rank}
                host = next(each.host for each in beats if each is not None and each.rank == rank)
                changes.append(Change(rank, is_slow, _told(rank, host, seconds, others)))
        return changes


class Report:
    """What a rank adds to each of its beats; on the rank that looks, slow ones become incidents.

    Args:
        usual: seconds of this rank's own work in a step; None: not measured yet.
        device_bytes: memory of its GPU.
        looks: whether this rank looks at all of them.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        ranks: int,
        ratio: float,
        progress: Progress,
        incidents: Incidents,
        usual: Callable[[], float | None],
        device_bytes: int | None,
        looks: bool,
    ) -> None:
        self._run_dir, self._ranks, self._progress, self._incidents = run_dir, ranks, progress, incidents
        self._usual, self._device_bytes = usual, device_bytes
        self._stragglers = Stragglers(ratio=ratio) if looks else None
        self._beats = 0

    def __call__(self) -> dict[str, Any]:
        """Fields of a ``Beat``."""
        self._beats += 1
        # reading all the files at every beat would be a load on the file system of a large run
        if self._stragglers is not None and self._beats % _BEATS_BETWEEN_LOOKS == 0:
            for change in self._stragglers.look(read_beats(self._run_dir, world_size=self._ranks)):
                kind, done = ("slow_rank", "nothing: look at its GPU, its host and its disk")
                if not change.is_slow:
                    kind, done = "slow_rank_over", "nothing"
                self._incidents.add(kind, step=self._progress.step, rank=change.rank, what=change.text, done=done)
        return {"own_seconds": self._usual(), "device_bytes": self._device_bytes}


def _told(rank: int, host: str, seconds: float, others: float) -> str:
    return (
        f"rank {rank} on {host} takes {1000 * seconds:,.1f} ms for its own work in a step, the others "
        f"{1000 * others:,.1f} ms ({seconds / others:.2f} times)"
    )


@contextlib.contextmanager
def watched(
    gpt: GPT, settings: WatchConfig, *, timeout_seconds: float, run_dir: Path, groups: Groups, progress: Progress
) -> Iterator[OwnTime | None]:
    """Watch the rank inside; gives what measures its own work, or None where nobody asks for that.

    Args:
        timeout_seconds: how long a collective may wait.
    """
    rank, ranks = groups.topology.rank, groups.topology.world_size
    incidents = Incidents(run_dir, say=lambda line: print(line, flush=True))
    mark_layers(gpt, progress)
    own_time = None
    if settings.straggler_steps and ranks > 1:
        every = max(1, settings.straggler_steps // 10)
        own_time = OwnTime(gpt, progress, device=groups.device, every=every, keep=settings.straggler_steps // every)
    on_cuda = groups.device.type == "cuda"
    report = Report(
        run_dir,
        ranks=ranks,
        ratio=settings.straggler_ratio,
        progress=progress,
        incidents=incidents,
        usual=(lambda: None) if own_time is None else own_time.usual,
        device_bytes=torch.cuda.get_device_properties(groups.device).total_memory if on_cuda else None,
        looks=rank == 0 and own_time is not None,
    )

    def on_hang(step: int, found: Hang) -> None:
        incidents.add("hang", step=step, rank=found.rank, what=found.text,
                      done="the run is stopped; the stacks of the ranks are in its log directory")  # fmt: skip
        write_error(run_dir / "log", rank=rank, error=HangError(f"at step {step:,}, {found.text}"))

    hang_seconds = timeout_seconds / 2 if settings.hang_seconds is None else settings.hang_seconds
    watchdog = Watchdog(
        run_dir,
        rank=rank,
        world_size=ranks,
        progress=progress,
        patience=Patience(training=hang_seconds, otherwise=settings.start_seconds if hang_seconds else 0.0),
        on_hang=on_hang,
        log=sys.stderr,
        each_beat=report,
    )
    watchdog.start()
    try:
        yield own_time
    finally:
        watchdog.stop()
