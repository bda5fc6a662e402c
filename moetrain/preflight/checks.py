"""What each rule of preflight looks at: a text for each fault found, none where all is well, None where it could not
look. When a rule applies, what it means and what to do is in ``rules.py``. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moetrain.preflight.seen.facts import NodeFacts, Port

GB, MIB = 10**9, 1 << 20

HOT_CELSIUS = 75.0
"""An idle GPU as hot as this has no head-room: H100s slow down from about 85 degrees."""
COUNTED = 10
"""Errors a port may have had since its counters were cleared: the threshold of ibqueryerrors(8)'s example for symbol
errors and recoveries. A boot alone costs a few."""
SKEW_SECONDS = 1.0
SHM_BYTES = GB
"""What NVIDIA's containers are to be started with (--shm-size=1g, NCCL user guide, troubleshooting)."""
DOCKER_SHM_BYTES = 64 * MIB
"""What a container has unless told otherwise (docker run --shm-size)."""
LOCKED_BYTES = 16 * GB
USED_MIB, USED_PERCENT = 2048.0, 10.0
"""Of a GPU that is still idle: a desktop takes less."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the run asks of its nodes."""

    nodes: int
    processes: int
    """On each node."""
    gpus: bool
    """Whether it runs on GPUs."""
    checkpoint_bytes: float
    checkpoints_kept: int
    """Whole ones on disk at a time, the one being written included."""
    port_gbits: float | None = None
    """Rate of a port that the cluster's file states; None: no cluster was named."""


def always(facts: NodeFacts, needs: Needs) -> bool:
    return True


def with_gpus(facts: NodeFacts, needs: Needs) -> bool:
    return needs.gpus


def with_fabric(facts: NodeFacts, needs: Needs) -> bool:
    return bool(facts.ports)


def gpus_with_fabric(facts: NodeFacts, needs: Needs) -> bool:
    return needs.gpus and bool(facts.ports)


def over_nodes(facts: NodeFacts, needs: Needs) -> bool:
    return needs.nodes > 1


