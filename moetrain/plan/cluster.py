"""A cluster as data: what its file in ``configs/cluster`` says, checked."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from moetrain.config.freeze import config_directory, freeze_section
from moetrain.errors import ConfigError

GB = 1e9
CALIBRATED = ("a100", "h100")
"""Generations of GPUs that ``plan/published.yaml`` has runs on."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One kind of node and what joins them. Rates are peaks, as datasheets print them; GB are 10^9 bytes."""

    gpu: str = ""
    """What one device is called."""
    device_name: str | None = None
    """What PyTorch calls it, as a regular expression of the whole name; null: no run is known to be on it by that."""
    device: str = "cuda"
    """cuda or cpu: they keep different activations."""
    calibrated_on: str | None = None
    """a100 or h100: the published runs that tell the share of its peak; null: ``efficiency`` tells it."""
    efficiency: float | None = None
    """Share of the peak that matrix products reach. null: from the published runs."""
    gpus_per_node: int = 0
    """Devices of a node."""
    memory_gb: float = 0.0
    """Memory of one device."""
    bf16_tflops: float = 0.0
    """Dense peak in bf16, 10^12 FLOP/s."""
    fp32_tflops: float = 0.0
    """Dense peak in fp32, which PyTorch uses for fp32 unless told otherwise."""
    memory_gb_per_second: float = 0.0
    """Rate of the device's memory."""
    nvlink_gb_per_second: float = 0.0
    """From one device to the others of its node, one direction."""
    network_gb_per_second: float = 0.0
    """From one device to other nodes, one direction: its share of the node's ports."""
    host_memory_gb: float = 0.0
    """Memory of a node outside its devices; offloaded optimizers live there."""
    host_link_gb_per_second: float = 0.0
    """Between a device and the host's memory, one direction."""
    watts_per_gpu: float | None = None
    """Power of one device with its share of the node; null: no energy is worked out."""
    hours_between_failures: float = 0.0
    """Mean time between failures that stop a run, for one device with its share of the node."""
    storage_gb_per_second: float = 0.0
    """What one node writes to storage when all write."""
    price_per_gpu_hour: float | None = None
    """null: no cost is worked out."""
    currency: str = "USD"
    """Of the price."""

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of one device in bf16 or fp32."""
        return (self.bf16_tflops if dtype == "bf16" else self.fp32_tflops) * 1e12

    @property
    def memory_bytes(self) -> float:
        """Memory of one device."""
        return self.memory_gb * GB


def read_cluster(settings: dict[str, Any], *, name: str) -> Cluster:
    """Check the settings of a cluster's file.

    Args:
        settings: as composed.
        name: the file, for messages.

    Raises:
        ConfigError: every missing or unknown entry, every number that is not above 0.
    """
    fields = dataclasses.fields(Cluster)
    optional = {
        "device",
        "device_name",
        "calibrated_on",
        "efficiency",
        "watts_per_gpu",
        "price_per_gpu_hour",
        "currency",
    }
    where = f"cluster {name}"
    problems = [
        f"{where}: '{field.name}' is missing: give it a value, as configs/cluster/h100_ib.yaml does"
        for field in fields
        if field.name not in settings and field.name not in optional
    ]
    try:
        cluster = freeze_section(Cluster, settings)
    except ConfigError as error:
        raise ConfigError(problems + [f"{where}: {problem}" for problem in error.problems]) from None
    for field in fields:
        value = settings.get(field.name)
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            problems.append(f"{where}: '{field.name}' is {value}, but must be above 0 and finite")
    for name_of, allowed in (("device", ("cuda", "cpu")), ("calibrated_on", (*CALIBRATED, None))):
        if getattr(cluster, name_of) not in allowed:
            shown = ", ".join("null" if each is None else each for each in allowed)
            problems.append(f"{where}: '{name_of}' is {getattr(cluster, name_of)!r}, but must be one of {shown}")
    if cluster.calibrated_on is None and cluster.efficiency is None:
        problems.append(
            f"{where}: 'calibrated_on' and 'efficiency' are both null, but one must tell the share of the peak"
        )
    if cluster.efficiency is not None and cluster.efficiency > 1:
        problems.append(f"{where}: 'efficiency' is {cluster.efficiency}, but must be at most 1")
    if problems:
        raise ConfigError(problems)
    return cluster


def known_clusters() -> dict[str, Cluster]:
    """The clusters that moetrain ships, by the name of their file."""
    paths = sorted((config_directory() / "cluster").glob("*.yaml"))
    return {path.stem: read_cluster(yaml.safe_load(path.read_text(encoding="utf-8")), name=path.stem) for path in paths}


def of_device(clusters: Mapping[str, Cluster], *, device: str, device_name: str) -> str | None:
    """The first cluster with such a device; None: there is none.

    Args:
        device: cuda or cpu.
        device_name: as ``torch.cuda.get_device_name`` has it; any for a CPU.
    """
    for name, cluster in clusters.items():
        is_named = cluster.device_name is not None and re.fullmatch(cluster.device_name, device_name)
        if cluster.device == device and (device == "cpu" or is_named):
            return name
    return None
