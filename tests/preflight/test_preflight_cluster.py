"""Three hosts (network namespaces joined by a bridge) with links that are really slow or cut: ``pytest -m cluster``.

All links are shaped to one rate well below what the machine can do, so that what is measured is the link.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import moetrain
from moetrain.cli.options import named_cluster
from moetrain.cli.running.preflight import needs_of
from moetrain.compose import compose
from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, write_run
from moetrain.config.schema import RunConfig
from moetrain.preflight.seen.facts import Found, read_found
from moetrain.preflight.verdict import Line, Stated, judge, write_report

pytestmark = pytest.mark.cluster

HOSTS = ("node1", "node2", "node3")
USUAL, SLOW = "200mbit", "20mbit"
MASTER_PORT = 29477
AS_A_RANK = """
import sys
from pathlib import Path
from moetrain.preflight.node import run_rank
run_rank(Path(sys.argv[1]), patience=20.0)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def shape(host: int, rate: str) -> None:
    """What host sends and what it is sent."""
    for namespace, device in ((f"pfhost{host}", "eth0"), ("pfswitch", f"port{host}")):
        subprocess.run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", rate, "burst",
                        "64kb", "latency", "400ms"], check=True, capture_output=True, timeout=30)  # fmt: skip


def take_down() -> None:
    for name in ("pfhost1", "pfhost2", "pfhost3", "pfswitch"):
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[None]:
    """pfhost1 to pfhost3 at 10.78.0.1 to 10.78.0.3."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs root, and ip and tc (package iproute2)")
    take_down()
    try:
        ip("netns", "add", "pfswitch")
        ip("-n", "pfswitch", "link", "add", "br0", "type", "bridge")
        ip("-n", "pfswitch", "link", "set", "br0", "up")
        for n in (1, 2, 3):
            ip("netns", "add", f"pfhost{n}")
            ip("-n", f"pfhost{n}", "link", "add", "eth0", "type", "veth", "peer", "name", f"port{n}", "netns",
               "pfswitch")  # fmt: skip
            ip("-n", "pfswitch", "link", "set", f"port{n}", "master", "br0", "up")
            ip("-n", f"pfhost{n}", "addr", "add", f"10.78.0.{n}/24", "dev", "eth0")
            ip("-n", f"pfhost{n}", "link", "set", "eth0", "up")
            ip("-n", f"pfhost{n}", "link", "set", "lo", "up")
            shape(n, USUAL)
    except subprocess.CalledProcessError as error:
        take_down()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr}")
    yield
    take_down()


def preflight(place: Path, *, nodes: int) -> tuple[RunConfig, Found]:
    """One rank on each of the first hosts, as a launcher would start them."""
    overrides = ["batch.micro_batch=1", "batch.global_batch=24", "model.d_model=64", "parallel.expert_parallel=1"]
    run = resolve(replace(freeze(compose(overrides).settings), name="tiny"), default_processes=1)
    run = replace(run, parallel=replace(run.parallel, expert_parallel=2 if nodes == 2 else 1))
    place.mkdir()
    write_run(run, place)
    environment = os.environ | {
        "PYTHONPATH": str(Path(moetrain.__file__).parent.parent), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "10.78.0.1",
        "MASTER_PORT": str(MASTER_PORT),
    }  # fmt: skip
    running = [
        subprocess.Popen(["ip", "netns", "exec", f"pfhost{rank + 1}", sys.executable, "-c", AS_A_RANK, str(place)],
                         env=environment | {"RANK": str(rank)}, stderr=subprocess.DEVNULL)
        for rank in range(nodes)
    ]  # fmt: skip
    try:
        running[0].wait(timeout=120)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return run, read_found(place)


def judged(run: RunConfig, found: Found, stated: Stated | None = None) -> list[Line]:
    return judge(found, needs=needs_of(run, found, stated), stated=stated, dtype="fp32")


def test_links_that_are_alike_go(hosts, tmp_path):
    run, found = preflight(tmp_path / "preflight", nodes=3)
    lines = judged(run, found)
    assert [line.verdict for line in lines if line.what in ("link", "links")] == ["go"]
    assert found.measured is not None
    # 200 Mbit/s are 25 MB/s, less what the frames cost; a bucket of 64 kB lets a little through at once
    assert all(17e6 < link.rate < 27e6 for link in found.measured.links)
    assert write_report(found, lines, tmp_path, hosts=HOSTS) is None


def test_a_node_behind_a_slow_link_is_named_and_left_out(hosts, tmp_path):
    shape(3, SLOW)
    run, found = preflight(tmp_path / "preflight", nodes=3)
    lines = judged(run, found)
    slow = [line for line in lines if line.what == "link"]
    assert [(line.verdict, line.node) for line in slow] == [("no-go", 2), ("no-go", 2)]
    assert {line.link for line in slow} == {(0, 2), (1, 2)}
    path = write_report(found, lines, tmp_path, hosts=HOSTS)
    assert path is not None
    assert path.read_text() == "node1 slots=1\nnode2 slots=1\n"


def test_the_one_link_of_two_nodes_is_held_against_the_clusters_rate(hosts, tmp_path):
    cluster, efficiency = named_cluster("cpu")
    # as a file would say of 200 Mbit/s
    stated = Stated(name="mine", cluster=replace(cluster, network_gb_per_second=0.025), efficiency=efficiency)
    for rate, verdict in ((USUAL, "go"), (SLOW, "no-go")):
        shape(2, rate)
        run, found = preflight(tmp_path / rate, nodes=2)
        lines = [line for line in judged(run, found, stated) if line.what in ("link", "links")]
        assert [line.verdict for line in lines] == [verdict], rate
        assert found.measured is not None
        assert [each.ranks for each in found.measured.all_to_all] == [[0, 1]]
    assert lines[0].link == (0, 1)
    assert "(10.78.0.1, node 0)" in lines[0].where
    assert "(10.78.0.2, node 1)" in lines[0].where


def test_two_nodes_that_cannot_reach_each_other_are_named_though_both_reach_the_first(hosts, tmp_path):
    ip("-n", "pfhost2", "route", "add", "unreachable", "10.78.0.3")
    run, found = preflight(tmp_path / "preflight", nodes=3)
    assert found.measured is None, "the ranks would have waited for each other for minutes"
    lines = [line for line in judged(run, found) if line.what == "link"]
    assert [(line.verdict, line.link) for line in lines] == [("no-go", (1, 2))]
    assert "cannot reach 10.78.0." in lines[0].found


def test_a_node_cut_off_from_the_first_is_missing(hosts, tmp_path):
    ip("-n", "pfhost2", "link", "set", "eth0", "down")
    run, found = preflight(tmp_path / "preflight", nodes=3)
    assert found.missing == [1]
    lines = judged(run, found)
    assert [line.node for line in lines if line.what == "node"] == [1]
    path = write_report(found, lines, tmp_path, hosts=HOSTS)
    assert path is not None
    assert path.read_text() == "node1 slots=1\nnode3 slots=1\n"
