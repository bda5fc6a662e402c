"""The restart policy: what is started again, where, and when not. Starts are real processes where that matters."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from moetrain.config.checks import check, resolve
from moetrain.config.freeze import flatten, freeze, read_run, to_dict, write_run
from moetrain.config.launch.settings import LaunchConfig
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError, HangError, LaunchError, LostError, MoetrainError, TrainingError
from moetrain.launch.local import run_local
from moetrain.launch.nodes.spec import request
from moetrain.launch.supervise import Ended, on_fewer, supervise, wait, without
from moetrain.plan.layout import Layout
from moetrain.plan.memory.device import memory_of
from moetrain.sweep.grid import layout_of
from moetrain.watch.board import Beat, Board
from moetrain.watch.incidents import read_incidents


def settings(**given: object) -> RunConfig:
    """A run of 4 processes with 8 experts and a batch of 16; names with __ for dots."""
    nested: dict[str, dict[str, object]] = {"launch": {"processes": 4}, "model": {"moe": {"num_experts": 8}}}
    for name, value in given.items():
        section, _, key = name.partition("__")
        nested.setdefault(section, {})[key] = value
    return resolve(freeze({"name": "x", **nested}), default_processes=1)


class Starts:
    """A launcher whose starts end as planned; each start first says how far the run got."""

    def __init__(self, run_dir: Path, *ends: tuple[int, Ended]) -> None:
        self.run_dir, self.ends = run_dir, list(ends)
        self.runs: list[RunConfig] = []

    def __call__(self, run: RunConfig) -> Ended:
        self.runs.append(run)
        step, ended = self.ends.pop(0)
        board = Board(self.run_dir, rank=0)
        board.write(Beat(rank=0, host="h", pid=1, beat=1, count=1, step=step, place="", waits=False))
        return ended


def keep_running(run_dir: Path, run: RunConfig, *ends: tuple[int, Ended], pauses: list[float] | None = None) -> Starts:
    starts = Starts(run_dir, *ends)
    waited = [] if pauses is None else pauses
    supervise(
        run, run_dir=run_dir, start=starts, say=print,
        shrink=lambda run, lost: on_fewer(run, processes=(run.launch.processes or 1) - lost),
        pause=lambda seconds: waited.append(seconds) or False,
    )  # fmt: skip
    return starts


DONE = Ended()
KILLED = Ended(fault=LostError("rank 3 ended with SIGKILL; its log is empty"))


def test_a_lost_rank_is_started_again_with_longer_and_longer_pauses(tmp_path):
    (tmp_path / "checkpoints/step_00000040").mkdir(parents=True)
    pauses: list[float] = []
    starts = keep_running(tmp_path, settings(launch__max_restarts=3), (50, KILLED), (60, KILLED), (70, KILLED),
                          (80, DONE), pauses=pauses)  # fmt: skip
    assert len(starts.runs) == 4
    assert pauses == [1, 2, 4]
    told = read_incidents(tmp_path)
    assert [(each.kind, each.step, each.rank) for each in told] == [("restart", at, 3) for at in (50, 60, 70)]
    assert told[0].done == "restart 1 of 3 from the checkpoint of step 40, in 1 s"


@pytest.mark.parametrize(
    "fault",
    [ConfigError(["optim.lr is 0"]), TrainingError("the loss is nan"), LaunchError("rank 0 failed with KeyError: 'x'")],
)
def test_what_would_fail_again_is_not_started_again(tmp_path, fault):
    with pytest.raises(type(fault)):
        keep_running(tmp_path, settings(launch__max_restarts=3), (5, Ended(fault=fault)))
    assert read_incidents(tmp_path) == []


def test_the_same_fault_no_further_than_before_ends_the_run(tmp_path):
    with pytest.raises(LostError, match="SIGKILL"):
        keep_running(tmp_path, settings(launch__max_restarts=9), (50, KILLED), (50, KILLED))
    assert [each.kind for each in read_incidents(tmp_path)] == ["restart", "gave_up"]
    assert "got no further" in read_incidents(tmp_path)[1].done


def test_another_rank_or_another_fault_at_the_same_step_is_not_the_same(tmp_path):
    other = Ended(fault=LostError("rank 2 ended with SIGKILL; its log is empty"))
    hang = Ended(fault=HangError("at step 50, no progress for 9 s: rank 2 is behind"))
    starts = keep_running(tmp_path, settings(launch__max_restarts=9), (50, KILLED), (50, other), (50, hang), (90, DONE))
    assert len(starts.runs) == 4


def test_restarts_are_counted(tmp_path):
    with pytest.raises(LostError):
        keep_running(tmp_path, settings(launch__max_restarts=1), (5, KILLED), (6, KILLED))
    with pytest.raises(LostError):
        keep_running(tmp_path, settings(), (5, KILLED))
    assert [each.done for each in read_incidents(tmp_path) if each.kind == "gave_up"] == [
        "the run ends: it was restarted 1 times", "the run ends: launch.max_restarts is 0",
    ]  # fmt: skip


def test_an_elastic_run_goes_on_without_what_is_lost(tmp_path):
    lost = Ended(fault=LostError("host b is gone"), lost=2)
    starts = keep_running(
        tmp_path, settings(launch__max_restarts=2, launch__elastic=True), (50, lost), (50, KILLED), (90, DONE)
    )
    assert [run.launch.processes for run in starts.runs] == [4, 2, 2], "the second fault is the first of its kind"
    assert [run.parallel.expert_parallel for run in starts.runs] == [4, 2, 2]
    assert [each.kind for each in read_incidents(tmp_path)] == ["smaller", "restart"]
    assert "on 2 processes (expert parallel 2, 2 micro-batches of 4)" in read_incidents(tmp_path)[0].done


def test_a_rank_that_dies_every_time_is_left_out_of_an_elastic_run(tmp_path, monkeypatch):
    """Real processes: rank 1 of 2 is killed at each start; alone, rank 0 finishes."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60 if os.environ['WORLD_SIZE'] == '2' else 0)\n"
    )

    def start(run: RunConfig) -> Ended:
        write_run(run, tmp_path)
        try:
            run_local(tmp_path, processes=run.launch.processes or 1, command=[sys.executable, "-S", str(script)])
        except MoetrainError as error:
            return Ended(fault=error)
        return Ended()

    run = settings(launch__processes=2, launch__max_restarts=2, launch__elastic=True)
    stopped = supervise(run, run_dir=tmp_path, start=start, say=print, pause=lambda seconds: False,
                        shrink=lambda run, lost: on_fewer(run, processes=1))  # fmt: skip
    assert not stopped
    assert [each.kind for each in read_incidents(tmp_path)] == ["restart", "smaller"]
    now = read_run(tmp_path)
    assert (now.launch.processes, now.parallel.expert_parallel, now.batch.global_batch) == (1, 1, 16)