def gpus_present(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.gpus is None:
        return None
    have, want = len(facts.gpus), needs.processes
    return [f"{have} GPUs for {want} processes"] if have < want else []


def gpus_idle(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.gpus is None:
        return None
    busy = [g for g in facts.gpus if (g.memory_used_mib or 0) > USED_MIB or (g.utilization or 0) > USED_PERCENT]
    return [f"GPU {g.index}: {g.memory_used_mib or 0:,.0f} MiB in use, {g.utilization or 0:.0f}% busy" for g in busy]


def ecc(facts: NodeFacts, needs: Needs) -> list[str] | None:
    counts = {gpu.index: gpu.ecc_uncorrected for gpu in facts.gpus or []}
    if not counts or all(count is None for count in counts.values()):
        return None
    return [f"GPU {index}: {count} uncorrected memory errors" for index, count in counts.items() if count]


def remap_failed(facts: NodeFacts, needs: Needs) -> list[str] | None:
    return _remapped(facts, "remap_failed", "a row of memory could not be replaced")


def remap_pending(facts: NodeFacts, needs: Needs) -> list[str] | None:
    return _remapped(facts, "remap_pending", "a row of memory waits to be replaced")


def _remapped(facts: NodeFacts, field: str, told: str) -> list[str] | None:
    states = {gpu.index: getattr(gpu, field) for gpu in facts.gpus or []}
    if all(state is None for state in states.values()):
        return None
    return [f"GPU {index}: {told}" for index, state in states.items() if state]


def cool(facts: NodeFacts, needs: Needs) -> list[str] | None:
    heat = {gpu.index: gpu.celsius for gpu in facts.gpus or []}
    if all(celsius is None for celsius in heat.values()):
        return None
    return [
        f"GPU {index}: {c:.0f} °C before any work" for index, c in heat.items() if c is not None and c > HOT_CELSIUS
    ]


def _chosen_ports(facts: NodeFacts) -> list[Port]:
    """Those that NCCL_IB_HCA leaves (NCCL user guide): prefixes, after = whole names, after ^ all but those."""
    given = facts.environment.get("NCCL_IB_HCA", "")
    names = [name.strip() for name in given.lstrip("^=").split(",") if name.strip()]
    if not names:
        # beside InfiniBand an Ethernet port is there for something else, and the run does not go by it
        fabric = [port for port in facts.ports if port.link_layer == "InfiniBand"]
        return fabric or facts.ports
    is_exact = given.lstrip("^").startswith("=")

    def named(port: Port) -> bool:
        return any(
            name in (port.device, port.name) if is_exact or ":" in name else port.device.startswith(name)
            for name in names
        )

    return [port for port in facts.ports if named(port) != given.startswith("^")]


def enough_ports(facts: NodeFacts, needs: Needs) -> list[str] | None:
    """A port that is down is a fault where it leaves a process without a port of its own."""
    chosen = _chosen_ports(facts)
    up = [port for port in chosen if port.is_active]
    wanted = min(len(chosen), needs.processes) if needs.gpus else min(1, len(chosen))
    if len(up) >= wanted:
        return []
    return [f"{p.name} is {p.state} ({p.physical})" for p in chosen if not p.is_active]


def idle_ports(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if enough_ports(facts, needs):
        return []  # told by the graver rule
    return [f"{p.name} is {p.state} ({p.physical})" for p in _chosen_ports(facts)
            if not p.is_active and p.physical != "Disabled"]  # fmt: skip


def port_rates(facts: NodeFacts, needs: Needs) -> list[str] | None:
    """Against the fastest of the same kind on the node: they are of one make where a GPU has a port each."""
    active = [port for port in _chosen_ports(facts) if port.is_active and port.gbits]
    found = []
    for port in active:
        fastest = max(p.gbits or 0 for p in active if p.link_layer == port.link_layer)
        if (port.gbits or 0) < fastest:
            lanes = f" on {port.lanes} lanes" if port.lanes else ""
            found.append(f"{port.name} runs at {port.gbits:g} Gb/s{lanes}, others at {fastest:g}")
    return found


def stated_rates(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if needs.port_gbits is None:
        return None
    slow = [p for p in _chosen_ports(facts) if p.is_active and p.gbits and p.gbits < needs.port_gbits]
    fast_enough = sum(bool(p.is_active and p.gbits and p.gbits >= needs.port_gbits) for p in _chosen_ports(facts))
    if fast_enough >= needs.processes:
        return []  # the slower ones are there for something else, storage for example
    return [f"{p.name} runs at {p.gbits:g} Gb/s, the cluster's file says {needs.port_gbits:g}" for p in slow]


def counters(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if not any(port.counters for port in facts.ports):
        return None
    return [
        f"{port.name}: {name} {count:,}"
        for port in _chosen_ports(facts)
        for name, count in port.counters.items()
        if count > COUNTED
    ]


def gpudirect(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.gpudirect is None:
        return None
    return ["neither nvidia_peermem nor dma-buf"] if facts.gpudirect == "none" else []


def affinity(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.near_port is None:
        return None
    return [f"GPU {gpu}: nearest active port is across the sockets ({way})"
            for gpu, way in facts.near_port.items() if way == "SYS"]  # fmt: skip


def locked_memory(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.limits is None:
        return None
    limit = facts.limits.locked_bytes
    return [] if limit is None or limit >= LOCKED_BYTES else [f"ulimit -l is {limit // 1024:,} KiB"]


def open_files(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.limits is None:
        return None
    limit, wanted = facts.limits.open_files, 512 + 16 * needs.nodes * needs.processes
    return [] if limit is None or limit >= wanted else [f"ulimit -n is {limit:,}, {wanted:,} may be needed"]


def shm(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.shm_bytes is None:
        return None
    size = facts.shm_bytes
    return [f"{size / MIB:,.0f} MiB"] if DOCKER_SHM_BYTES < size < SHM_BYTES else []


def tiny_shm(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.shm_bytes is None:
        return None
    return [f"{facts.shm_bytes / MIB:,.0f} MiB"] if facts.shm_bytes <= DOCKER_SHM_BYTES else []


def interface_variables(facts: NodeFacts, needs: Needs) -> list[str] | None:
    """NCCL takes prefixes (exact after =, others after ^), gloo whole names."""
    if facts.interfaces is None:
        return None
    found = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        given = facts.environment.get(variable, "")
        is_exact = variable.startswith("GLOO") or given.startswith("=")
        for name in _listed(given):
            matches = [each for each in facts.interfaces if (each == name if is_exact else each.startswith(name))]
            if not given.startswith("^") and not matches:
                found.append(f"{variable}={given}: there is no interface {name}; there are {_joined(facts.interfaces)}")
            elif matches and all(facts.interfaces[each] == "down" for each in matches):
                found.append(f"{variable}={given}: {name} is down")
            elif needs.nodes > 1 and matches == ["lo"] and not given.startswith("^"):
                found.append(f"{variable}={given}: lo does not reach other nodes")
    return found


def adapter_variables(facts: NodeFacts, needs: Needs) -> list[str] | None:
    known = {port.device for port in facts.ports} | {port.name for port in facts.ports}
    found = []
    for variable, others in (("NCCL_IB_HCA", set()), ("UCX_NET_DEVICES", {"all", *(facts.interfaces or {})})):
        given = facts.environment.get(variable, "")
        if given.startswith("^"):
            continue
        for name in _listed(given):
            exact = given.startswith("=") or ":" in name or variable.startswith("UCX")
            there = name in known | others if exact else any(each.startswith(name) for each in known)
            if not there:
                found.append(f"{variable}={given}: there is no {name}; there are {_joined(known)}")
    return found


def fabric_unused(facts: NodeFacts, needs: Needs) -> list[str] | None:
    is_off = facts.environment.get("NCCL_IB_DISABLE", "0") not in ("", "0")
    return ["NCCL_IB_DISABLE=1, and there are active ports"] if is_off and any(p.is_active for p in facts.ports) else []


def leftovers(facts: NodeFacts, needs: Needs) -> list[str] | None:
    found = []
    for name, slows in LEFTOVERS.items():
        value = facts.environment.get(name, "")
        if re.fullmatch(slows, value, flags=re.IGNORECASE):
            found.append(f"{name}={value}")
    return found


LEFTOVERS = {
    "NCCL_DEBUG": "INFO|TRACE",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_NET_GDR_LEVEL": "0|LOC",
    "NCCL_ALGO": ".+",
    "NCCL_PROTO": ".+",
    "CUDA_LAUNCH_BLOCKING": "1",
    "TORCH_NCCL_BLOCKING_WAIT": "1",
}
"""Variables set to look for a fault, which slow a run down: name -> the values that do."""


def own_name(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.host_address is None:
        return None
    is_loopback = facts.host_address.startswith("127.") or facts.host_address == "::1"
    return [f"{facts.host} stands for {facts.host_address}, and GLOO_SOCKET_IFNAME is not set"] if (
        is_loopback and "GLOO_SOCKET_IFNAME" not in facts.environment) else []  # fmt: skip


def clock(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.clock is None:
        return None
    ahead, uncertain = facts.clock.ahead_seconds, facts.clock.uncertain_seconds
    off = abs(ahead) - uncertain > SKEW_SECONDS
    return [f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} node 0"] if off else []


def disk_for_one(facts: NodeFacts, needs: Needs) -> list[str] | None:
    return _disk(facts, needs.checkpoint_bytes, f"one checkpoint takes {_gb(needs.checkpoint_bytes)}")


def disk_for_all(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if disk_for_one(facts, needs):
        return []  # told by the graver rule
    kept = needs.checkpoint_bytes * needs.checkpoints_kept
    return _disk(facts, kept, f"{needs.checkpoints_kept} checkpoints take {_gb(kept)}")


def _disk(facts: NodeFacts, wanted: float, told: str) -> list[str] | None:
    if facts.disk_free_bytes is None:
        return None
    return [f"{_gb(facts.disk_free_bytes)} free, {told}"] if facts.disk_free_bytes < wanted else []


def shared_run_dir(facts: NodeFacts, needs: Needs) -> list[str] | None:
    if facts.sees_run_dir is None:
        return None
    return [] if facts.sees_run_dir else ["it does not see what node 0 wrote there"]


def settings_there(facts: NodeFacts, needs: Needs) -> list[str] | None:
    return [] if facts.run_digest else ["run.yaml is not there"]


def locks(facts: NodeFacts, needs: Needs) -> list[str] | None:
    return [f"{lock.path}, {lock.minutes:,.0f} minutes old" for lock in facts.stale_locks]


def _listed(given: str) -> list[str]:
    return [name.strip().partition(":")[0] if name.strip().count(":") > 1 else name.strip()
            for name in given.lstrip("^=").split(",") if name.strip()]  # fmt: skip


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _gb(size: float) -> str:
    return f"{size / GB:,.3g} GB"


def names_of_gpus(facts: NodeFacts) -> str | None:
    if facts.gpus is None:
        return None
    names = sorted({gpu.name for gpu in facts.gpus})
    return f"{len(facts.gpus)} x {_joined(names)}"


def active_ports(facts: NodeFacts) -> str | None:
    rates = sorted(port.gbits or 0 for port in _chosen_ports(facts) if port.is_active)
    return f"{len(rates)} ports, {sum(rates):g} Gb/s"


def shared_environment(facts: NodeFacts) -> str | None:
    """Without what differs from host to host by right: names of interfaces and adapters."""
    own = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "UCX_NET_DEVICES", "CUDA_VISIBLE_DEVICES")
    kept = {key: value for key, value in facts.environment.items()
            if key not in own and key.startswith(("NCCL_", "GLOO_", "UCX_"))}  # fmt: skip
    return " ".join(f"{key}={value}" for key, value in kept.items()) or "none"
