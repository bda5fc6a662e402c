"""What others have measured: the share of the peak that matrix products reach is calibrated on it, not guessed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moetrain.config.freeze import freeze_section
from moetrain.config.schema import ModelConfig, RunConfig
from moetrain.errors import DataError
from moetrain.plan.cluster import Cluster, known_clusters, of_device
from moetrain.plan.layout import Layout
from moetrain.plan.memory.device import IMBALANCE, Memory, memory_of
from moetrain.plan.time import Conditions, StepTime, step_time

RUNS_FILE = Path(__file__).with_name("published.yaml")
PLAN_FILE = "plan.json"
"""In the directory of a run: an ``Expectation`` and what was measured."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One published run."""

    name: str
    cluster: str
    """The file of its hardware."""
    source: str
    model: ModelConfig
    layout: Layout
    sequence_length: int
    overlap: float
    measured: float
    """Tokens per second and GPU."""
    imbalance: float = 1.0
    """Rows at the fullest device over the mean; benchmarks force an even load."""
    note: str = ""
    mask_documents: bool = False
    """Whether attention stays within a document."""
    memory_bytes: float | None = None
    """Peak on the fullest device, where it is known."""

    @property
    def is_sparse(self) -> bool:
        return self.model.moe is not None

    def time(self, cluster: Cluster, *, efficiency: float) -> StepTime:
        """Its step, predicted."""
        conditions = Conditions(efficiency=efficiency, imbalance=self.imbalance, overlap=self.overlap)
        return step_time(self.model, self.layout, cluster, sequence_length=self.sequence_length, conditions=conditions)

    def planned_memory(self, device: str) -> Memory:
        """What a device of it holds, planned."""
        return memory_of(
            self.model,
            self.layout,
            sequence_length=self.sequence_length,
            mask_documents=self.mask_documents,
            device=device,
        )

    def predicted(self, cluster: Cluster, *, efficiency: float) -> float:
        """Tokens per second and GPU."""
        tokens = self.layout.micro_batch * self.layout.accumulation * self.sequence_length
        return tokens / self.time(cluster, efficiency=efficiency).total


def published_runs() -> list[Run]:
    """The runs of ``published.yaml``."""
    return [_run(entry) for entry in yaml.safe_load(RUNS_FILE.read_text(encoding="utf-8"))]


def calibrate(runs: Iterable[Run], clusters: Mapping[str, Cluster]) -> float:
    """The efficiency at which half of ``runs`` are predicted too fast and half too slow: one odd run does not pull it.

    Args:
        clusters: file name -> cluster, for every run.
    """
    chosen = list(runs)

    def bias(efficiency: float) -> float:
        logs = [math.log(r.predicted(clusters[r.cluster], efficiency=efficiency) / r.measured) for r in chosen]
        return statistics.median(logs)

    low, high = 0.02, 1.0
    if bias(high) <= 0:
        return high
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bias(middle) < 0 else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the plan says of a run, to be held against what it measures."""

    cluster: str | None
    """The file whose device it runs on; None: there is no such file."""
    device: str
    """cuda or cpu."""
    memory_bytes: float
    """On the fullest device, at the fullest moment of a step."""
    step_seconds: float | None
    """None: no cluster, no time."""


def layout_of(run: RunConfig) -> Layout:
    """The layout of a resolved run."""
    gpus, micro_batch = run.launch.world_size, run.batch.micro_batch or 1
    return Layout(
        gpus=gpus,
        expert_parallel=run.parallel.expert_parallel or 1,
        zero_stage=run.parallel.zero_stage,
        recompute=run.parallel.recompute,
        offload_optimizer=run.parallel.offload_optimizer,
        micro_batch=micro_batch,
        accumulation=run.batch.global_batch // (micro_batch * gpus),
    )


def efficiency_on(cluster: Cluster, clusters: Mapping[str, Cluster]) -> float:
    """Share of the peak that matrix products reach: what the cluster says, else that of the published runs.

    Args:
        clusters: file name -> cluster, for every published run.
    """
    if cluster.efficiency is not None:
        return cluster.efficiency
    alike = [run for run in published_runs() if clusters[run.cluster].calibrated_on == cluster.calibrated_on]
    return calibrate(alike, clusters)


def expect(run: RunConfig, *, device: str, device_name: str) -> Expectation:
    """What ``moetrain plan`` would say of a run's layout on the machine it runs on.

    Args:
        run: resolved.
        device: cuda or cpu.
        device_name: as ``torch.cuda.get_device_name`` has it; any for a CPU.
    """
    layout, length, clusters = layout_of(run), run.sequence_length, known_clusters()
    name = of_device(clusters, device=device, device_name=device_name)
    seconds = None
    if name is not None:
        conditions = Conditions(efficiency=efficiency_on(clusters[name], clusters), imbalance=(1 + IMBALANCE) / 2)
        seconds = step_time(run.model, layout, clusters[name], sequence_length=length, conditions=conditions).total
    memory = memory_of(run.model, layout, sequence_length=length, mask_documents=run.data.mask_documents, device=device)
    return Expectation(cluster=name, device=device, memory_bytes=memory.total, step_seconds=seconds)


def own_run(run: RunConfig, lines: Sequence[Mapping[str, Any]], *, cluster: str) -> Run:
    """A run of ours as one to compare with, and to calibrate on.

    Args:
        run: resolved, as in its run.yaml.
        lines: of its metrics.jsonl.
        cluster: the file of the hardware it ran on.

    Raises:
        DataError: the run has logged no speed after its first line, which holds the start.
    """
    steps = [line for line in lines if line.get("tokens_per_second")][1:]
    if not steps:
        raise DataError(f"{run.run_dir} has logged no two stretches of steps yet: let it run on")
    layout = layout_of(run)
    skews = [_skew(line["load"], devices=layout.expert_parallel) for line in steps if line.get("load")]
    return Run(
        name=str(run.run_dir),
        cluster=cluster,
        source=str(run.run_dir),
        model=run.model,
        layout=layout,
        sequence_length=run.sequence_length,
        mask_documents=run.data.mask_documents,
        overlap=0.0,
        measured=statistics.median(line["tokens_per_second"] for line in steps) / layout.gpus,
        imbalance=statistics.median(skews) if skews else 1.0,
        memory_bytes=max((line["peak_memory_gb"] * 1e9 for line in steps if line.get("peak_memory_gb")), default=None),
    )


def _skew(share_LE: Sequence[Sequence[float]], *, devices: int) -> float:
    """Rows at the fullest of the devices over the mean, on average over the layers: each layer waits for its own."""
    fullest = []
    for share_E in share_LE:
        each = len(share_E) // devices
        held = [
            math.fsum(share or 0.0 for share in share_E[rank * each : (rank + 1) * each]) for rank in range(devices)
        ]
        fullest.append(max(held) * devices)
    return statistics.fmean(fullest)


def alike(run: Run, others: Sequence[Run], clusters: Mapping[str, Cluster]) -> list[Run]:
    """The runs to calibrate on for one of them: others, on the same generation of GPUs."""
    kind = clusters[run.cluster].calibrated_on
    return [other for other in others if other is not run and clusters[other.cluster].calibrated_on == kind]


def _run(entry: dict[str, Any]) -> Run:
    model = freeze_section(ModelConfig, {"dtype": "bf16", **entry["model"]})
    return Run(**{**entry, "model": model, "layout": Layout(**entry["layout"])})
