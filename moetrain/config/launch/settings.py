"""How a run gets its processes on a cluster: what a queue and Kubernetes must be told."""

from __future__ import annotations

from dataclasses import dataclass

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
