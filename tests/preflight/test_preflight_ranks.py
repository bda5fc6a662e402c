"""Real ranks on gloo: what they look at and measure, and what they say when one of them is not as the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from as_typed import Output

import moetrain
from moetrain.compose import compose
from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, write_run
from moetrain.parallel import groups as process_groups
from moetrain.parallel.topology import Topology
from moetrain.preflight.measure import Exchanged, measure
from moetrain.preflight.seen.facts import Found, Measured, read_found, to_json
from moetrain.preflight.verdict import judge

AS_A_RANK = """
import sys
from pathlib import Path
from moetrain.preflight.node import run_rank
run_rank(Path(sys.argv[1]), patience=float(sys.argv[2]))
"""


def settings_in(place: Path, *overrides: str) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    run = freeze(compose(overrides).settings)
    write_run(resolve(replace(run, name="tiny"), default_processes=2), place)
    return place


LAYOUTS = {"experts in a node": (2, 2), "experts over nodes": (4, 2), "one node": (1, 4)}
"""Expert parallel, and ranks of a node."""


def _measure(rank: int) -> dict[str, str]:
    found = {}
    for name, (expert_parallel, per_node) in LAYOUTS.items():
        topology = Topology(world_size=4, rank=rank, expert_parallel=expert_parallel, processes_per_node=per_node)
        groups = process_groups.make(topology, device=torch.device("cpu"), two_level=topology.crosses_nodes)
        measured = measure(groups, ranks_per_node=per_node, dtype=torch.float32,
                           exchanged=Exchanged(rows=512, width=64, num_experts=8))  # fmt: skip
        found[name] = to_json(Found(world_size=4, ranks_per_node=per_node, nodes=[], missing=[], unreachable=[],
                                    measured=measured))  # fmt: skip
    return found


def test_four_ranks_measure_their_links_and_the_experts_all_to_all(ranks, tmp_path):
    of_ranks = ranks(4, _measure)
    for name, (expert_parallel, _) in LAYOUTS.items():
        every = [measured_of(texts[name], tmp_path) for texts in of_ranks]
        measured = every[0]
        assert len(measured.matmul) == 4
        assert all(rate > 1e8 for rate in measured.matmul)
        assert measured.all_reduce is not None
        assert measured.all_reduce.seconds > 0
        assert all(rate > 0 for link in measured.links for rate in link.lanes)
        # all ranks have the same numbers, or they would not come to the same suspects
        assert all(each.links == measured.links and each.matmul == measured.matmul for each in every)
        pairs = [(link.a, link.b, len(link.lanes)) for link in measured.links]
        if name == "one node":
            assert measured.units == "ranks"
            assert sorted(pairs) == [(0, 1, 1), (0, 2, 1), (0, 3, 1), (1, 2, 1), (1, 3, 1), (2, 3, 1)]
            assert (measured.rounds, measured.rounds_of) == (3, 3)
            assert measured.all_to_all == [], "each rank holds every expert"
        else:
            assert (measured.units, pairs) == ("nodes", [(0, 1, 2)])
            groups = [[0, 1, 2, 3]] if expert_parallel == 4 else [[0, 1], [2, 3]]
            assert [each.ranks for each in measured.all_to_all] == groups
            # 512 rows of 64 floats, of which the share of the own experts stays
            sent = 512 * 64 * 4 * (expert_parallel - 1) // expert_parallel
            assert {each.sent_bytes for each in measured.all_to_all} == {sent}


def measured_of(text: str, place: Path) -> Measured:
    (place / "found.json").write_text(text)
    measured = read_found(place).measured
    assert measured is not None
    return measured


def test_the_verb_looks_measures_and_leaves_its_report(moetrain_in_process: Callable[..., Output], tmp_path):
    done = moetrain_in_process("preflight", "cluster=cpu", f"run_dir={tmp_path / 'run'}", "launch.processes=2")
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    # a busy machine may be slower than the file says: that is what the verdict is for
    assert done.returncode == (2 if report["verdict"] == "no-go" else 0)
    assert f"preflight: {report['verdict']} (" in done.stdout
    assert "what the plan counts on (cpu)" in done.stdout
    named = {line["what"] for line in report["lines"]}
    assert {
        "settings",
        "matrix products on a CPU",
        "all-reduce",
        "all-to-all of the experts",
        "disk for a checkpoint",
    } <= named
    assert named & {"link", "links"}
    facts = report["found"]["nodes"][0]
    assert (facts["software"]["torch"], facts["gpus"]) == (torch.__version__, None)
    assert not (tmp_path / "run" / "run.yaml").exists(), "a preflight is no start of the run"


def two_single_ranks(places: list[Path], *, port: int, patience: float, world_size: int = 2) -> list[int]:
    """Start a rank in each place, as the only one on its node."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(moetrain.__file__).parent.parent), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE":
        str(world_size), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", AS_A_RANK, str(place), str(patience)],
                         env=environment | {"RANK": str(rank)})
        for rank, place in enumerate(places)
    ]  # fmt: skip
    try:
        return [process.wait(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def no_go(found: Found) -> dict[str, tuple[str, int | None]]:
    from moetrain.cli.running.preflight import needs_of

    run = freeze(compose([]).settings)
    lines = judge(found, needs=needs_of(run, found, None), stated=None, dtype="fp32")
    return {line.what: (line.found, line.node) for line in lines if line.verdict == "no-go"}


def test_a_node_that_does_not_come_is_named_in_seconds(tmp_path, unused_port):
    place = settings_in(tmp_path / "preflight")
    assert two_single_ranks([place], port=unused_port, patience=2.0) == [0]
    found = read_found(place)
    assert found.missing == [1]
    assert found.measured is None
    assert no_go(found)["node"] == ("it did not report", 1)


def test_a_node_with_other_settings_is_named_and_nothing_is_measured(tmp_path, unused_port):
    places = [settings_in(tmp_path / "one"), settings_in(tmp_path / "other", "optim.lr=1e-4")]
    assert two_single_ranks(places, port=unused_port, patience=30.0) == [0, 0]
    found = read_found(places[0])
    assert (found.missing, found.unreachable, found.measured) == ([], [], None)
    faults = no_go(found)
    assert faults["settings"][1] == 1
    # neither sees what the other wrote
    assert faults["run directory"] == ("it does not see what node 0 wrote there", 1)
    clock = found.nodes[1].clock
    assert clock is not None
    assert abs(clock.ahead_seconds) < 1, "two processes of one machine have one clock"


def test_a_rank_that_fails_while_measuring_is_no_go_with_its_error(
    moetrain_in_process: Callable[..., Output], tmp_path, monkeypatch
):
    # the facts are sound, and the groups cannot be made: two ranks share experts over no such number of processes
    monkeypatch.setattr("moetrain.cli.running.preflight.NODE", "tests_that_fail_later")
    (tmp_path / "tests_that_fail_later.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom moetrain.preflight import node\n"
        "from moetrain.parallel.lifeline import end_as_rank\n"
        "def fail(*args, **kwargs):\n    raise RuntimeError('NCCL error 2, unhandled system error')\n"
        "node._measure = fail\nend_as_rank(node.main, Path(sys.argv[1]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(moetrain.__file__).parent.parent}")
    done = moetrain_in_process("preflight", f"run_dir={tmp_path / 'run'}", "launch.processes=2")
    assert done.returncode == 2
    assert "RuntimeError: NCCL error 2, unhandled system error" in done.stdout
    assert "preflight: no-go" in done.stdout


class TestBeforeTraining:
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_a_fault_stops_the_run_before_its_first_step(self, moetrain_in_process, monkeypatch):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
        Path("books").mkdir()
        for book in range(20):
            text = " ".join(f"It was night number {n} of {n * book}." for n in range(40))
            Path("books", f"{book}.txt").write_text(text)
        words = ["data.text=books", "data.name=books", "model.vocab_size=300", "model.context=16"]
        done = moetrain_in_process("train", "launch.processes=2", *words)
        assert done.returncode == 2
        assert "GLOO_SOCKET_IFNAME=ib77: there is no interface ib77" in done.stdout
        swept = moetrain_in_process("sweep", "optim.lr=1e-3,3e-3", "retries=2", "launch.processes=1", *words)
        assert swept.returncode == 1, swept.stderr
        assert "retried" not in swept.stdout
        assert swept.stdout.count("preflight says no-go: ") >= 2
        assert not list(Path("runs/tiny").glob("log/*")), "no rank was started"

    def test_it_is_silent_and_quick_where_all_is_well(self, capsys):
        from moetrain.cli.running.preflight import before_training

        run = freeze(compose([]).settings)
        run = resolve(replace(run, name="tiny"), default_processes=2)
        settings_in(Path("runs/tiny"))
        before_training(run, Path("runs/tiny"))
        assert capsys.readouterr().out == ""

    def test_it_can_be_skipped(self, monkeypatch, capsys):
        from moetrain.cli.running.preflight import before_training

        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
        run = resolve(replace(freeze(compose(["preflight=skip"]).settings), name="tiny"), default_processes=2)
        before_training(run, Path("runs/tiny"))
        assert capsys.readouterr().out == ""