@pytest.mark.parametrize("processes", range(1, 8))
def test_a_smaller_layout_keeps_the_global_batch_and_passes_every_check(processes):
    run = settings(launch__processes=8, batch__global_batch=24, batch__micro_batch=3)
    smaller = on_fewer(run, processes=processes)
    check(smaller, flatten(to_dict(smaller)))
    assert smaller.batch.global_batch == 24
    assert smaller.batch.micro_batch <= 3
    # the most processes, up to those there are, that divide the batch
    assert smaller.launch.processes == max(n for n in range(1, processes + 1) if 24 % n == 0)


def test_a_smaller_layout_saves_memory_where_the_plan_says_it_must():
    run = settings(launch__processes=8, batch__global_batch=64, batch__micro_batch=8)

    def needs(run: RunConfig) -> float:
        own = run.parallel
        layout = Layout(gpus=run.launch.processes, expert_parallel=own.expert_parallel, zero_stage=own.zero_stage,
                        recompute=own.recompute, micro_batch=run.batch.micro_batch,
                        offload_optimizer=own.offload_optimizer)  # fmt: skip
        return memory_of(run.model, layout, sequence_length=run.batch.sequence_length).total

    plain = on_fewer(run, processes=4)
    assert (plain.batch.micro_batch, plain.parallel) == (8, on_fewer(run, processes=4, device_bytes=10**12).parallel)
    tight = on_fewer(run, processes=4, device_bytes=int(needs(plain)) - 1)
    assert needs(tight) < needs(plain)
    assert on_fewer(run, processes=4, device_bytes=1000) is None


def test_a_smaller_layout_has_room_for_the_masks_of_documents():
    run, masked = (
        settings(launch__processes=8, batch__global_batch=64, batch__micro_batch=8, batch__sequence_length=4096,
                 model__context=4096, parallel__recompute="full", parallel__zero_stage=2, data__mask_documents=is_on)
        for is_on in (False, True)
    )  # fmt: skip
    plain = on_fewer(run, processes=4)
    enough = int(memory_of(plain.model, layout_of(plain), sequence_length=4096).total) + 1
    assert on_fewer(run, processes=4, device_bytes=enough).batch.micro_batch == plain.batch.micro_batch
    assert on_fewer(masked, processes=4, device_bytes=enough).batch.micro_batch < plain.batch.micro_batch


def test_waiting_ends_at_once_when_somebody_asks_to_stop(tmp_path):
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    assert wait(60, run_dir=tmp_path) is True
    assert wait(0.01, run_dir=tmp_path) is False
    request(tmp_path, kill=False)
    assert wait(60, run_dir=tmp_path) is True


def test_the_hosts_that_are_left_meet_where_they_met_before_unless_that_host_is_gone():
    launch = LaunchConfig(kind="hostfile", hosts=["a", "b", "c"], nodes=3, processes=2, master_addr="10.0.0.1",
                          interfaces={"b": "ib1", "c": "ib2"})  # fmt: skip
    left = without(launch, {"b"})
    assert (left.hosts, left.nodes, left.master_addr) == (["a", "c"], 2, "10.0.0.1")
    assert left.interfaces == {"c": "ib2"}, "a name that is no host any more would be refused"
    left = without(launch, {"a"})
    assert (left.hosts, left.nodes, left.master_addr) == (["b", "c"], 2, None)
