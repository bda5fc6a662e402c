"""The engine's configuration, as DeepSpeed's JSON.

Every key that this project depends on is written out: some defaults, such as clipping at 1.0 when no clipping was asked
for, would change the training.
"""

from __future__ import annotations

from typing import Any

BUCKET_ELEMENTS = 50_000_000
LIVE_ELEMENTS = 1_000_000_000
KEPT_WHOLE_ELEMENTS = 100_000
"""At ZeRO 3, weights of at most this many elements stay on every rank: gathering them costs more than keeping them."""


def deepspeed_config(
    *,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    zero_stage: int,
    dtype: str,
    clip: float,
    offload_optimizer: bool = False,
) -> dict[str, Any]:
    """The whole configuration of the engine.

    At stage 0 clipping is ours: DeepSpeed 0.19 averages the norms of ranks that hold different experts.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": clip if zero_stage > 0 else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_allreduce_op": "mean",
        "bf16": {"enabled": dtype == "bf16", "immediate_grad_update": True, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "round_robin_gradients": False,
            "compute_grad_norm": True,
            "offload_optimizer": {"device": "cpu", "pin_memory": True} if offload_optimizer else None,
            "sub_group_size": LIVE_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            "stage3_max_live_parameters": LIVE_ELEMENTS,
            "stage3_max_reuse_distance": LIVE_ELEMENTS,
            "stage3_param_persistence_threshold": KEPT_WHOLE_ELEMENTS,
            # it would replace torch's linear function for the whole process, by one that rounds biases in bf16
            "memory_efficient_linear": False,
        },
        # the optimizer is torch's fused AdamW: it needs no compiler at run time, and is not on DeepSpeed's list
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "use_data_before_expert_parallel_": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "flops_profiler": {"enabled": False},
    }
