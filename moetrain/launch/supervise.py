"""Restart policy: what is started again, from where, on how many processes, and when to give up. For any launcher.

a rank killed, a node lost, a hang, a broken connection   again, from the newest whole checkpoint (launch.max_restarts)
the same, no further than the time before                 on fewer processes (launch.elastic), or the run ends
processes that will not come back                         on those that are left (launch.elastic)
settings, data, checkpoints, the training itself          never: it would fail again
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moetrain.checkpoint.store import step_of, whole_checkpoints
from moetrain.config.checks import check
from moetrain.config.freeze import flatten, to_dict
from moetrain.config.launch.settings import LaunchConfig
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError, LostError, MoetrainError
from moetrain.launch.machine.ranks import Order, StopRequests
from moetrain.launch.nodes.hosts import hosts_of
from moetrain.launch.nodes.spec import requested
from moetrain.plan.layout import Layout, offered
from moetrain.plan.memory.device import memory_of
from moetrain.watch import board
from moetrain.watch.incidents import Incidents

_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one start of a run ended; neither stopped nor with a fault: it is complete."""

    stopped: bool = False
    """On request, saved."""
    fault: MoetrainError | None = None
    lost: int = 0
    """Processes that will not come back, of nodes that are gone."""


@dataclass(frozen=True)
class _Place:
    """Where a start failed."""

    kind: str
    rank: str
    step: int

    def is_no_further(self, before: _Place | None) -> bool:
        """Whether the same thing came again before the run got any further."""
        return before is not None and (self.kind, self.rank) == (before.kind, before.rank) and self.step <= before.step


def supervise(
    run: RunConfig,
    *,
    run_dir: Path,
    start: Callable[[RunConfig], Ended],
    shrink: Callable[[RunConfig, int], RunConfig | None],
    say: Callable[[str], None],
    pause: Callable[[float], bool] | None = None,
) -> bool:
    """Keep a run running until it is complete, is asked to stop, or fails for good. Hold its ``RunLock``.

    Args:
        run: resolved.
        start: writes the settings it is given into the run directory, starts the processes, and waits for them. It
            returns every fault that a user may see, instead of raising it.
        shrink: the same run with so many processes fewer, in a layout that fits (``on_fewer``); None: there is none.
        say: shows a line to the user.
        pause: waits so many seconds; True: meanwhile somebody asked to stop.

    Returns:
        Whether it was stopped on request; the same command goes on.

    Raises:
        MoetrainError: the fault that ended it.
    """
    incidents = Incidents(run_dir, say=say)
    pause = pause or partial(wait, run_dir=run_dir)
    begun, limit = time.monotonic(), run.launch.stop_after_minutes
    before: _Place | None = None
    for restarts in range(run.launch.max_restarts + 1):
        board.clear(run_dir)
        ended = start(run)
        if ended.fault is None:
            return ended.stopped
        if not (isinstance(ended.fault, LostError) or ended.lost):
            raise ended.fault
        now = _place(run_dir, ended.fault, processes=run.launch.world_size)
        again = now.is_no_further(before)
        before = now
        smaller = shrink(run, ended.lost or 1) if run.launch.elastic and (ended.lost or again) else None
        why = _why_not(run, restarts=restarts, again=again and smaller is None)
        first_line = str(ended.fault).splitlines()[0]
        step = None if now.step < 0 else now.step
        if why:
            incidents.add("gave_up", step=step, rank=_number(now.rank), what=first_line, done=f"the run ends: {why}")
            raise ended.fault
        seconds = min(_LONGEST_PAUSE_SECONDS, 2.0**restarts)
        done = f"restart {restarts + 1} of {run.launch.max_restarts} {_from(run_dir)}, in {seconds:.0f} s"
        if smaller is not None:
            run, done = smaller, f"{done}, on {_in_words(smaller)}"
            before = None
        kind = "restart" if smaller is None else "smaller"
        incidents.add(kind, step=step, rank=_number(now.rank), what=first_line, done=done)
        if pause(seconds):
            return True
        if limit is not None:
            left = max(0.01, limit - (time.monotonic() - begun) / 60)
            run = replace(run, launch=replace(run.launch, stop_after_minutes=left))
    raise AssertionError("the last start returns or raises")


def on_fewer(run: RunConfig, *, processes: int, device_bytes: int | None = None) -> RunConfig | None:
    """The same run on at most so many processes: the same global batch, by more micro-batches; None: not possible.

    As many processes as divide the batch, the experts spread over as many of them as may share them, the largest
    micro-batch up to the one there was. Where that is known to be too much for the memory, more is recomputed, sharded
    and offloaded first, as ``moetrain plan`` reckons it.

    Args:
        device_bytes: memory of one GPU; None: not known, or none.
    """
    nodes = run.launch.nodes or 1
    for number in range(processes, 0, -1):
        if run.batch.global_batch % number or number % nodes:
            continue
        for layout in _layouts(run, number):
            candidate = _laid_out(run, layout)
            memory = memory_of(
                run.model, layout, sequence_length=run.sequence_length, mask_documents=run.data.mask_documents
            )
            fits = device_bytes is None or memory.total <= device_bytes
            if fits and _passes(candidate):
                return candidate
    return None


