"""Kubernetes: a manifest with one pod for each node, whose agent starts the node's ranks. Nothing is started here.

JobSet (jobset.x-k8s.io/v1alpha2, jobset.sigs.k8s.io) or PyTorchJob (kubeflow.org/v1, Kubeflow's training operator 1).
RUN_DIR lies on the volume that all pods mount, so the machine that writes the manifest must have it mounted too, under
the same path.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import ConfigError
from moetrain.launch.local import WORKER, Outcome
from moetrain.launch.nodes.conduct import DEFAULT_PORT, make_spec
from moetrain.launch.nodes.environment import handed_over
from moetrain.launch.nodes.spec import SPEC_FILE, in_a_word, launch_directory

MANIFEST = "kubernetes.yaml"
_SAVE_SECONDS = 600
"""Between SIGTERM and SIGKILL, when a pod is evicted: for a checkpoint."""


def write(run_dir: Path, launch: LaunchConfig, *, module: str = WORKER) -> Outcome:
    """Write RUN_DIR/launch/kubernetes.yaml, and what its agents read.

    Raises:
        ConfigError: run_dir does not lie on the volume.
    """
    text = manifest_text(run_dir, launch)
    mount = launch.kubernetes.mount
    if not run_dir.resolve().is_relative_to(mount):
        raise ConfigError(
            [
                f"run_dir is {run_dir.resolve()}, but must lie below launch.kubernetes.mount, {mount}: mount the "
                "volume here under the same path, and work there"
            ]
        )
    is_jobset = launch.kubernetes.manifest == "jobset"
    name = job_name(run_dir)
    spec = make_spec(
        run_dir,
        launch,
        module=module,
        hosts=[],
        # empty: Kubeflow's operator sets MASTER_ADDR
        master_addr=launch.master_addr or (f"{name}-node-0-0.{name}" if is_jobset else ""),
        environment=_of_pods(launch),
        node_variable="JOB_COMPLETION_INDEX" if is_jobset else "RANK",
        dropped=("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
    replace(spec, directory=mount, unattended=True).write()
    path = launch_directory(run_dir) / MANIFEST
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return Outcome(stopped=False, queued=f"{path}; start it with `kubectl apply -f {path}`")


def manifest_text(run_dir: Path, launch: LaunchConfig) -> str:
    """The manifest."""
    make = _jobset if launch.kubernetes.manifest == "jobset" else _pytorchjob
    pod = _pod(run_dir.resolve(), launch)
    content = make(job_name(run_dir), launch, pod)
    return yaml.safe_dump(content, sort_keys=False)


def job_name(run_dir: Path) -> str:
    """The run's name as Kubernetes takes it; short, since the names of the pods begin with it."""
    name = re.sub(r"[^a-z0-9-]+", "-", run_dir.name.lower()).strip("-")[:40].rstrip("-")
    return name if name[:1].isalpha() else f"run-{name}".rstrip("-")


def _jobset(name: str, launch: LaunchConfig, pod: dict[str, Any]) -> dict[str, Any]:
    nodes = launch.nodes or 1
    job = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod alone cannot come back: all start again, by the failure policy
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": launch.kubernetes.namespace},
        "spec": {
            "failurePolicy": {"maxRestarts": launch.kubernetes.retries},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pytorchjob(name: str, launch: LaunchConfig, pod: dict[str, Any]) -> dict[str, Any]:
    nodes = launch.nodes or 1
    # here it is not the pod that says how it starts again
    pod = {"spec": {key: value for key, value in pod["spec"].items() if key != "restartPolicy"}}
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": pod}}
    if nodes > 1:
        replicas["Worker"] = {"replicas": nodes - 1, "restartPolicy": "OnFailure", "template": pod}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name, "namespace": launch.kubernetes.namespace},
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": launch.kubernetes.retries},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _pod(run_dir: Path, launch: LaunchConfig) -> dict[str, Any]:
    given = launch.kubernetes
    gpus = launch.processes if given.gpus_per_node is None else given.gpus_per_node
    limits: dict[str, Any] = {given.gpu_resource: gpus} if gpus else {}
    if given.rdma_resource is not None:
        limits[given.rdma_resource] = given.rdma_per_node
    requests = {name: value for name, value in (("cpu", given.cpu), ("memory", given.memory)) if value is not None}
    spec_file = launch_directory(run_dir) / SPEC_FILE
    container: dict[str, Any] = {
        "name": "pytorch",  # Kubeflow's operator looks for this name
        "image": given.image,
        "command": ["python", "-m", "moetrain.launch.nodes.agent", in_a_word(spec_file)],
        "workingDir": given.mount,
        "ports": [{"name": "nodes", "containerPort": launch.master_port or DEFAULT_PORT}],
        "resources": {key: value for key, value in (("limits", limits), ("requests", requests)) if value},
        "volumeMounts": [{"name": "work", "mountPath": given.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if given.rdma_resource is not None:
        # registering memory with the network card needs it locked
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    if given.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": given.secret}}]
    return {
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": _SAVE_SECONDS,
            "containers": [container],
            "volumes": [
                {"name": "work", "persistentVolumeClaim": {"claimName": given.volume_claim}},
                # the 64 MiB that a container gets are too few for NCCL
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": given.shared_memory}},
            ],
        }
    }


def _of_pods(launch: LaunchConfig) -> dict[str, str]:
    """Of our environment, what is meant for the run and not for this machine; secrets come from launch.kubernetes."""
    here = handed_over(os.environ, export=launch.export or [])
    return {name: value for name, value in here.items() if name.startswith(("NCCL_", "UCX_", "GLOO_", "WANDB_MODE"))}
