"""`moetrain bench checkpoint`: what saving and loading cost, against the disk, the memory and others, in one process.

Every contestant writes the same state (fp32 weights and both Adam moments of one model, after a step), and is done when
its files are on the disk (fsync; DeepSpeed leaves that out, so it is done for it and counted) and those of the turn
before are gone, which a disk may take long for. They take turns, and each figure is a median over the turns. The model
is dense, since DeepSpeed cannot save experts that are not its own; to a checkpoint of ours an expert is an interval
like any other.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain.bench.settings import CheckpointSettings
from moetrain.checkpoint import state, store
from moetrain.checkpoint.files import open_direct
from moetrain.checkpoint.saver import Saver
from moetrain.config.deepspeed import deepspeed_config
from moetrain.config.schema import ModelConfig
from moetrain.model.build import build_model, initialize
from moetrain.model.objective import MicroBatch, Objective
from moetrain.parallel import groups as process_groups
from moetrain.parallel.groups import Groups
from moetrain.parallel.topology import Topology
from moetrain.train.engine import Engine

LIMITS = ("copy in memory", "raw write", "raw read")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant."""

    name: str
    seconds: float
    """Median."""
    spread: tuple[float, float]
    """Fastest and slowest turn, seconds."""
    num_bytes: int
    """Written or read."""
    peak_extra_bytes: int
    """Highest resident memory in its first turn over that before it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found."""

    parameters: int
    rows: list[Row]
    load: tuple[float, float, float]
    """The load average of the machine at the end, over 1, 5 and 15 minutes."""

    def row(self, name: str) -> Row:
        """A contestant by its name."""
        return next(row for row in self.rows if row.name == name)


def measure(settings: CheckpointSettings) -> Report:
    """Run every contestant in turns. Makes a process group of this one process, and leaves it."""
    root = Path(tempfile.mkdtemp(prefix="moetrain-bench-", dir=settings.directory or None))
    # what a launcher would have set; the memory that is measured is the host's
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    try:
        dist.init_process_group("gloo", init_method=f"file://{root / 'group'}", rank=0, world_size=1)
        try:
            return _measure(settings, root)
        finally:
            process_groups.stop()
    finally:
        shutil.rmtree(root)


def table(report: Report) -> str:
    """The report as a page of text."""
    copy, write, read = (report.row(name).seconds for name in LIMITS)
    limits = {"stall": copy, "load": read, "raw read": read}
    lines = [
        f"{report.parameters:,} parameters; load average {', '.join(f'{each:.1f}' for each in report.load)}",
        f"{'':34}{'seconds':>9}{'spread':>15}{'GB/s':>7}{'of the limit':>14}{'extra memory':>14}{'size':>7}",
    ]
    state_bytes = 12 * report.parameters
    for row in report.rows:
        limit = next((limits[each] for each in limits if each in row.name), write)
        if row.name == "copy in memory":
            limit = copy
        lines.append(
            f"{row.name:34}{row.seconds:9.3f}{f'{row.spread[0]:.3f}-{row.spread[1]:.3f}':>15}"
            f"{row.num_bytes / row.seconds / 1e9:7.2f}{f'{row.seconds / limit:.2f}x time':>14}"
            f"{f'{row.peak_extra_bytes / 2**20:,.0f} MiB':>14}{row.num_bytes / state_bytes:7.3f}"
        )
    lines.append("limits: a stall is held against a copy in memory, a load against a raw read, a save against a raw")
    lines.append("write; size is held against fp32 weights and two moments, 12 bytes a parameter")
    return "\n".join(lines)


