"""The rules of preflight, as tables: what is looked at, how bad it is, why, and what to do. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moetrain.preflight import checks
from moetrain.preflight.checks import Needs
from moetrain.preflight.seen.facts import NodeFacts

WARN, NO_GO = "warn", "no-go"

Check = Callable[[NodeFacts, Needs], "list[str] | None"]
Applies = Callable[[NodeFacts, Needs], bool]


@dataclass(frozen=True)
class Rule:
    """One rule for one node."""

    what: str
    severity: str
    check: Check
    applies: Applies
    reason: str
    remedy: str


@dataclass(frozen=True)
class Speed:
    """How slow is too slow."""

    warn_below: float
    """Share of what is expected: of what the plan counts on, or of the median of the others."""
    no_go_below: float
    """0: a warning at most."""
    reason: str
    remedy: str


@dataclass(frozen=True)
class Same:
    """What must be equal on all nodes."""

    what: str
    severity: str
    value: Callable[[NodeFacts], str | None]
    reason: str
    remedy: str


RULES = (
    Rule("settings", NO_GO, checks.settings_there, checks.always,
         "every rank reads the run's settings from this file",
         "put run_dir on a file system that all nodes have"),
    Rule("run directory", NO_GO, checks.shared_run_dir, checks.over_nodes,
         "a checkpoint has files from every node, and one rename makes it whole",
         "put run_dir on a file system that all nodes share"),
    Rule("GPUs present", NO_GO, checks.gpus_present, checks.with_gpus,
         "a process without a GPU fails at the start",
         "lower launch.processes; if a GPU is lost, see dmesg for Xid 79 and restart the node"),
    Rule("GPUs idle", WARN, checks.gpus_idle, checks.with_gpus,
         "what others use is missing, and the slowest GPU sets the pace",
         "end the process that nvidia-smi shows, or ask for another node"),
    Rule("GPU memory errors", NO_GO, checks.ecc, checks.with_gpus,
         "an uncorrected error kills a run, or its numbers",
         "reset the GPU (nvidia-smi -r) or take the node out"),
    Rule("GPU memory repair", NO_GO, checks.remap_failed, checks.with_gpus,
         "the GPU has no spare rows left: it is to be replaced",
         "take the node out"),
    Rule("GPU memory to repair", WARN, checks.remap_pending, checks.with_gpus,
         "the worn row is used until the GPU is reset",
         "reset the GPU (nvidia-smi -r) before a long run"),
    Rule("GPU temperature", WARN, checks.cool, checks.with_gpus,
         "a GPU that is hot when idle slows down under load",
         "look after the cooling, or take the node out"),
    Rule("fabric ports up", NO_GO, checks.enough_ports, checks.with_fabric,
         "a GPU without a port of its own shares one: half rate",
         "see ibstat on the node; cable, switch port, subnet manager (state INIT); or name others in NCCL_IB_HCA"),
    Rule("fabric ports idle", WARN, checks.idle_ports, checks.with_fabric,
         "NCCL may still choose a port that is down",
         "name the ports to use in NCCL_IB_HCA"),
    Rule("fabric port rate", WARN, checks.port_rates, checks.with_fabric,
         "a link that came up slower or with fewer lanes is a bad cable or socket, and all ranks wait for it",
         "reseat or change the cable; mlxlink shows why"),
    Rule("fabric rate as stated", NO_GO, checks.stated_rates, checks.gpus_with_fabric,
         "the plan counts on the stated rate",
         "mend the link, or correct network_gb_per_second in the cluster's file"),
    Rule("fabric errors", WARN, checks.counters, checks.with_fabric,
         "errors mean packets sent again, or a link about to fail",
         "clear them (perfquery -R), look again after a while; if they grow, change the cable"),
    Rule("GPUDirect", WARN, checks.gpudirect, checks.gpus_with_fabric,
         "traffic goes by way of host memory: a fraction of the rate",
         "modprobe nvidia_peermem, or NVIDIA's open kernel modules on Linux 5.12 or newer"),
    Rule("GPU near its port", WARN, checks.affinity, checks.gpus_with_fabric,
         "traffic across the sockets is slow and shared",
         "mend the port beside the GPU, or name near ones in NCCL_IB_HCA; see nvidia-smi topo -m"),
    Rule("locked memory", NO_GO, checks.locked_memory, checks.with_fabric,
         "RDMA pins its buffers: NCCL fails when it cannot",
         "ulimit -l unlimited; in containers --ulimit memlock=-1; with SLURM PropagateResourceLimitsExcept=MEMLOCK"),
    Rule("/dev/shm", NO_GO, checks.tiny_shm, checks.with_gpus,
         "NCCL's ranks of a node meet there, and fail when it is full",
         "start the container with --shm-size=1g or --ipc=host; in Kubernetes an emptyDir of medium Memory"),
    Rule("/dev/shm size", WARN, checks.shm, checks.with_gpus,
         "NCCL's buffers grow with the ranks of a node",
         "start the container with --shm-size=1g or more"),
    Rule("open files", WARN, checks.open_files, checks.over_nodes,
         "each process group has a socket to each rank",
         "ulimit -n 65536 before the launch"),
    Rule("interface variables", NO_GO, checks.interface_variables, checks.always,
         "the ranks would not find each other, and hang",
         "unset the variable, or name an interface of this node"),
    Rule("adapter variables", NO_GO, checks.adapter_variables, checks.with_fabric,
         "NCCL and UCX go over TCP without the adapter",
         "unset the variable, or name an adapter of this node"),
    Rule("fabric used", WARN, checks.fabric_unused, checks.with_fabric,
         "all traffic goes over TCP", "unset NCCL_IB_DISABLE"),
    Rule("variables left over", WARN, checks.leftovers, checks.always,
         "set once to look for a fault, they slow a run down",
         "unset them"),
    Rule("own address", NO_GO, checks.own_name, checks.over_nodes,
         "gloo listens where its host's name points, out of reach",
         "set GLOO_SOCKET_IFNAME, or mend /etc/hosts"),
    Rule("clock", WARN, checks.clock, checks.over_nodes,
         "times in the logs of two nodes cannot be compared, and object stores refuse what they are asked",
         "start chronyd or ntpd"),
    Rule("disk for a checkpoint", NO_GO, checks.disk_for_one, checks.always,
         "the run would end at its first save",
         "make room, or choose another run_dir"),
    Rule("disk for all checkpoints", WARN, checks.disk_for_all, checks.always,
         "the run would end at a later save",
         "make room, or lower checkpoint.keep"),
    Rule("builds", WARN, checks.locks, checks.always,
         "who needs this extension waits for the lock without a word, forever",
         "remove the file, if no build is running"),
)  # fmt: skip

SAME = (
    Same("code", NO_GO, lambda facts: facts.code_digest, "two versions of the code train two models",
         "install the same moetrain everywhere, best on a shared file system or in the image"),
    Same("settings", NO_GO, lambda facts: facts.run_digest, "two settings train two models, or hang",
         "put run_dir on a file system that all nodes share"),
    Same("torch", NO_GO, lambda facts: facts.software.get("torch"), "other versions, other numbers and messages",
         "use one image or environment"),
    Same("CUDA", NO_GO, lambda facts: facts.software.get("cuda"), "other kernels, other numbers",
         "use one image or environment"),
    Same("NCCL", NO_GO, lambda facts: facts.software.get("nccl"), "NCCL refuses or hangs with another version",
         "use one image or environment"),
    Same("driver", WARN, lambda facts: facts.software.get("driver"), "nodes of one speed have one driver",
         "bring the driver up to date"),
    Same("GPUs alike", NO_GO, checks.names_of_gpus, "all wait for the slowest", "leave the node out"),
    Same("fabric alike", NO_GO, checks.active_ports, "all wait for the node with fewer or slower ports",
         "mend the port, or leave the node out"),
    Same("variables alike", WARN, checks.shared_environment,
         "NCCL with other settings chooses other ways, and may hang",
         "set them in one place for all nodes"),
)  # fmt: skip

# Links and GPUs of one kind differ by a few per cent. Half is a part that is broken, or one lane of two; in between
# something is wrong, and the run is only slower.
SPEEDS = {
    "matrix products": Speed(0.7, 0.5, "all ranks wait for the slowest GPU",
                             "leave the node out (hostfile.good), and have it looked after"),
    # a processor is shared with all else that runs there: no fault of it
    "matrix products on a CPU": Speed(0.7, 0.0, "all ranks wait for the slowest process",
                                      "see what else runs on the node, or start fewer processes"),
    "link": Speed(0.7, 0.5, "a collective is as fast as its slowest link",
                  "leave the node out (hostfile.good); see cable, port and switch of this link"),
    # names nobody: the part at fault has a line of its own, and a small message is all latency
    "all-reduce": Speed(0.7, 0.0, "every step waits for it",
                        "see the links; where none is slow, NCCL_DEBUG=INFO shows the way taken"),
    "all-to-all of the experts": Speed(0.7, 0.0, "every MoE layer waits for it, four times a step",
                                       "see the links; a longer batch.micro_batch makes its messages longer"),
}  # fmt: skip
