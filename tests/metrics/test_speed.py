from __future__ import annotations

import pytest

from moetrain.metrics.speed import Pace, Speed, peak_flops


def test_mfu_is_the_share_of_all_devices_peaks() -> None:
    # 8 devices of 100 FLOP/s; 50 tokens of 6 FLOPs in 2 s: 150 of 800 FLOP/s.
    pace = Speed(flops_per_token=6, peak_flops=100.0, world_size=8).update(50, seconds=2.0)
    assert pace == Pace(tokens_per_second=25.0, flops_per_second=150.0, mfu=0.1875)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    assert Speed(flops_per_token=6, peak_flops=None, world_size=2).update(10, seconds=1.0).mfu is None


# Expected: the datasheets' numbers as printed, with sparsity where only that is printed, hence halved here.
@pytest.mark.parametrize(
    ("name", "dtype", "printed_tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 624 / 2),
        ("NVIDIA A100-SXM4-40GB", "tf32", 312 / 2),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("A100-PCIE-40GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 1979 / 2),
        ("NVIDIA H100 PCIe", "bf16", 1513 / 2),
        ("NVIDIA H100 NVL", "bf16", 1671 / 2),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H200", "bf16", 1979 / 2),
        ("NVIDIA H200 NVL", "tf32", 835 / 2),
        ("NVIDIA B200", "bf16", 4500 / 2),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 330.4 / 2),
    ],
)
def test_peaks_are_the_datasheets_without_sparsity(name: str, dtype: str, printed_tflops: float) -> None:
    assert peak_flops(name, dtype) == pytest.approx(printed_tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA L40",
        "Tesla V100-SXM2-32GB",
        "cpu",
        "",
    ],
)
def test_a_device_that_only_resembles_one_in_the_table_is_unknown(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_an_unknown_type_has_no_peak() -> None:
    assert peak_flops("NVIDIA H200", "fp8") is None
