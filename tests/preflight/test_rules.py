"""Every rule of preflight passes on a sound machine and has a fault that it alone finds."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import recorded

from moetrain.preflight.checks import Needs
from moetrain.preflight.rules import NO_GO, RULES, SAME, WARN
from moetrain.preflight.seen.facts import Clock, Found, NodeFacts
from moetrain.preflight.seen.read import Host, read_facts
from moetrain.preflight.verdict import GO, NOT_MEASURED, Line, in_the_way, judge, judge_alone

NEEDS = Needs(nodes=2, processes=8, gpus=True, checkpoint_bytes=500e9, checkpoints_kept=3, port_gbits=400.0)
VERSIONS = {"torch": "2.12.0", "cuda": "12.8", "nccl": "2.27.3", "python": "3.11.9"}


def facts_of(host: Host, tmp_path: Path) -> NodeFacts:
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    facts = read_facts(host, node=0, place=tmp_path, versions=VERSIONS)
    return replace(facts, sees_run_dir=True, clock=Clock(ahead_seconds=0.01, uncertain_seconds=0.001))


def lines_of(facts: NodeFacts, needs: Needs = NEEDS) -> dict[str, Line]:
    lines = judge_alone(facts, needs=needs)
    assert len({line.what for line in lines}) == len(lines)
    return {line.what: line for line in lines}


IB = "/sys/class/infiniband"
FREE = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 1000000000 1 {} 50% /data"
SHM = "Filesystem 1024-blocks Used Available Capacity Mounted on\ntmpfs {} 0 {} 0% /dev/shm"

# what is changed on the recorded node -> what the rule's line must say
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "GPUs idle": ({"smi": {(3, "memory.used"): "61234", (3, "utilization.gpu"): "98"}}, "GPU 3: 61,234 MiB in use"),
    "GPU memory errors": ({"smi": {(5, "ecc.errors.uncorrected.volatile.total"): "2"}}, "GPU 5: 2 uncorrected"),
    "GPU memory repair": ({"remapped": {(1, "remapped_rows.failure"): "Yes"}}, "GPU 1: a row of memory could not"),
    "GPU memory to repair": ({"remapped": {(6, "remapped_rows.pending"): "Yes"}}, "GPU 6: a row of memory waits"),
    "GPU temperature": ({"smi": {(7, "temperature.gpu"): "83"}}, "GPU 7: 83 °C"),
    "fabric ports up": ({"files": {f"{IB}/mlx5_2/ports/1/state": "1: DOWN", f"{IB}/mlx5_2/ports/1/phys_state":
                                   "2: Polling"}}, "mlx5_2:1 is DOWN (Polling)"),
    "fabric port rate": ({"files": {f"{IB}/mlx5_5/ports/1/rate": "100 Gb/sec (1X NDR)"}},
                         "mlx5_5:1 runs at 100 Gb/s on 1 lanes, others at 400"),
    "fabric rate as stated": ({"files": {f"{IB}/mlx5_{n}/ports/1/rate": "200 Gb/sec (4X HDR)" for n in range(8)}},
                              "mlx5_0:1 runs at 200 Gb/s, the cluster's file says 400"),
    "fabric errors": ({"files": {f"{IB}/mlx5_6/ports/1/counters/symbol_error": "4127"}}, "symbol_error 4,127"),
    "GPUDirect": ({"without": ["/sys/module/nvidia_peermem", "/proc/sys/kernel/osrelease"]}, "neither nvidia_peermem"),
    "locked memory": ({"files": {"/proc/self/limits": "Max open files 1048576 1048576 files\n"
                                 "Max locked memory 67108864 67108864 bytes"}}, "ulimit -l is 65,536 KiB"),
    "open files": ({"files": {"/proc/self/limits": "Max open files 256 1048576 files\n"
                              "Max locked memory unlimited unlimited bytes"}}, "ulimit -n is 256"),
    "/dev/shm": ({"commands": {"df -Pk /dev/shm": SHM.format(65536, 65536)}}, "64 MiB"),
    "/dev/shm size": ({"commands": {"df -Pk /dev/shm": SHM.format(524288, 524288)}}, "512 MiB"),
    "interface variables": ({"environment": {"NCCL_SOCKET_IFNAME": "ib0"}}, "NCCL_SOCKET_IFNAME=ib0: there is no"),
    "adapter variables": ({"environment": {"NCCL_IB_HCA": "^mlx5_8", "UCX_NET_DEVICES": "mlx5_9:1"}},
                          "UCX_NET_DEVICES=mlx5_9:1: there is no mlx5_9:1"),
    "fabric used": ({"environment": {"NCCL_IB_DISABLE": "1"}}, "NCCL_IB_DISABLE=1"),
    "variables left over": ({"environment": {"NCCL_DEBUG": "INFO"}}, "NCCL_DEBUG=INFO"),
    "disk for a checkpoint": ({"commands": {"df -Pk": FREE.format(400_000_000)}}, "one checkpoint takes 500 GB"),
    "disk for all checkpoints": ({"commands": {"df -Pk": FREE.format(900_000_000)}}, "3 checkpoints take 1.5e+03 GB"),
}  # fmt: skip

# the same for what no file of one machine tells
CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "settings": ({"run_digest": None}, {}, "run.yaml is not there"),
    "run directory": ({"sees_run_dir": False}, {}, "does not see"),
    "GPUs present": ({}, {"processes": 9}, "8 GPUs for 9 processes"),
    "clock": ({"clock": Clock(ahead_seconds=-42.0, uncertain_seconds=0.1)}, {}, "42.0 s behind node 0"),
    "fabric ports idle": ({}, {"processes": 4}, "mlx5_2:1 is DOWN"),
    "GPU near its port": ({"near_port": {"0": "PIX", "4": "SYS"}}, {}, "GPU 4: nearest active port is across"),
    "own address": ({"host_address": "127.0.1.1", "environment": {}}, {}, "node01 stands for 127.0.1.1"),
    "builds": ({}, {}, "/root/.cache/torch_extensions/cpu_adam/lock"),
}


def severity(what: str) -> str:
    return next(rule.severity for rule in RULES if rule.what == what)


def test_every_rule_has_a_fault_here():
    assert {rule.what for rule in RULES} == set(CASES) | set(CHANGED)


def test_a_sound_node_passes_every_rule(tmp_path):
    lines = lines_of(facts_of(recorded("h100_node", tmp_path), tmp_path))
    assert {line.verdict for line in lines.values()} == {GO}
    assert set(lines) == {rule.what for rule in RULES}


@pytest.mark.parametrize("what", CASES)
def test_a_fault_on_the_machine_is_found_by_its_rule_alone(what, tmp_path):
    changes, told = CASES[what]
    # with a cluster's file, a port at a quarter of its rate breaks the rule of the stated rate too, and rightly
    needs = replace(NEEDS, port_gbits=None) if what == "fabric port rate" else NEEDS
    lines = lines_of(facts_of(recorded("h100_node", tmp_path, **changes), tmp_path), needs)
    assert lines[what].verdict == severity(what)
    assert told in lines[what].found
    assert lines[what].where == "node01"
    assert lines[what].remedy
    assert lines[what].reason
    assert {name for name, line in lines.items() if line.verdict in (WARN, NO_GO)} == {what}


@pytest.mark.parametrize("what", CHANGED)
def test_a_fault_that_no_file_tells_is_found_by_its_rule_alone(what, tmp_path):
    fields, needs, told = CHANGED[what]
    changes = CASES["fabric ports up"][0] if what == "fabric ports idle" else {}
    host = recorded("h100_node", tmp_path, **changes)
    if what == "builds":
        lock = host.root / "root/.cache/torch_extensions/cpu_adam/lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - 7200, time.time() - 7200))
    facts = replace(facts_of(host, tmp_path), **fields)
    lines = lines_of(facts, replace(NEEDS, **needs))
    assert lines[what].verdict == severity(what)
    assert told in lines[what].found
    assert {name for name, line in lines.items() if line.verdict in (WARN, NO_GO)} == {what}


def test_a_node_with_a_bad_fabric_is_told_port_by_port(tmp_path):
    lines = lines_of(facts_of(recorded("h100_bad_ports", tmp_path), tmp_path), replace(NEEDS, port_gbits=None))
    assert lines["fabric ports up"].found == "mlx5_2:1 is DOWN (Polling)"
    assert lines["fabric port rate"].found == "mlx5_5:1 runs at 100 Gb/s on 1 lanes, others at 400"
    assert lines["fabric errors"].found == (
        "mlx5_6:1: symbol_error 4,127; mlx5_6:1: link_error_recovery 58; mlx5_6:1: port_rcv_errors 39"
    )
    assert lines["fabric rate as stated"].verdict == NOT_MEASURED, "no cluster was named"


def test_a_desktop_computer_may_train_by_itself(tmp_path):
    needs = Needs(nodes=1, processes=1, gpus=True, checkpoint_bytes=1e9, checkpoints_kept=3)
    lines = lines_of(facts_of(recorded("consumer_pc", tmp_path), tmp_path), needs)
    assert {name for name, line in lines.items() if line.verdict in (WARN, NO_GO)} == set()
    assert lines["GPU memory errors"].verdict == NOT_MEASURED
    assert not [name for name in lines if name.startswith("fabric")]
    assert "locked memory" not in lines, "nothing is pinned for RDMA"


def test_what_could_not_be_looked_at_is_said_and_is_no_go_of_its_own(tmp_path):
    bare = Host(root=tmp_path / "none", run=lambda words: None, environment={}, name="bare")
    lines = lines_of(replace(facts_of(bare, tmp_path), clock=None, sees_run_dir=None))
    unseen = {name for name, line in lines.items() if line.verdict == NOT_MEASURED}
    assert {"GPUs present", "GPU temperature", "/dev/shm", "interface variables", "own address", "clock",
            "disk for a checkpoint", "run directory"} <= unseen  # fmt: skip
    assert all(line.verdict in (GO, NOT_MEASURED) for line in lines.values())


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"GLOO_SOCKET_IFNAME": "enp170"}, "GLOO_SOCKET_IFNAME=enp170: there is no"),  # gloo wants the whole name
        ({"NCCL_SOCKET_IFNAME": "enp170"}, None),  # NCCL takes a prefix
        ({"NCCL_SOCKET_IFNAME": "=enp170"}, "there is no interface enp170"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, None),  # all but those
        ({"NCCL_SOCKET_IFNAME": "lo"}, "lo does not reach other nodes"),
        ({"GLOO_SOCKET_IFNAME": "ibp24s0,enp170s0f0np0"}, None),
    ],
)
def test_interfaces_are_named_as_each_library_reads_them(tmp_path, environment, told):
    line = lines_of(facts_of(recorded("h100_node", tmp_path, environment=environment), tmp_path))["interface variables"]
    assert line.verdict == (GO if told is None else NO_GO)
    assert told is None or told in line.found


def test_an_interface_that_is_down_is_no_way_to_others(tmp_path):
    host = recorded("h100_node", tmp_path, files={"/sys/class/net/ibp24s0/operstate": "down"},
                    environment={"NCCL_SOCKET_IFNAME": "ibp24s0"})  # fmt: skip
    assert "ibp24s0 is down" in lines_of(facts_of(host, tmp_path))["interface variables"].found


@pytest.mark.parametrize(
    ("hca", "ports_up", "variables"),
    [
        ("mlx5_2", NO_GO, GO),  # the one that is down
        ("=mlx5_0:1,mlx5_1:1", GO, GO),
        ("^mlx5_2", GO, GO),
        ("mlx5", GO, GO),  # with the Ethernet port, eight are up
        ("mlx4_0", GO, NO_GO),  # there is no such
    ],
)
def test_adapters_are_chosen_as_nccl_chooses_them(tmp_path, hca, ports_up, variables):
    host = recorded("h100_bad_ports", tmp_path, environment={"NCCL_IB_HCA": hca})
    lines = lines_of(facts_of(host, tmp_path))
    assert (lines["fabric ports up"].verdict, lines["adapter variables"].verdict) == (ports_up, variables)


def three(tmp_path: Path, **of_last: Any) -> Found:
    """Three sound nodes, the last with other values."""
    facts = facts_of(recorded("h100_node", tmp_path), tmp_path)
    nodes = [replace(facts, node=n, host=f"node{n:02}", address=f"10.0.0.{n}") for n in range(3)]
    nodes[2] = replace(nodes[2], **of_last)
    return Found(world_size=24, ranks_per_node=8, nodes=nodes, missing=[], unreachable=[], measured=None)


DIFFERENT = {
    "code": {"code_digest": "f00"},
    "settings": {"run_digest": "f00"},
    "torch": {"software": {**VERSIONS, "driver": "550.90.07", "torch": "2.11.0"}},
    "CUDA": {"software": {**VERSIONS, "driver": "550.90.07", "cuda": "12.6"}},
    "NCCL": {"software": {**VERSIONS, "driver": "550.90.07", "nccl": "2.26.2"}},
    "driver": {"software": {**VERSIONS, "driver": "535.1"}},
    "GPUs alike": {"gpus": "fewer"},
    "fabric alike": {"ports": "fewer"},
    "variables alike": {"environment": {"NCCL_SOCKET_IFNAME": "enp170", "GLOO_SOCKET_IFNAME": "enp170s0f0np0",
                                        "NCCL_IB_TIMEOUT": "22"}},
}  # fmt: skip


def test_what_must_be_equal_has_a_difference_here():
    assert {same.what for same in SAME} == set(DIFFERENT)


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_node_that_differs_is_named(what, tmp_path):
    sound = three(tmp_path).nodes[2]
    assert sound.gpus is not None
    fewer = {"gpus": sound.gpus[:7], "ports": sound.ports[1:]}
    values = {key: fewer[key] if value == "fewer" else value for key, value in DIFFERENT[what].items()}
    lines = judge(three(tmp_path, **values), needs=replace(NEEDS, nodes=3, processes=7), stated=None, dtype="bf16")
    of_rule = [line for line in lines if line.what == what and line.verdict in (WARN, NO_GO)]
    assert [(line.where, line.node) for line in of_rule] == [("node02", 2)]
    assert of_rule[0].verdict == next(same.severity for same in SAME if same.what == what)


def test_nodes_of_other_code_or_settings_do_not_measure_together(tmp_path):
    assert in_the_way(three(tmp_path)) is None
    assert in_the_way(three(tmp_path, code_digest="f00")) == "the code of the nodes differ"
    assert in_the_way(three(tmp_path, run_digest="f00")) == "the settings of the nodes differ"
    assert in_the_way(three(tmp_path, host_address="127.0.0.1", environment={})) == "own address"
    assert in_the_way(replace(three(tmp_path), missing=[3])) == "not all nodes are there"
