"""A whole benchmark: find the device, measure, describe the machine."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable
from dataclasses import asdict

import torch

from moetrain.bench import layer, step
from moetrain.bench.settings import PACKAGES, LayerSettings, StepSettings, missing
from moetrain.bench.timing import Report
from moetrain.errors import ConfigError
from moetrain.metrics.console import WorkBar
from moetrain.parallel.host import keep_freed_memory


def run(settings: LayerSettings | StepSettings) -> Report:
    """Measure with a progress bar on stderr.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    device = find_device(settings.device)
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    load_before = _load()
    total = layer.runs(settings) if isinstance(settings, LayerSettings) else step.runs(settings)
    remarks: list[str] = []
    with WorkBar("bench", total=total, unit="runs", stderr=True) as bar:
        tick = _ticker(bar)
        if isinstance(settings, LayerSettings):
            rows = layer.bench_layer(settings, device=device, tick=tick)
        else:
            rows, remarks = step.bench_step(settings, device=device, tick=tick)
        bar.advance_to(total, note="")
    gone = missing(settings)
    remarks += [f"{name} is not installed, and its rows are left out: {how}" for name, how in gone.items()]
    about = _about(device) | {"load": f"{load_before} before, {_load()} after", "settings": asdict(settings)}
    return Report(title=_title(settings), about=about, rows=rows, remarks=remarks)


def find_device(name: str) -> torch.device:
    """The device that a setting names.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["device is 'cuda', but torch sees no CUDA GPU here: use device=cpu"])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _ticker(bar: WorkBar) -> Callable[[str], None]:
    done = itertools.count()
    return lambda name: bar.advance_to(next(done), note=name)


def _title(settings: LayerSettings | StepSettings) -> str:
    if isinstance(settings, LayerSettings):
        return (
            f"MoE layer, forward and backward: {settings.tokens:,} tokens, d_model {settings.d_model}, "
            f"{settings.d_ff:,} hidden units active per token; {settings.repeats} turns, after two to warm up"
        )
    return (
        f"training step, forward, backward and fused AdamW: {settings.batch} x {settings.sequence} tokens, "
        f"{settings.layers} blocks, d_model {settings.d_model}, {settings.heads} heads, vocabulary {settings.vocab:,}, "
        f"{settings.d_ff:,} hidden units active per token; {settings.repeats} turns, after two to warm up"
    )


def _about(device: torch.device) -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = {"threads": str(torch.get_num_threads()), "cores": str(os.cpu_count())}
    return versions | {"device": f"{device.type} ({where})"} | threads


def _load() -> str:
    """The machine's load average over the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
