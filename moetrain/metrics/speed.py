"""How fast: tokens per second, FLOP/s, and the share of the hardware's peak (MFU)."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Peak rates in TFLOP/s, dense: datasheets print tensor-core rates "with sparsity", twice as much. fp32 is that of the
# CUDA cores, which PyTorch uses unless told otherwise; tf32 that of the tensor cores, for runs that allow it
# (torch.backends.cuda.matmul.allow_tf32). The whole name must match: a GH200, a laptop's RTX 4090 or a MIG slice of an
# A100 is another device.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA A100 Tensor Core GPU datasheet (June 2021): SXM and PCIe alike.
    (r"A100-(SXM4|SXM|PCIE)-(40|80)GB|A100 80GB PCIe", {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    # NVIDIA H100 Tensor Core GPU datasheet: H100 SXM, 1,979 and 989 with sparsity.
    (r"H100 80GB HBM3|H100 SXM5?( 80GB)?", {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    # The same, its edition with the PCIe card: 1,513 and 756 with sparsity.
    (r"H100 PCIe", {"bf16": 756.5, "tf32": 378, "fp32": 51}),
    # The same, H100 NVL: 1,671 and 835 with sparsity.
    (r"H100 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    # NVIDIA H200 Tensor Core GPU datasheet: H200 SXM, 1,979 and 989 with sparsity; H200 NVL, 1,671 and 835.
    (r"H200", {"bf16": 989.5, "tf32": 494.5, "fp32": 67}),
    (r"H200 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    # NVIDIA Blackwell datasheet (GB200 NVL72 and HGX B200), one GPU of HGX B200: 4.5 and 2.2 PFLOP/s with sparsity.
    (r"B200", {"bf16": 2250, "tf32": 1100, "fp32": 75}),
    # NVIDIA L40S datasheet, which prints both: 362.05 | 733 and 183 | 366.
    (r"L40S", {"bf16": 362.05, "tf32": 183, "fp32": 91.6}),
    # NVIDIA Ada GPU architecture whitepaper, appendix A, with FP32 accumulation.
    (r"GeForce RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast the run was over some steps."""

    tokens_per_second: float
    """Over all ranks."""
    flops_per_second: float
    """Model FLOPs (forward and backward, active parameters, nothing recomputed) a second, over all ranks."""
    mfu: float | None
    """Model FLOPs utilization (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): flops_per_second over the peak of
    all devices, in [0, 1]. None when the peak is not known."""


@dataclass(frozen=True)
class Speed:
    """Turns tokens and seconds into a pace."""

    flops_per_token: int
    """Model FLOPs of one token, forward and backward."""
    peak_flops: float | None
    """FLOP/s of one device at its best; None: not known."""
    world_size: int
    """Devices at work."""

    def update(self, tokens: int, seconds: float) -> Pace:
        """The pace of the stretch just behind us.

        Args:
            tokens: trained on in it, over all ranks.
            seconds: how long it took; more than 0.
        """
        tokens_per_second = tokens / seconds
        flops_per_second = tokens_per_second * self.flops_per_token
        mfu = None if self.peak_flops is None else flops_per_second / (self.peak_flops * self.world_size)
        return Pace(tokens_per_second=tokens_per_second, flops_per_second=flops_per_second, mfu=mfu)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, by its datasheet; None for a device or type that is not in the table.

    Args:
        device_name: as ``torch.cuda.get_device_name`` has it, such as "NVIDIA H100 80GB HBM3".
        dtype: bf16, fp32, or tf32 for fp32 that may use the tensor cores.
    """
    name = device_name.removeprefix("NVIDIA ")
    for pattern, tflops in _PEAK_TFLOPS:
        if re.fullmatch(pattern, name):
            return tflops[dtype] * 1e12 if dtype in tflops else None
    return None
