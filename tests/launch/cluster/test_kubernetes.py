"""The manifests, held against the schema of JobSet, PyTorchJob and the core types of their pods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from moetrain.config.launch.settings import KubernetesConfig, LaunchConfig
from moetrain.errors import ConfigError
from moetrain.launch.cluster.kubernetes import job_name, manifest_text, write
from moetrain.launch.nodes.spec import SPEC_FILE, from_word, read_spec

SCHEMA = json.loads((Path(__file__).parents[1] / "kubernetes.schema.json").read_text())
LAUNCH = LaunchConfig(
    kind="kubernetes",
    nodes=3,
    processes=8,
    kubernetes=KubernetesConfig(image="registry.example/moetrain:1", volume_claim="work", rdma_resource="rdma/hca",
                                rdma_per_node=8, secret="keys", cpu="64", memory="900Gi"),
)  # fmt: skip


def manifest(run_dir: Path, **settings: Any) -> dict[str, Any]:
    launch = replace(LAUNCH, kubernetes=replace(LAUNCH.kubernetes, **settings))
    content: dict[str, Any] = yaml.safe_load(manifest_text(run_dir, launch))
    return content


def check(content: dict[str, Any]) -> None:
    jsonschema.validate(content, {**SCHEMA, "$ref": f"#/$defs/{content['kind']}"})


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
@pytest.mark.parametrize("settings", [{}, {"rdma_resource": None, "secret": None, "cpu": None, "gpus_per_node": 0}])
def test_a_manifest_fits_the_schema(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    content = manifest(tmp_path / "my run", manifest=kind, **settings)
    check(content)
    assert content["metadata"]["name"] == "my-run"


def test_the_schema_refuses_what_is_not_there(tmp_path: Path) -> None:
    content = manifest(tmp_path / "run")
    job = content["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        check(content)


def test_a_jobset_has_a_pod_for_each_node_with_its_devices(tmp_path: Path) -> None:
    job = manifest(tmp_path / "run")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (3, 3, "Indexed")
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/hca": 8}
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}} in job["template"]["spec"]["volumes"]


def test_a_pytorchjob_has_a_master_and_the_other_nodes_as_workers(tmp_path: Path) -> None:
    replicas = manifest(tmp_path / "run", manifest="pytorchjob")["spec"]["pytorchReplicaSpecs"]
    assert {name: each["replicas"] for name, each in replicas.items()} == {"Master": 1, "Worker": 2}
    assert all(each["template"]["spec"]["containers"][0]["name"] == "pytorch" for each in replicas.values())


def test_the_agents_find_what_was_written(tmp_path: Path) -> None:
    launch = replace(LAUNCH, kubernetes=replace(LAUNCH.kubernetes, mount=str(tmp_path)))
    outcome = write(tmp_path / "run", launch)
    assert "kubectl apply -f" in outcome.queued
    content = yaml.safe_load((tmp_path / "run/launch/kubernetes.yaml").read_text())
    job = content["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec_file = from_word(job["template"]["spec"]["containers"][0]["command"][-1])
    assert spec_file == tmp_path / "run/launch" / SPEC_FILE
    spec = read_spec(spec_file)
    assert (spec.nodes, spec.processes, spec.master_addr) == (3, 8, "run-node-0-0.run")
    assert spec.unattended


def test_a_run_outside_the_volume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must lie below launch\.kubernetes\.mount, /work"):
        write(tmp_path / "run", LAUNCH)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("A_b.c", "a-b-c"), ("7b", "run-7b"), ("x" * 80, "x" * 40), ("é", "run")]
)
def test_a_name_becomes_one_that_kubernetes_takes(name: str, expected: str) -> None:
    assert job_name(Path(name)) == expected
