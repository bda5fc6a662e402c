"""Which settings may change between two starts of one run, and which runs are twins."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from moetrain.config.checks import resolve
from moetrain.config.freeze import flatten, freeze, setting_names, to_dict
from moetrain.config.identity import differences, is_fixed, training_digest
from moetrain.config.schema import RunConfig

RUN = resolve(freeze({"name": "a"}), default_processes=2)


def changed(name: str, value: Any) -> RunConfig:
    settings = to_dict(RUN)
    *sections, last = name.split(".")
    place = settings
    for section in sections:
        place = place[section]
    place[last] = value
    return freeze(settings)


FREE = {
    "name", "run_dir", "model.dtype", "data.name", "data.prepared", "batch.micro_batch",
    "prepare.workers", "prepare.fast_encoder", "preflight",
    *(name for name in setting_names()
      if name.startswith(("optim.", "schedule.", "parallel.", "launch.", "checkpoint.", "resume.", "evaluate.",
                          "watch.", "log."))),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(flatten(to_dict(RUN))))
def test_weights_and_data_order_are_fixed_and_the_rest_is_free(name):
    assert is_fixed(name) == (name not in FREE)


def test_equal_runs_have_no_differences():
    assert differences(RUN, RUN) == {}


def test_a_difference_has_both_values():
    assert differences(RUN, changed("optim.lr", 0.5)) == {"optim.lr": (RUN.optim.lr, 0.5)}


def test_differences_are_in_the_order_of_the_alphabet():
    now = replace(changed("optim.lr", 0.5), seed=2, name="b")
    assert list(differences(RUN, now)) == ["name", "optim.lr", "seed"]


def test_to_become_dense_or_sparse_is_one_difference_and_fixed():
    dense, moe = changed("model.moe", None), to_dict(RUN)["model"]["moe"]
    assert differences(RUN, dense) == {"model.moe": (moe, None)}
    assert differences(dense, RUN) == {"model.moe": (None, moe)}
    assert differences(dense, dense) == {}
    assert is_fixed("model.moe")


def test_another_number_of_experts_is_a_difference_of_its_own():
    assert differences(RUN, changed("model.moe.num_experts", 4)) == {"model.moe.num_experts": (8, 4)}


TWINS = {
    "dense": ("model.moe", None),
    "other experts": ("model.moe.num_experts", 64),
    "another micro-batch": ("batch.micro_batch", 2),
    "another expert_parallel": ("parallel.expert_parallel", 1),
    "another ZeRO stage": ("parallel.zero_stage", 2),
    "other processes": ("launch.processes", 8),
    "another name": ("name", "b"),
    "another directory": ("run_dir", "elsewhere"),
    "other saves": ("checkpoint.every_steps", 7),
    "other evaluations": ("evaluate.every_steps", 7),
    "another log": ("log.wandb", "off"),
    "data made elsewhere": ("data.prepared", "/elsewhere"),
    "data under another name": ("data.name", "b"),
}
STRANGERS = {
    "seed": 2, "model.d_model": 128, "model.dtype": "bf16", "model.context": 512, "data.text": ["b.txt"],
    "data.held_out": 0.1, "data.tokenizer": "t.json", "data.text_column": "body", "batch.global_batch": 32,
    "batch.sequence_length": 128, "optim.lr": 0.5, "optim.weight_decay": 0.0, "schedule.steps": 7,
    "schedule.kind": "linear", "schedule.warmup_steps": 0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), TWINS.values(), ids=TWINS)
def test_twins_have_one_digest(name, value):
    assert training_digest(changed(name, value)) == training_digest(RUN)


@pytest.mark.parametrize("name", STRANGERS)
def test_what_changes_the_training_changes_the_digest(name):
    assert training_digest(changed(name, STRANGERS[name])) != training_digest(RUN)


def test_the_digest_is_the_same_in_another_process():
    """It is a key of the recorded results: hash() with its random seed would not do."""
    code = (
        "from moetrain.config import checks, freeze, identity; "
        "print(identity.training_digest(checks.resolve(freeze.freeze({'name': 'a'}), default_processes=2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == training_digest(RUN)
