"""Tests on hosts and on a SLURM made for them; ``make test-cluster`` runs them, the ordinary suite leaves them out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import two_hosts, two_node_slurm
from moetrain.sources.text import expand, read_documents

SETTINGS = [
    "data.text=corpus.jsonl", "data.held_out=0.2", "model.vocab_size=512", "model.context=32", "model.num_layers=2",
    "model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.moe.d_expert=32", "model.moe.num_experts=4",
    "batch.global_batch=8", "schedule.kind=constant", "schedule.warmup_steps=4", "optim.lr=3e-3",
    "evaluate.every_steps=null", "evaluate.max_sequences=16", "log.every_steps=1", "log.wandb=off",
]  # fmt: skip
LIMIT_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """A working directory with a small corpus of real text."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "TORCH_EXTENSIONS_DIR": str(self.directory / "torch_extensions"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DS_ACCELERATOR": "cpu",
        }

    def words(self, verb: str, *words: str) -> list[str]:
        return [sys.executable, "-m", "moetrain.cli", verb, *words]

    def train(self, name: str, *overrides: str) -> list[str]:
        return self.words("train", f"name={name}", *SETTINGS, *overrides)

    def call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.directory, env=self.environment | environment, capture_output=True,
                              text=True, timeout=LIMIT_SECONDS)  # fmt: skip

    def run_dir(self, name: str) -> Path:
        return self.directory / "runs" / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir(name) / "metrics.jsonl"
        # a last line may be half written while the run goes on
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def losses(self, name: str) -> list[float]:
        return [loss for line in self.metrics(name) for loss in line.get("step_losses", [])]

    def step(self, name: str) -> int:
        return max((line["step"] for line in self.metrics(name)), default=0)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("place")
    documents = read_documents(expand(["builtin:sotu"]), text_column="text")
    rows = [json.dumps({"text": next(documents)[:3000]}) for _ in range(30)]
    (directory / "corpus.jsonl").write_text("\n".join(rows))
    return Place(directory)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_hosts.Hosts]:
    if reason := two_hosts.missing():
        pytest.skip(reason)
    with two_hosts.Hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_node_slurm.Slurm]:
    if reason := two_node_slurm.missing():
        pytest.skip(reason)
    with two_node_slurm.Slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    def wait(holds: Callable[[], object], *, seconds: float = LIMIT_SECONDS, what: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, what()
            time.sleep(0.2)

    return wait
