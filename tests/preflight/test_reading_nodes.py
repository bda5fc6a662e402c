"""What is read of a node: recorded machines in, facts out; and nothing made up where there is nothing to read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from recorded import recorded

from moetrain.preflight.seen.facts import Found, NodeFacts, StaleLock, node_of_json, read_found, to_json, write_found
from moetrain.preflight.seen.read import Host, read_facts, run_command, this_host

NOTHING = Host(root=Path("/nowhere"), run=lambda words: None, environment={}, name="bare")


def facts_of(host: Host, place: Path) -> NodeFacts:
    return read_facts(host, node=0, place=place, versions={"torch": "2.12.0", "cuda": "12.8", "nccl": "2.27.3"})


@pytest.fixture
def h100(tmp_path: Path) -> NodeFacts:
    return facts_of(recorded("h100_node", tmp_path), tmp_path)


def test_gpus_are_read_as_nvidia_smi_tells_them(h100):
    assert h100.gpus is not None
    assert [gpu.index for gpu in h100.gpus] == list(range(8))
    first = h100.gpus[0]
    assert (first.name, first.memory_total_mib, first.memory_used_mib) == ("NVIDIA H100 80GB HBM3", 81559, 4)
    assert (first.celsius, first.utilization, first.ecc_uncorrected) == (27, 0, 0)
    assert (first.remap_pending, first.remap_failed) == (False, False)
    assert h100.software["driver"] == "550.90.07"


def test_ports_are_read_as_sysfs_tells_them(h100):
    assert [port.name for port in h100.ports] == [f"mlx5_{n}:1" for n in range(9)]
    infiniband = [port for port in h100.ports if port.link_layer == "InfiniBand"]
    assert {(port.state, port.physical, port.gbits, port.lanes) for port in infiniband} == {
        ("ACTIVE", "LinkUp", 400.0, 4)
    }
    assert len(infiniband) == 8
    assert infiniband[0].counters["link_downed"] == 1
    assert h100.ports[8].counters == {}, "the Ethernet port has none recorded, and none are made up"


def test_a_port_that_is_down_and_a_slow_one_are_read_as_such(tmp_path):
    ports = {port.device: port for port in facts_of(recorded("h100_bad_ports", tmp_path), tmp_path).ports}
    assert (ports["mlx5_2"].state, ports["mlx5_2"].physical) == ("DOWN", "Polling")
    assert not ports["mlx5_2"].is_active
    assert (ports["mlx5_5"].gbits, ports["mlx5_5"].lanes) == (100.0, 1)
    assert ports["mlx5_6"].counters["symbol_error"] == 4127


def test_each_gpu_knows_its_nearest_port(h100, tmp_path):
    assert h100.near_port == {str(gpu): "PIX" for gpu in range(8)}
    down = {f"/sys/class/infiniband/mlx5_{n}/ports/1/state": "1: DOWN" for n in (2, 4, 5, 6, 7)}
    near = facts_of(recorded("h100_node", tmp_path / "down", files=down), tmp_path).near_port
    assert near == {"0": "PIX", "1": "PIX", "2": "NODE", "3": "PIX", "4": "SYS", "5": "SYS", "6": "SYS", "7": "SYS"}


def test_an_older_driver_names_the_adapters_in_the_head(tmp_path):
    text = "\tGPU0\tmlx5_0\tmlx5_1\tCPU Affinity\nGPU0\t X \tSYS\tPHB\t0-27\n"
    host = recorded("h100_node", tmp_path, commands={"nvidia-smi topo -m": text})
    assert facts_of(host, tmp_path).near_port == {"0": "PHB"}


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "peermem"),
        ({"without": ["/sys/module/nvidia_peermem"]}, "dmabuf"),
        ({"without": ["/sys/module/nvidia_peermem"], "files": {"/proc/sys/kernel/osrelease": "5.4.0-200-generic"}},
         "none"),
        ({"without": ["/sys/module/nvidia_peermem"],
          "files": {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri"}},
         "none"),
    ],
)  # fmt: skip
def test_gpudirect_needs_a_module_or_an_open_driver_on_a_new_kernel(tmp_path, changes, way):
    assert facts_of(recorded("h100_node", tmp_path, **changes), tmp_path).gpudirect == way


def test_a_desktop_computer_has_no_ecc_and_no_fabric(tmp_path):
    facts = facts_of(recorded("consumer_pc", tmp_path), tmp_path)
    assert facts.gpus is not None
    assert (facts.gpus[0].name, facts.gpus[0].ecc_uncorrected) == ("NVIDIA GeForce RTX 4090", None)
    assert facts.gpus[0].remap_failed is None
    assert (facts.ports, facts.gpudirect, facts.near_port) == ([], None, None)
    assert facts.software["driver"] == "535.183.01"
    assert facts.host_address == "127.0.1.1"


def test_limits_and_sizes_have_their_units(h100, tmp_path):
    assert h100.limits is not None
    assert (h100.limits.locked_bytes, h100.limits.open_files) == (None, 1048576)
    assert h100.shm_bytes == 1056600012 * 1024
    assert h100.disk_free_bytes == 879609302220 * 1024
    limits = facts_of(recorded("consumer_pc", tmp_path / "pc"), tmp_path).limits
    assert limits is not None
    assert (limits.locked_bytes, limits.open_files) == (8388608, 1024)


def test_only_variables_of_the_communication_libraries_are_kept(tmp_path):
    host = recorded("h100_node", tmp_path, environment={"NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "hush"})
    assert set(facts_of(host, tmp_path).environment) == {"NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}


@pytest.mark.parametrize("variable", [None, "/scratch/builds"])
def test_an_old_lock_of_a_build_is_found_and_a_fresh_one_is_not(tmp_path, variable):
    cache = variable or "/root/.cache/torch_extensions"
    files = {f"{cache}/py311_cu128/cpu_adam/lock": "", f"{cache}/py311_cu128/fused_adam/lock": ""}
    host = recorded("h100_node", tmp_path, files=files,
                    environment={"TORCH_EXTENSIONS_DIR": variable} if variable else {})  # fmt: skip
    old = host.root / f"{cache}/py311_cu128/cpu_adam/lock".lstrip("/")
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    locks = facts_of(host, tmp_path).stale_locks
    assert [lock.path for lock in locks] == [f"{cache}/py311_cu128/cpu_adam/lock"]
    assert locks[0].minutes == pytest.approx(60, abs=1)


def test_the_settings_have_a_digest_that_changes_with_them(tmp_path):
    assert facts_of(NOTHING, tmp_path).run_digest is None
    digests = []
    for text in ("seed: 1\n", "seed: 2\n"):
        (tmp_path / "run.yaml").write_text(text)
        digests.append(facts_of(NOTHING, tmp_path).run_digest)
    assert None not in digests
    assert digests[0] != digests[1]


def test_nothing_is_made_up_where_there_is_nothing_to_read(tmp_path):
    facts = facts_of(NOTHING, tmp_path)
    assert (facts.gpus, facts.ports, facts.limits, facts.shm_bytes, facts.interfaces) == (None, [], None, None, None)
    assert (facts.host_address, facts.disk_free_bytes, facts.gpudirect, facts.near_port) == (None, None, None, None)
    assert facts.software["driver"] is None


def test_this_machine_can_be_read(tmp_path):
    facts = facts_of(this_host(), tmp_path)
    assert facts.interfaces is not None
    assert "lo" in facts.interfaces
    assert facts.limits is not None
    assert facts.disk_free_bytes
    assert facts.disk_free_bytes > 0


def test_a_command_that_is_not_there_or_fails_says_nothing():
    assert run_command(["no-such-tool-anywhere"]) is None
    assert run_command(["false"]) is None
    assert run_command(["echo", "yes"]) == "yes\n"


def test_facts_survive_the_way_to_rank_0_and_to_the_command(h100, tmp_path):
    h100.stale_locks.append(StaleLock(path="/x", minutes=11.5))
    assert node_of_json(to_json(h100)) == h100
    found = Found(world_size=8, ranks_per_node=8, nodes=[h100], missing=[], unreachable=[], measured=None)
    write_found(found, tmp_path)
    assert read_found(tmp_path) == found
