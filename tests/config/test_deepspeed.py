"""What the engine is told; tests/golden has all of it for each preset."""

from __future__ import annotations

from typing import Any

import pytest

from moetrain.config.deepspeed import deepspeed_config


def config(**settings: Any) -> dict[str, Any]:
    defaults = {"micro_batch": 2, "accumulation": 3, "world_size": 4, "zero_stage": 1, "dtype": "fp32", "clip": 0.5}
    return deepspeed_config(**(defaults | settings))


def test_the_batch_is_that_of_all_ranks_and_micro_batches() -> None:
    assert config()["train_batch_size"] == 2 * 3 * 4


@pytest.mark.parametrize(("zero_stage", "clip"), [(0, 0.0), (1, 0.5), (2, 0.5), (3, 0.5)])
def test_clipping_is_written_out_and_ours_at_stage_0(zero_stage: int, clip: float) -> None:
    assert config(zero_stage=zero_stage)["gradient_clipping"] == clip


@pytest.mark.parametrize("offload", [False, True])
def test_the_optimizer_is_offloaded_to_the_host_or_not_at_all(offload: bool) -> None:
    found = config(zero_stage=3, offload_optimizer=offload)
    assert found["zero_optimization"]["offload_optimizer"] == (
        {"device": "cpu", "pin_memory": True} if offload else None
    )
    assert found["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed's own would compile at run time"


def test_torchs_linear_function_is_left_alone() -> None:
    assert config(zero_stage=3)["zero_optimization"]["memory_efficient_linear"] is False