def without(launch: LaunchConfig, lost: Collection[str]) -> LaunchConfig:
    """The same hosts but the lost ones. At least one is left."""
    names = [host.name for host in hosts_of(launch)]
    left = [name for name in names if name not in lost]
    # the address that was given is the first host's
    address = launch.master_addr if left[0] == names[0] else None
    interfaces = {name: value for name, value in (launch.interfaces or {}).items() if name in left} or None
    return replace(launch, hostfile=None, hosts=left, nodes=len(left), master_addr=address, interfaces=interfaces)


def device_bytes(run_dir: Path, *, processes: int) -> int | None:
    """Memory of the smallest GPU, as the ranks of the last start have said; None: they have none."""
    beats = board.read_beats(run_dir, world_size=processes)
    return min((each.device_bytes for each in beats if each and each.device_bytes), default=None)


def wait(seconds: float, *, run_dir: Path) -> bool:
    """Wait; True, and at once: somebody asked the run to stop, by a signal or by ``moetrain cancel``."""
    end = time.monotonic() + seconds
    with StopRequests() as requests:
        while requests.count == 0 and requested(run_dir) is Order.GO_ON:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
    return True


def _why_not(run: RunConfig, *, restarts: int, again: bool) -> str:
    most = run.launch.max_restarts
    if restarts >= most:
        return f"launch.max_restarts is {most}" if restarts == 0 else f"it was restarted {restarts} times"
    return "the same came again, and the run got no further" if again else ""


def _place(run_dir: Path, fault: MoetrainError, *, processes: int) -> _Place:
    step = board.furthest_step(board.read_beats(run_dir, world_size=processes))
    rank = re.search(r"rank (\d+)", str(fault))
    return _Place(type(fault).__name__, rank[1] if rank else "", -1 if step is None else step)


def _number(rank: str) -> int | None:
    return int(rank) if rank else None


def _from(run_dir: Path) -> str:
    whole = whole_checkpoints(run_dir / "checkpoints")
    return f"from the checkpoint of step {step_of(whole[-1]):,}" if whole else "from the beginning"


def _layouts(run: RunConfig, processes: int) -> list[Layout]:
    """From the one most like the run's own to the one that needs the least memory."""
    own, offer = run.parallel, offered(run.model.dtype)
    experts = 1 if run.model.moe is None else run.model.moe.num_experts
    expert_parallel = max(n for n in range(1, processes + 1) if processes % n == 0 and experts % n == 0)
    per_process = run.batch.global_batch // processes
    fitting = [n for n in range(1, per_process + 1) if per_process % n == 0 and n <= (run.batch.micro_batch or n)]
    ways = [(own.zero_stage, own.recompute, own.offload_optimizer)]
    ways += [(max(stage, own.zero_stage), recompute, offload)
             for offload in offer.offload_optimizer for stage in offer.zero_stages for recompute in offer.recompute
             if stage > 0 and offload >= own.offload_optimizer]  # fmt: skip
    return [
        Layout(gpus=processes, expert_parallel=expert_parallel, zero_stage=stage, recompute=recompute,
               micro_batch=micro_batch, accumulation=per_process // micro_batch, offload_optimizer=offload)
        for stage, recompute, offload in dict.fromkeys(ways) for micro_batch in reversed(fitting)
    ]  # fmt: skip


def _laid_out(run: RunConfig, layout: Layout) -> RunConfig:
    parallel = replace(
        run.parallel,
        expert_parallel=layout.expert_parallel,
        zero_stage=layout.zero_stage,
        recompute=layout.recompute,
        offload_optimizer=layout.offload_optimizer,
    )
    batch = replace(run.batch, micro_batch=layout.micro_batch)
    return replace(
        run,
        parallel=parallel,
        batch=batch,
        launch=replace(run.launch, processes=layout.gpus // (run.launch.nodes or 1)),
    )


def _passes(run: RunConfig) -> bool:
    try:
        check(run, flatten(to_dict(run)))
    except ConfigError:
        return False
    return True


def _in_words(run: RunConfig) -> str:
    processes, micro_batch = run.launch.world_size, run.batch.micro_batch or 1
    accumulation = run.batch.global_batch // (processes * micro_batch)
    return (
        f"{processes} process{'es' * (processes > 1)} (expert parallel {run.parallel.expert_parallel}, {accumulation} "
        f"micro-batch{'es' * (accumulation > 1)} of {micro_batch})"
    )