def _measure(settings: CheckpointSettings, root: Path) -> Report:
    groups = process_groups.make(
        Topology(world_size=1, rank=0, expert_parallel=1), device=torch.device("cpu"), timeout=None
    )
    engine, parameters = _engine(settings.parameters, groups)
    tensors = [fragment.view for fragment in engine.fragments()]
    num_bytes = sum(each.nbytes for each in tensors)
    contestants = _contestants(engine, tensors, root=root, groups=groups)
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for turn in range(settings.repeats + 1):
        first = turn % len(contestants)  # what one leaves in the kernel's memory helps or hinders the next
        for action in contestants[first:] + contestants[:first]:
            os.sync()  # what the one before left to the kernel is not to be paid for by this one
            with _peak() as peak:
                timed = action()
            for name, value in timed.items():
                peaks.setdefault(name, peak[0])
                seconds.setdefault(name, [])
                if turn:
                    seconds[name].append(value)
    sizes = {"torch.save": root / "torch.pt", "DeepSpeed save_checkpoint": root / "deepspeed"}
    sizes |= dict.fromkeys(
        [name for name in seconds if name.startswith("moetrain") and "stall" not in name], root / "ours"
    )
    rows = [
        Row(
            name=name,
            seconds=statistics.median(values),
            spread=(min(values), max(values)),
            num_bytes=_size(sizes[name]) if name in sizes else num_bytes,
            peak_extra_bytes=peaks[name],
        )
        for name, values in seconds.items()
    ]
    return Report(parameters=parameters, rows=rows, load=os.getloadavg())


Timed = Callable[[], dict[str, float]]


def _contestants(engine: Engine, tensors: list[torch.Tensor], *, root: Path, groups: Groups) -> list[Timed]:
    copies = [torch.empty_like(each) for each in tensors]
    return [*_savers(engine, tensors, copies, root=root, groups=groups), *_loaders(engine, copies, root, groups)]


def _savers(
    engine: Engine, tensors: list[torch.Tensor], copies: list[torch.Tensor], *, root: Path, groups: Groups
) -> list[Timed]:
    beside_training, waiting = (
        Saver(root / "ours", group=groups.writer, retention=store.Retention(keep=1), asynchronous=asynchronous)
        for asynchronous in (True, False)
    )
    steps = iter(range(1, 1_000_000))

    def copy() -> dict[str, float]:
        with _timer() as seconds:
            for target, tensor in zip(copies, tensors, strict=True):
                target.copy_(tensor)
        return {"copy in memory": seconds[0]}

    num_bytes = sum(each.nbytes for each in tensors)

    def write() -> dict[str, float]:
        with _timer() as seconds:
            _raw_write(root / "raw", num_bytes)
        return {"raw write": seconds[0]}

    def save_beside() -> dict[str, float]:
        with _timer() as total:
            with _timer() as stall:
                beside_training.begin(engine.fragments(), manifest=_manifest(next(steps)))
            _committed(beside_training)
        return {"moetrain, stall": stall[0], "moetrain, beside training": total[0]}

    def save_waiting() -> dict[str, float]:
        with _timer() as seconds:
            waiting.begin(engine.fragments(), manifest=_manifest(next(steps)))
            _committed(waiting)
        return {"moetrain, training waits": seconds[0]}

    def torch_save() -> dict[str, float]:
        with _timer() as seconds, (root / "torch.pt").open("wb") as file:
            torch.save([fragment.view for fragment in engine.fragments()], file)
            os.fsync(file.fileno())
        return {"torch.save": seconds[0]}

    def deepspeed() -> dict[str, float]:
        before = root / "deepspeed.before"
        if (root / "deepspeed").exists():
            os.rename(root / "deepspeed", before)
        with _timer() as seconds:
            # not offered by our Engine: nothing but this comparison wants it
            engine._engine.save_checkpoint(str(root / "deepspeed"), tag="bench")
            for path in (root / "deepspeed").rglob("*"):
                _sync(path)
            shutil.rmtree(before, ignore_errors=True)
        return {"DeepSpeed save_checkpoint": seconds[0]}

    return [copy, write, save_beside, save_waiting, torch_save, deepspeed]


