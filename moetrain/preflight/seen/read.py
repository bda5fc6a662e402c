"""Reads the facts of a node, through two small readers: files below a root, and public tools.

Tests hand in recorded trees and recorded outputs instead of the machine. No torch.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.config.freeze import RUN_FILE
from moetrain.preflight.seen.facts import Gpu, Limits, NodeFacts, Port, StaleLock

Run = Callable[[Sequence[str]], "str | None"]
"""The output of a command; None: it is not there, failed, or took too long."""

TOOL_SECONDS = 20.0
STALE_MINUTES = 10.0
"""A build of DeepSpeed's largest operator takes about two minutes (docs/deepspeed.md); a lock much older is dead."""
_GPU_FIELDS = ("index", "name", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu",
               "ecc.errors.uncorrected.volatile.total")  # fmt: skip
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "UCX_", "GLOO_", "CUDA_")
_NEAREST_FIRST = ("PIX", "PXB", "PHB", "NODE", "SYS")


def run_command(words: Sequence[str]) -> str | None:
    """Run a tool of this machine."""
    try:
        done = subprocess.run(
            list(words), capture_output=True, text=True, timeout=TOOL_SECONDS, check=True, errors="replace",
            env=os.environ | {"LC_ALL": "C"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine to read from: this one, or a recorded one."""

    root: Path
    run: Run
    environment: Mapping[str, str]
    name: str

    def text(self, path: str) -> str | None:
        """A file; None: not there, or not for us to read."""
        try:
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def names(self, path: str) -> list[str]:
        """What is in a directory."""
        try:
            return sorted(entry.name for entry in (self.root / path.lstrip("/")).iterdir())
        except OSError:
            return []


def this_host() -> Host:
    """The machine we are on."""
    return Host(root=Path("/"), run=run_command, environment=os.environ, name=socket.gethostname())


def read_facts(host: Host, *, node: int, place: Path, versions: Mapping[str, str | None]) -> NodeFacts:
    """All that can be seen of a node without starting anything on it.

    Args:
        place: where run.yaml lies and checkpoints go; on the machine itself, not below the host's root.
        versions: of what only torch knows: torch, cuda, nccl.
    """
    ports = read_ports(host)
    gpus = read_gpus(host)
    return NodeFacts(
        node=node,
        host=host.name,
        software={"driver": _driver(host), **versions},
        gpus=gpus,
        ports=ports,
        gpudirect=_gpudirect(host) if gpus and ports else None,
        near_port=_near_port(host, ports) if gpus and ports else None,
        limits=_limits(host),
        shm_bytes=_df(host, "/dev/shm", column="size"),
        interfaces=_interfaces(host),
        host_address=_first_word(host.run(["getent", "hosts", host.name])),
        environment={key: value for key, value in sorted(host.environment.items()) if key.startswith(_PREFIXES)},
        disk_free_bytes=_df(host, str(place), column="free"),
        code_digest=_code_digest(),
        run_digest=_digest(place / RUN_FILE),
        stale_locks=_stale_locks(host, now=time.time()),
    )


def read_gpus(host: Host) -> list[Gpu] | None:
    """GPUs by ``nvidia-smi --query-gpu`` (CSV); None: it did not answer."""
    out = host.run(["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"])
    if out is None:
        return None
    # its own question, for GPUs before Ampere do not know it
    fields = "gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
    rows = _csv(host.run(["nvidia-smi", f"--query-remapped-rows={fields}", "--format=csv,noheader,nounits"]) or "")
    gpus = []
    for number, row in enumerate(_csv(out)):
        if len(row) != len(_GPU_FIELDS):
            continue
        index, name, *values = row
        total, used, utilization, celsius, ecc = (_number(value) for value in values)
        remap = rows[number][1:3] if number < len(rows) and len(rows[number]) == 3 else ["", ""]
        gpus.append(
            Gpu(
                index=int(index),
                name=name,
                memory_total_mib=total,
                memory_used_mib=used,
                utilization=utilization,
                celsius=celsius,
                ecc_uncorrected=None if ecc is None else int(ecc),
                remap_pending=_yes(remap[0]),
                remap_failed=_yes(remap[1]),
            )
        )
    return gpus


def read_ports(host: Host) -> list[Port]:
    """Ports of InfiniBand and RoCE adapters (Documentation/ABI/stable/sysfs-class-infiniband of Linux)."""
    ports = []
    for device in host.names("/sys/class/infiniband"):
        for number in host.names(f"/sys/class/infiniband/{device}/ports"):
            where = f"/sys/class/infiniband/{device}/ports/{number}"
            rate = re.match(r"([\d.]+) Gb/sec(?: \((\d+)X)?", host.text(f"{where}/rate") or "")
            counters = {name: host.text(f"{where}/counters/{name}") or "" for name in ERROR_COUNTERS}
            ports.append(
                Port(
                    device=device,
                    port=int(number),
                    state=_after_colon(host.text(f"{where}/state")),
                    physical=_after_colon(host.text(f"{where}/phys_state")),
                    gbits=float(rate[1]) if rate else None,
                    lanes=int(rate[2]) if rate and rate[2] else None,
                    link_layer=host.text(f"{where}/link_layer") or "unknown",
                    counters={name: int(value) for name, value in counters.items() if value.isdecimal()},
                )
            )
    return ports


ERROR_COUNTERS = ("symbol_error", "link_error_recovery", "link_downed", "port_rcv_errors", "port_xmit_discards",
                  "local_link_integrity_errors", "excessive_buffer_overrun_errors")  # fmt: skip


def _driver(host: Host) -> str | None:
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", host.text("/proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _gpudirect(host: Host) -> str:
    """peermem where NCCL finds one of the modules it asks for (net_ib.cc); dmabuf where kernel and driver have it."""
    for path in ("/sys/module/nvidia_peermem/version", "/sys/kernel/mm/memory_peers/nv_mem/version"):
        if host.text(path) is not None:
            return "peermem"
    kernel = re.match(r"(\d+)\.(\d+)", host.text("/proc/sys/kernel/osrelease") or "")
    is_open = "Open Kernel Module" in (host.text("/proc/driver/nvidia/version") or "")
    # Linux 5.12 brought dma-buf to RDMA; only NVIDIA's open kernel modules export it
    return "dmabuf" if is_open and kernel and (int(kernel[1]), int(kernel[2])) >= (5, 12) else "none"


def _near_port(host: Host, ports: Sequence[Port]) -> dict[str, str] | None:
    """The nearest active adapter of each GPU, off the matrix of ``nvidia-smi topo -m``."""
    out = host.run(["nvidia-smi", "topo", "-m"])
    if out is None:
        return None
    text = re.sub(r"\x1b\[[0-9;]*m", "", out)
    legend = dict(re.findall(r"^\s*(NIC\d+): (\S+)\s*$", text, flags=re.MULTILINE))
    active = {port.device for port in ports if port.is_active}
    lines = [line.split("\t") for line in text.splitlines()]
    head = next((line for line in lines if line[:2] == ["", "GPU0"]), None)
    if head is None:
        return None
    found = {}
    for line in lines:
        name = line[0].strip()
        if re.fullmatch(r"GPU\d+", name):
            # older drivers have the adapter's own name in the head, newer ones NIC0 and a legend
            ways = [cell.strip() for column, cell in zip(head, line, strict=False)
                    if legend.get(column.strip(), column.strip()) in active]  # fmt: skip
            nearest = [way for way in _NEAREST_FIRST if way in ways]
            if nearest:
                found[name.removeprefix("GPU")] = nearest[0]
    return found or None


def _limits(host: Host) -> Limits | None:
    text = host.text("/proc/self/limits")
    found = dict(re.findall(r"^Max (locked memory|open files)\s+(\S+)", text or "", flags=re.MULTILINE))
    if len(found) < 2:
        return None
    soft = {name: int(value) if value.isdecimal() else None for name, value in found.items()}
    return Limits(locked_bytes=soft["locked memory"], open_files=soft["open files"])


def _df(host: Host, path: str, *, column: str) -> int | None:
    """Bytes, off the output of ``df -Pk`` (POSIX)."""
    found = re.search(r"\s(?P<size>\d+)\s+\d+\s+(?P<free>\d+)\s+\d+%\s", host.run(["df", "-Pk", path]) or "")
    return int(found[column]) * 1024 if found else None


def _interfaces(host: Host) -> dict[str, str] | None:
    names = host.names("/sys/class/net")
    return {name: host.text(f"/sys/class/net/{name}/operstate") or "unknown" for name in names} or None


def _stale_locks(host: Host, *, now: float) -> list[StaleLock]:
    """What a killed build leaves behind: torch.utils.file_baton waits for such a file to go, without a word."""
    home = host.environment.get("HOME", "/root")
    cache = host.environment.get("TORCH_EXTENSIONS_DIR") or f"{home}/.cache/torch_extensions"
    found = []
    base = host.root / cache.lstrip("/")
    for pattern in ("lock", "*/lock", "*/*/lock"):
        for path in sorted(base.glob(pattern)):
            with contextlib.suppress(OSError):  # gone meanwhile: its build is done
                minutes = (now - path.stat().st_mtime) / 60
                if minutes > STALE_MINUTES:
                    found.append(StaleLock(path=f"/{path.relative_to(host.root)}", minutes=round(minutes, 1)))
    return found


def _code_digest() -> str:
    """Of the package as it lies here."""
    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _csv(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]


def _number(text: str) -> float | None:
    """None for [N/A], [Not Supported], [Unknown Error]."""
    try:
        return float(text)
    except ValueError:
        return None


def _yes(text: str) -> bool | None:
    return {"Yes": True, "No": False, "1": True, "0": False}.get(text)


def _after_colon(text: str | None) -> str:
    return (text or "").partition(":")[2].strip() or "unknown"


def _first_word(text: str | None) -> str | None:
    words = (text or "").split()
    return words[0] if words else None
