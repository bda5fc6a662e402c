"""GPUs, and cores for each process, from a machine as /dev and sysfs describe it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain.launch.machine.cores import Core, bind, default_processes, read_cores, share_out, visible_gpus

# two sockets of four physical cores with two threads each, numbered as Intel does: siblings are 8 apart
CORES = [Core(number=n, numa=(n % 8) // 4, physical=n % 8) for n in range(16)]


def test_processes_get_whole_physical_cores_near_their_gpu() -> None:
    shares = share_out(CORES, processes=4, numa_of_process=[1, 1, 0, 0])
    assert shares == [[4, 5, 12, 13], [6, 7, 14, 15], [0, 1, 8, 9], [2, 3, 10, 11]]


def test_without_gpus_the_cores_are_shared_out_in_order() -> None:
    assert share_out(CORES, processes=2, numa_of_process=[]) == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]


def test_no_core_has_two_processes_and_all_get_as_many() -> None:
    for processes in range(1, 17):
        shares = share_out(CORES, processes=processes, numa_of_process=[])
        flat = [core for share in shares for core in share]
        assert len(flat) == len(set(flat))
        assert {len(share) for share in shares} == {16 // processes}


def test_more_processes_than_cores_of_a_node_take_all_cores() -> None:
    shares = share_out(CORES, processes=10, numa_of_process=[0] * 10)
    assert [len(share) for share in shares] == [1] * 10


def test_more_processes_than_cores_stay_unbound() -> None:
    assert share_out(CORES[:1], processes=2, numa_of_process=[]) == [[], []]


def test_cores_are_read_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3})
    for node, cores in (("node0", "0-1"), ("node1", "2,3")):
        (tmp_path / "devices/system/node" / node).mkdir(parents=True)
        (tmp_path / "devices/system/node" / node / "cpulist").write_text(f"{cores}\n")
    for core, siblings in ((0, "0,2"), (2, "0,2")):
        place = tmp_path / f"devices/system/cpu/cpu{core}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{siblings}\n")
    assert read_cores(tmp_path) == [
        Core(number=0, numa=0, physical=0),
        Core(number=2, numa=1, physical=0),
        Core(number=3, numa=1, physical=3),
    ]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_processes_are_bound_to_cores_of_their_own() -> None:
    usable = os.sched_getaffinity(0)
    count = min(2, len(usable))
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        bind([process.pid for process in processes])
        found = [os.sched_getaffinity(process.pid) for process in processes]
    finally:
        for process in processes:
            process.communicate()
    assert all(found)
    assert sum(map(len, found)) == len(set().union(*found)) <= len(usable)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 4), ("", 0), ("-1", 0), ("2", 1), ("0, 3", 2), ("0,9,1", 1), ("1,-1,2", 1), ("GPU-8a1f,GPU-77bc", 2)],
)
def test_visible_gpus_are_counted_as_cuda_does(visible: str | None, expected: int) -> None:
    files = ["nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"]
    assert visible_gpus(files, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_a_machine_without_gpus_has_none_whatever_is_asked_for() -> None:
    assert visible_gpus(["null", "nvidia-caps"], {"CUDA_VISIBLE_DEVICES": "0,1"}) == 0


@pytest.mark.parametrize(("files", "expected"), [(["nvidia0", "nvidia1", "nvidia2", "nvidiactl"], 3), (["null"], 2)])
def test_a_machine_gets_a_process_per_gpu_or_two(
    monkeypatch: pytest.MonkeyPatch, files: list[str], expected: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "listdir", {"/dev": files}.__getitem__)
    assert default_processes() == expected