def _loaders(engine: Engine, copies: list[torch.Tensor], root: Path, groups: Groups) -> list[Timed]:
    def cold() -> Path:
        (directory,) = store.whole_checkpoints(root / "ours")
        for path in (root / "raw", *directory.iterdir()):
            _forget(path)
        return directory

    def read() -> dict[str, float]:
        cold()
        with _timer() as seconds:
            _raw_read(root / "raw", copies)
        return {"raw read": seconds[0]}

    def load() -> dict[str, float]:
        directory = cold()
        with _timer() as seconds:
            state.load(directory, engine.fragments(), group=groups.control)
        return {"moetrain, load": seconds[0]}

    def load_verified() -> dict[str, float]:
        directory = cold()
        with _timer() as seconds:
            store.verify(directory)
            state.load(directory, engine.fragments(), group=groups.control)
        return {"moetrain, load, digests checked": seconds[0]}

    return [read, load, load_verified]


def _engine(parameters: int, groups: Groups) -> tuple[Engine, int]:
    """An engine after one step, with about so many parameters, and how many it has."""
    d_model = max(64, int((parameters / 16 / 12) ** 0.5) // 64 * 64)  # some twelve layers, as GPT-2's smallest
    per_layer = 4 * d_model**2 + 3 * d_model * 4 * d_model
    config = ModelConfig(
        vocab_size=1024, context=32, d_model=d_model, num_layers=max(1, parameters // per_layer), num_heads=4,
        d_ff=4 * d_model, moe=None,
    )  # fmt: skip
    gpt = build_model(config)
    initialize(gpt, init_std=0.02, seed=0)
    engine = Engine(
        Objective(gpt, loss_weights={}),
        groups=groups,
        config=deepspeed_config(micro_batch=1, accumulation=1, world_size=1, zero_stage=1, dtype="fp32", clip=1.0),
        optimizer={"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
        clip=1.0,
    )
    tokens = torch.randint(0, config.vocab_size, (1, 33), generator=torch.Generator().manual_seed(0))
    engine.forward_backward(MicroBatch(token_BS=tokens[:, :-1].contiguous(), target_BS=tokens[:, 1:].contiguous()))
    engine.step(1e-3)
    return engine, sum(each.numel() for each in gpt.parameters())


def _manifest(step: int) -> store.Manifest:
    return store.Manifest(step=step, tokens=0, seed=0, world_size=1, expert_parallel=1, run={}, data={}, files=[])


def _committed(saver: Saver) -> None:
    outcome = saver.wait()
    assert outcome is not None
    if outcome.failure is not None:
        raise outcome.failure


@contextmanager
def _timer() -> Iterator[list[float]]:
    found = [0.0]
    since = time.perf_counter()
    yield found
    found[0] = time.perf_counter() - since


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Bytes that the resident memory of this process rose by at most; 0 where the system does not tell (not Linux)."""
    found, reset = [0], Path("/proc/self/clear_refs")
    if not reset.exists():
        yield found
        return
    reset.write_text("5")  # sets the high-water mark back to what is resident now (man 5 proc)
    before = _status("VmHWM")
    yield found
    found[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _raw_write(path: Path, num_bytes: int) -> None:
    block = mmap.mmap(-1, 8 << 20)
    block.write(os.urandom(len(block)))
    file = open_direct(path)
    try:
        for _ in range(-(-num_bytes // len(block))):
            if os.write(file, block) < len(block):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.ftruncate(file, num_bytes)
        os.fsync(file)
    finally:
        os.close(file)


def _raw_read(path: Path, targets: list[torch.Tensor]) -> None:
    with path.open("rb", buffering=0) as file:
        for tensor in targets:
            rest = memoryview(tensor.numpy()).cast("B")
            while rest:
                rest = rest[file.readinto(rest) :]


def _forget(path: Path) -> None:
    """Have the kernel drop its copy of a file, so that reading it reads the disk.

    The file is read first, so that there is a copy, and its memory is free: a virtual machine gives back what is not
    used, and to fetch it anew can take longer than the disk.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        block = bytearray(8 << 20)
        while os.readv(handle, [block]):
            pass
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.rglob("*.*"))
