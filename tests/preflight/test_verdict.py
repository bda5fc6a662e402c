"""What was measured against what was expected: the slow GPU, link or node is named, and the rest is left in peace."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from moetrain.cli.options import named_cluster
from moetrain.preflight.checks import Needs
from moetrain.preflight.rules import NO_GO, WARN
from moetrain.preflight.seen.facts import Collective, Found, Link, Measured, NodeFacts, Unreachable
from moetrain.preflight.verdict import (
    GO,
    HOSTFILE,
    REPORT_FILE,
    Line,
    Stated,
    judge,
    nodes_to_leave_out,
    overall,
    write_report,
)

GB = 1e9
NEEDS = Needs(nodes=4, processes=2, gpus=False, checkpoint_bytes=0, checkpoints_kept=1)


def found(*, nodes: int = 4, **of_measured: object) -> Found:
    """Nodes of two ranks each, all as fast as each other, with some values changed."""
    facts = [NodeFacts(node=n, host=f"host{n}", address=f"10.0.0.{n}", code_digest="c", run_digest="r")
             for n in range(nodes)]  # fmt: skip
    measured = Measured(
        device="NVIDIA H100 80GB HBM3",
        ranks_per_node=2,
        matmul=[600e12] * (2 * nodes),
        all_reduce=Collective(ranks=list(range(2 * nodes)), sent_bytes=10**9, seconds=0.03),
        all_to_all=[Collective(ranks=[2 * n, 2 * n + 1], sent_bytes=10**8, seconds=0.001) for n in range(nodes)],
        units="nodes",
        links=links(nodes),
        rounds=nodes - 1,
        rounds_of=nodes - 1,
        grown={},
    )
    return Found(world_size=2 * nodes, ranks_per_node=2, nodes=facts, missing=[], unreachable=[],
                 measured=replace(measured, **of_measured))  # type: ignore[arg-type]  # fmt: skip


def links(nodes: int, *, slow: dict[tuple[int, int], float] | None = None) -> list[Link]:
    """40 GB/s on each lane, but for some pairs."""
    return [Link(a=a, b=b, lanes=[(slow or {}).get((a, b), 40 * GB)] * 2)
            for a, b in itertools.combinations(range(nodes), 2)]  # fmt: skip


def graver(what: Found, stated: Stated | None = None, dtype: str = "bf16") -> list[Line]:
    """Lines that are neither go nor not measured."""
    needs = replace(NEEDS, nodes=len(what.nodes))
    return [line for line in judge(what, needs=needs, stated=stated, dtype=dtype) if line.verdict in (WARN, NO_GO)]


@pytest.fixture(scope="module")
def h100() -> Stated:
    cluster, efficiency = named_cluster("h100_ib")
    return Stated(name="h100_ib", cluster=cluster, efficiency=efficiency)


def test_equal_nodes_go(h100):
    assert graver(found()) == []


def test_a_slow_gpu_is_named_and_its_node_left_out():
    rates = [600e12] * 8
    rates[5] = 250e12
    (line,) = graver(found(matmul=rates))
    assert (line.verdict, line.where, line.node) == (NO_GO, "host2, GPU 1", 2)
    assert "250 TFLOP/s, 42% of the median of the others" in line.found
    assert nodes_to_leave_out([line]) == [2]


def test_a_gpu_a_little_slower_is_a_warning():
    rates = [600e12] * 8
    rates[0] = 390e12  # 65%
    (line,) = graver(found(matmul=rates))
    assert line.verdict == WARN
    assert nodes_to_leave_out([line]) == []


def test_a_slow_process_on_a_cpu_is_a_warning_at_most():
    rates = [60e9] * 8
    rates[5] = 10e9
    (line,) = graver(found(device="cpu", matmul=rates))
    assert (line.verdict, line.where) == (WARN, "host2, process 1")


def test_a_slow_link_is_named_by_both_its_ends():
    (line,) = graver(found(links=links(4, slow={(1, 3): 10 * GB})))
    assert (line.verdict, line.where, line.link, line.node) == (NO_GO, "host1 - host3", (1, 3), None)
    assert "20 GB/s each way, 25% of the median of the others" in line.found
    assert nodes_to_leave_out([line]) == [3], "either end does; the first node has the store"


def test_a_node_all_of_whose_links_are_slow_is_named_itself():
    slow = {pair: 5 * GB for pair in itertools.combinations(range(4), 2) if 2 in pair}
    lines = graver(found(links=links(4, slow=slow)))
    assert {line.where for line in lines} == {"host0 - host2", "host1 - host2", "host2 - host3"}
    assert {line.node for line in lines} == {2}
    assert all("all links of host2 are slow" in line.found for line in lines)
    assert nodes_to_leave_out(lines) == [2]


def test_a_link_with_one_slow_lane_of_two_is_a_warning():
    half = [replace(link, lanes=[40 * GB, 8 * GB]) if (link.a, link.b) == (0, 1) else link for link in links(4)]
    (line,) = graver(found(links=half))
    assert line.verdict == WARN  # 60% of the others


def test_one_link_alone_is_compared_with_the_clusters_file_or_with_nothing(h100):
    two = found(nodes=2, links=links(2, slow={(0, 1): 2 * GB}))
    assert [line for line in graver(two) if line.what == "link"] == []
    told = next(line for line in judge(two, needs=NEEDS, stated=None, dtype="bf16") if line.what == "links")
    assert "nothing to compare with" in told.found
    (line,) = [line for line in graver(two, h100) if line.what == "link"]
    # two lanes of 50 GB/s, of which the plan counts on 0.8: 80 GB/s
    assert (line.verdict, line.found) == (NO_GO, "4 GB/s each way, 5% of what the plan counts on (h100_ib)")


def test_stated_rates_are_those_of_the_clusters_file(h100):
    cluster = h100.cluster
    good = 0.9 * cluster.peak_flops("bf16") * h100.efficiency
    assert [line for line in graver(found(matmul=[good] * 8), h100) if line.what == "matrix products"] == []
    bad = 0.4 * cluster.peak_flops("bf16") * h100.efficiency
    lines = [line for line in graver(found(matmul=[bad] * 8), h100) if line.what == "matrix products"]
    assert len(lines) == 8, "all alike, and all too slow: only a stated rate shows it"
    assert graver(found(matmul=[bad] * 8)) == []


def test_the_experts_all_to_all_is_held_against_the_plans_time(h100):
    # inside a node: half of what a rank has goes to its neighbour, over NVLink at 0.8 x 450 GB/s, after 10 us
    sent, seconds = 10**8, 1e-5 + 10**8 / (0.8 * 450e9)
    for factor, verdict in ((1.0, GO), (1.3, GO), (1.6, WARN), (4.0, WARN)):
        groups = [Collective(ranks=[0, 1], sent_bytes=sent, seconds=factor * seconds)]
        lines = judge(found(all_to_all=groups), needs=NEEDS, stated=h100, dtype="bf16")
        assert [line.verdict for line in lines if line.what == "all-to-all of the experts"] == [verdict], factor


def test_one_slow_expert_group_stands_out_from_the_others():
    groups = [Collective(ranks=[2 * n, 2 * n + 1], sent_bytes=10**8, seconds=0.004 if n == 1 else 0.001)
              for n in range(4)]  # fmt: skip
    (line,) = graver(found(all_to_all=groups))
    assert (line.what, line.where, line.verdict) == ("all-to-all of the experts", "ranks 2 to 3", WARN)


def test_errors_that_grow_while_measuring_are_no_go():
    (line,) = graver(found(grown={"3": {"mlx5_0:1 symbol_error": 17}}))
    assert (line.verdict, line.where, line.node) == (NO_GO, "host3", 3)
    assert "mlx5_0:1 symbol_error by 17" in line.found


def test_a_node_that_did_not_report_is_no_go():
    four = found()
    lost = replace(four, nodes=four.nodes[:3], missing=[3], measured=None)
    lines = judge(lost, needs=NEEDS, stated=None, dtype="bf16")
    assert [(line.where, line.found) for line in lines if line.verdict == NO_GO] == [("node 3", "it did not report")]
    assert [line.verdict for line in lines if line.what == "speed"] == ["not measured"]


def test_a_link_that_is_cut_is_named_once_and_a_node_cut_off_by_itself():
    three = found(nodes=3)
    cut = [Unreachable(source=0, target=1, reason="10.0.0.1: timed out"),
           Unreachable(source=1, target=0, reason="10.0.0.0: timed out")]  # fmt: skip
    one = replace(three, measured=None, unreachable=cut)
    lines = [line for line in judge(one, needs=NEEDS, stated=None, dtype="fp32") if line.what == "link"]
    assert [(line.where, line.node) for line in lines] == [("host0 - host1", None)]
    more = [*one.unreachable, Unreachable(source=2, target=1, reason="10.0.0.1: timed out")]
    lines = judge(replace(one, unreachable=more), needs=NEEDS, stated=None, dtype="fp32")
    assert {line.node for line in lines if line.what == "link"} == {1}


def test_a_fault_while_measuring_is_no_go_and_says_what_it_was():
    lines = judge(replace(found(), measured=None), needs=NEEDS, stated=None, dtype="bf16", failure="rank 3 failed")
    assert [(line.verdict, line.found) for line in lines if line.what == "speed"] == [(NO_GO, "rank 3 failed")]


def test_the_gravest_line_counts_and_comes_first():
    rates = [600e12] * 8
    rates[1], rates[6] = 400e12, 100e12
    lines = judge(found(matmul=rates), needs=NEEDS, stated=None, dtype="bf16")
    assert overall(lines) == NO_GO
    order = [line.verdict for line in lines]
    assert order == sorted(order, key=[NO_GO, WARN, "not measured", GO].index)


class TestReport:
    def slow_host2(self) -> tuple[Found, list[Line]]:
        rates = [600e12] * 8
        rates[4] = 100e12
        what = found(matmul=rates)
        return what, judge(what, needs=NEEDS, stated=None, dtype="bf16")

    def test_the_hostfile_has_the_good_nodes(self, tmp_path: Path):
        what, lines = self.slow_host2()
        path = write_report(what, lines, tmp_path)
        assert path == tmp_path / HOSTFILE
        assert path.read_text() == "host0 slots=2\nhost1 slots=2\nhost3 slots=2\n"

    def test_the_hostfile_has_the_names_that_the_launcher_uses(self, tmp_path: Path):
        what, lines = self.slow_host2()
        path = write_report(what, lines, tmp_path, hosts=["a", "b", "c", "d"])
        assert path is not None
        assert path.read_text() == "a slots=2\nb slots=2\nd slots=2\n"

    def test_an_older_hostfile_goes_when_all_is_well(self, tmp_path: Path):
        write_report(*self.slow_host2(), tmp_path)
        what = found()
        assert write_report(what, judge(what, needs=NEEDS, stated=None, dtype="bf16"), tmp_path) is None
        assert not (tmp_path / HOSTFILE).exists()

    def test_no_hostfile_where_no_node_would_be_left(self, tmp_path: Path):
        what = found(nodes=2, grown={"0": {"mlx5_0:1 symbol_error": 1}, "1": {"mlx5_0:1 symbol_error": 1}})
        assert write_report(what, judge(what, needs=NEEDS, stated=None, dtype="bf16"), tmp_path) is None

    def test_the_json_has_every_line_and_all_that_was_found(self, tmp_path: Path):
        what, lines = self.slow_host2()
        write_report(what, lines, tmp_path)
        report = json.loads((tmp_path / REPORT_FILE).read_text())
        assert (report["verdict"], report["leave_out"]) == (NO_GO, ["host2"])
        assert [line["what"] for line in report["lines"]] == [line.what for line in lines]
        assert report["found"]["measured"]["matmul"][4] == 100e12


def test_hosts_of_one_name_are_told_apart_by_their_address():
    rates = [600e12] * 4
    rates[3] = 100e12
    two = found(nodes=2, matmul=rates)
    same = replace(two, nodes=[replace(facts, host="vm") for facts in two.nodes])
    lines = [line for line in graver(same) if line.what == "matrix products"]
    assert [line.where for line in lines] == ["vm (10.0.0.1, node 1), GPU 1"]
