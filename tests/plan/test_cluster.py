"""A cluster's file: ours are sound, and a wrong one is told entry by entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.compose import compose_file, presets
from moetrain.errors import ConfigError
from moetrain.metrics.speed import peak_flops
from moetrain.plan.cluster import Cluster, known_clusters, of_device, read_cluster

OURS = sorted(presets("cluster"))


def read(name: str, *overrides: str, config_dir: Path | None = None) -> Cluster:
    return read_cluster(compose_file("cluster", name, overrides=overrides, config_dir=config_dir), name=name)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "cluster").mkdir()
    return tmp_path


def refused(config_dir: Path, text: str) -> str:
    (config_dir / "cluster" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as told:
        read("mine", config_dir=config_dir)
    return str(told.value)


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_ours_is_whole_and_tells_its_sources(name: str) -> None:
    assert read(name).gpus_per_node >= 1
    head = (Path(__file__).parents[2] / "configs" / "cluster" / f"{name}.yaml").read_text()
    assert "Source: " in head
    assert "assumption" in head, "a price is nobody's fact"


@pytest.mark.parametrize("name", [name for name in OURS if name != "cpu"])
def test_the_plan_and_the_meter_of_a_run_go_by_one_peak(name: str) -> None:
    """So the device's name is one that PyTorch gives, as the table of peaks has it."""
    cluster = read(name)
    for dtype in ("bf16", "fp32"):
        assert cluster.peak_flops(dtype) == peak_flops(str(cluster.device_name), dtype)


@pytest.mark.parametrize(
    ("name", "cluster"),
    [("NVIDIA H100 80GB HBM3", "h100_ib"), ("NVIDIA H100 PCIe", None), ("NVIDIA H200", "h200_ib"),
     ("NVIDIA A100-SXM4-40GB", "a100_40_ib"), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)],
)  # fmt: skip
def test_a_run_is_on_the_cluster_of_its_device(name: str, cluster: str | None) -> None:
    assert of_device(known_clusters(), device="cuda", device_name=name) == cluster


def test_a_cpu_is_known_by_its_kind() -> None:
    assert of_device(known_clusters(), device="cpu", device_name="") == "cpu"


def test_an_entry_is_set_from_the_command_line() -> None:
    assert read("h100_ib", "cluster.price_per_gpu_hour=2.25").price_per_gpu_hour == 2.25


def test_a_file_of_the_users_own_is_found(mine: Path) -> None:
    ours = (Path(__file__).parents[2] / "configs" / "cluster" / "h100_ib.yaml").read_text()
    (mine / "cluster" / "mine.yaml").write_text(ours.replace("gpus_per_node: 8", "gpus_per_node: 4"))
    assert read("mine", config_dir=mine).gpus_per_node == 4


def test_a_file_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'cluster=h100' is not there: .*did you mean 'h100_ib'"):
        read("h100")


def test_everything_wrong_with_a_file_is_told_at_once(mine: Path) -> None:
    told = refused(mine, "gpu: mine\nmemory_gb: many\nbf16_tflops: -1\nspeed: 3\n")
    assert "'memory_gb' is 'many', but must be a number" in told
    assert "'speed' is not a setting" in told
    assert "'gpus_per_node' is missing" in told
    assert "cluster mine" in told


@pytest.mark.parametrize("text", ["", "- 1\n", "gpu: [x\n", "just text\n"])
def test_a_file_that_holds_no_settings_is_told(mine: Path, text: str) -> None:
    assert "mine" in refused(mine, text)


@pytest.mark.parametrize(
    "override", ["cluster.memory_gb=-80", "cluster.gpus_per_node=0", "cluster.price_per_gpu_hour=inf"]
)
def test_a_number_that_cannot_be_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="must be above 0 and finite"):
        read("h100_ib", override)


@pytest.mark.parametrize("override", ["cluster.price=3", "+cluster.price=3", "~cluster.gpu", "cluster.memory_gb=1,2"])
def test_an_override_of_what_is_not_there_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        read("h100_ib", override)
