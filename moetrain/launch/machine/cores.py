"""What this machine has: GPUs, and cores near them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


def default_processes() -> int:
    """Processes for this machine: one per visible NVIDIA GPU, or 2 without GPUs."""
    return visible_gpus(os.listdir("/dev"), os.environ) or 2


def visible_gpus(device_files: Sequence[str], environment: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs a process started with this environment would see, without asking the driver.

    Args:
        device_files: names in /dev.
        environment: CUDA_VISIBLE_DEVICES counts as in CUDA: indices or UUIDs, read up to the first that is not valid.
    """
    present = sum(re.fullmatch(r"nvidia[0-9]+", name) is not None for name in device_files)
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or present == 0:
        return present
    count = 0
    for entry in (part.strip() for part in chosen.split(",")):
        valid = int(entry) < present if entry.isdecimal() else entry.startswith(("GPU-", "MIG-"))
        if not valid:
            break
        count += 1
    return count


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True)
class Core:
    """A logical core: where it lies."""

    number: int
    numa: int
    """NUMA node; -1: not told."""
    physical: int
    """The lowest number among the logical cores that share its physical one."""


def share_out(cores: Sequence[Core], *, processes: int, numa_of_process: Sequence[int]) -> list[list[int]]:
    """Cores for each process: as many for each, whole physical ones where they go round, near its GPU.

    Args:
        numa_of_process: NUMA node of each process's GPU; empty, or -1: not known. Processes whose node is known share
            its cores; where one node would be left with fewer cores than processes, all cores are shared out in order.

    Returns:
        Sorted numbers for each process; empty lists where there are fewer cores than processes.
    """
    wanted = list(numa_of_process) or [-1] * processes
    near: dict[int, list[int]] = {}
    for process, numa in enumerate(wanted):
        near.setdefault(numa, []).append(process)
    by_numa = {numa: [core for core in cores if core.numa == numa] for numa in near}
    if any(len(by_numa[numa]) < len(sharing) for numa, sharing in near.items()):
        near, by_numa = {0: list(range(processes))}, {0: list(cores)}
    shares: list[list[int]] = [[] for _ in range(processes)]
    for numa, sharing in near.items():
        in_order = sorted(by_numa[numa], key=lambda core: (core.numa, core.physical, core.number))
        each = len(in_order) // len(sharing)
        for place, process in enumerate(sharing):
            shares[process] = sorted(core.number for core in in_order[place * each : (place + 1) * each])
    return shares


def bind(pids: Sequence[int]) -> None:
    """Give each process, just started, cores of its own; threads that it starts later inherit them."""
    if not hasattr(os, "sched_setaffinity"):
        return
    shares = share_out(read_cores(Path("/sys")), processes=len(pids), numa_of_process=_numa_of_gpus(len(pids)))
    for pid, share in zip(pids, shares, strict=True):
        if share:
            try:
                os.sched_setaffinity(pid, share)
            except ProcessLookupError:
                continue  # it has already ended, which its exit code tells better


def read_cores(sys_dir: Path) -> list[Core]:
    """The usable cores, as sysfs describes them."""
    numa_of = {}
    for node in (sys_dir / "devices/system/node").glob("node[0-9]*"):
        for number in _numbers(_text(node / "cpulist")):
            numa_of[number] = int(node.name.removeprefix("node"))
    cores = []
    for number in usable_cores():
        siblings = _numbers(_text(sys_dir / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list"))
        cores.append(Core(number=number, numa=numa_of.get(number, -1), physical=min(siblings, default=number)))
    return cores


def _numa_of_gpus(processes: int) -> list[int]:
    """NUMA node of the GPU of each process; empty where the system does not tell."""
    # NVIDIA's driver lists its devices by PCI address, in whose order CUDA counts equal devices
    addresses = sorted(path.name for path in Path("/proc/driver/nvidia/gpus").glob("*"))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    order = list(range(len(addresses)))
    if chosen is not None:
        words = [word.strip() for word in chosen.split(",")]
        if not all(word.isdecimal() and int(word) < len(addresses) for word in words):
            return []
        order = [int(word) for word in words]
    if len(order) < processes:
        return []
    told = [_text(Path("/sys/bus/pci/devices") / addresses[index] / "numa_node") for index in order[:processes]]
    return [int(text) if re.fullmatch(r"-?\d+", text) else -1 for text in told]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _numbers(text: str) -> list[int]:
    """``0-3,8`` as [0, 1, 2, 3, 8]."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
