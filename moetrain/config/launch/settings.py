"""How a run gets its processes on a cluster: what a queue and Kubernetes must be told."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("local", "hostfile", "slurm", "kubernetes")
RUNNERS = ("pdsh", "openmpi", "mpich", "slurm")
MANIFESTS = ("jobset", "pytorchjob")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What sbatch is told (``launch.slurm``); null leaves a thing to the cluster's default."""

    partition: str | None = None
    """--partition."""
    account: str | None = None
    """--account."""
    qos: str | None = None
    """--qos."""
    time: str | None = None
    """--time: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. The job is put back into the queue when it
    runs out, and goes on from its checkpoint."""
    save_seconds: int = 300
    """The checkpoint is saved this many seconds before the time limit (--signal=B:USR1@…); longer than a save takes."""
    gpus_per_node: int | None = None
    """--gpus-per-node. null: launch.processes; 0: none are asked for."""
    cpus_per_node: int | None = None
    """--cpus-per-task of the one task on each node."""
    memory: str | None = None
    """--mem of each node, e.g. 900G; 0 is all of it."""
    requeue: bool = True
    """Whether the job goes back into the queue at its time limit, and when a node fails."""
    extra: list[str] | None = None
    """Further options of sbatch, e.g. ['--exclusive', '--constraint=ib']."""
    setup: list[str] | None = None
    """Lines of shell that run on the first node before anything else, e.g. ['module load cuda']."""


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """What the manifest asks for (``launch.kubernetes``)."""

    manifest: str = "jobset"
    """jobset (jobset.x-k8s.io/v1alpha2) or pytorchjob (kubeflow.org/v1, Kubeflow's training operator)."""
    image: str | None = None
    """Container image with moetrain, e.g. registry.example/moetrain:1 (docker/Dockerfile builds one)."""
    namespace: str = "default"
    """Namespace of the job."""
    volume_claim: str | None = None
    """PersistentVolumeClaim that all nodes can write; mounted at mount, where run_dir and the token files must lie."""
    mount: str = "/work"
    """Where it is mounted."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource of a GPU."""
    gpus_per_node: int | None = None
    """GPUs of each pod. null: launch.processes; 0: none."""
    rdma_resource: str | None = None
    """Name of the resource of an RDMA device, e.g. rdma/hca_shared_devices_a or nvidia.com/hostdev. null: none."""
    rdma_per_node: int = 1
    """How many of them each pod gets."""
    shared_memory: str = "64Gi"
    """Size of /dev/shm; what is in it counts as memory of the pod."""
    cpu: str | None = None
    """CPU request of each pod, e.g. 64."""
    memory: str | None = None
    """Memory request of each pod, e.g. 900Gi."""
    retries: int = 3
    """How often the whole job starts again after a failure; it then goes on from its newest checkpoint."""
    secret: str | None = None
    """Secret whose keys become environment variables, e.g. WANDB_API_KEY. null: none."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the run gets its processes."""

    kind: str = "local"
    """local: this machine. hostfile: hosts reached by ssh, through the deepspeed launcher. slurm: a job in the queue.
    kubernetes: a manifest is written."""
    nodes: int | None = None
    """Machines. null: as many as hosts are named, else 1."""
    processes: int | None = None
    """Processes on each node. null: the slots of launch.hostfile, or one per GPU of this machine, or 2 without GPUs."""
    timeout_seconds: int = 600
    """A collective that waits longer than this fails the run; those of DeepSpeed's own groups keep torch's default."""
    max_restarts: int = 0
    """How often the run is started again, from its newest whole checkpoint, after a fault that may not come again: a
    rank killed, a node lost, a hang, a broken connection. An error in the settings or the data never is."""
    elastic: bool = False
    """Where processes are lost for good, restart on those that are left, in a smaller layout of the same global
    batch."""
    stop_after_minutes: float | None = None
    """Save and stop, with exit code 75, this long after the start; null: no limit of time."""
    bind_cores: bool = False
    """Each process keeps to cores of its own, near its GPU where the system tells."""
    hostfile: str | None = None
    """hostfile: a file with a line `host slots=n` for each node, n processes each; n must be the same."""
    hosts: list[str] | None = None
    """hostfile: the nodes by name, instead of a file."""
    runner: str = "pdsh"
    """hostfile: what starts a process on each node: pdsh (over ssh), openmpi, mpich (mpirun) or slurm (srun, inside an
    allocation)."""
    runner_args: list[str] | None = None
    """hostfile: further words for it. slurm: for srun."""
    ssh_port: int | None = None
    """hostfile: port of sshd on the nodes. null: 22, or as ~/.ssh/config says."""
    master_addr: str | None = None
    """Name or address of the first node, as all nodes reach it. null: its name in the hostfile, or in SLURM's list."""
    master_port: int | None = None
    """Port there on which the nodes meet; the processes' own is chosen when they start. null: 29400, or, in a SLURM
    job, one by its number."""
    interface: str | None = None
    """Network interface of every node for NCCL and gloo, e.g. ib0 (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME). null: they
    choose."""
    interfaces: dict[str, str] | None = None
    """The same by host, where they differ: {node1: ib0, node2: ibs1}; other hosts have launch.interface."""
    export: list[str] | None = None
    """Environment variables that the nodes get besides NCCL_*, UCX_*, GLOO_*, CUDA_*, TORCH_*, OMP_* and a few more
    (docs/launch.md): names, or patterns such as AWS_*."""
    lost_after_seconds: int = 30
    """A node that has not been heard for so long is lost, and the run ends on the others."""
    start_seconds: int = 300
    """All nodes must have started within this time."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return (self.nodes or 1) * (self.processes or 1)
