"""The runs of a sweep: side by side, tried again, stopped, taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from programs import by_point, fails, point, statuses, sweep_of, writes

from moetrain.errors import ConfigError
from moetrain.sweep.settings import SweepConfig
from moetrain.sweep.state import Sweep, open_sweep, read_result
from moetrain.sweep.work.queue import loss_at, run_queue, slots


def run(sweep, said=None, steps=None, **programs):
    lines = [] if said is None else said
    return run_queue(
        sweep,
        command=lambda each: by_point(sweep, each, **programs),
        steps=steps or {},
        say=lines.append,
        poll_seconds=0.01,
    )


class TestEnds:
    def test_every_run_is_done_and_its_result_known(self, tmp_path):
        sweep = sweep_of(tmp_path, "a", "b", seeds=[1, 2])
        assert not run(sweep)
        assert statuses(sweep) == {"a": "done", "b": "done"}
        result = Sweep.read(tmp_path).results()["a_seed-2"]
        assert (result.loss, result.seconds, result.max_over_mean, result.dead_experts) == (3.0, 20.0, 1.5, 1)

    def test_a_failure_is_tried_again_then_told_and_the_others_go_on(self, tmp_path):
        sweep, said = sweep_of(tmp_path, "a", "b", retries=2), []
        run(sweep, said, a=fails())
        assert statuses(sweep) == {"a": "failed", "b": "done"}
        failed = Sweep.read(tmp_path).runs[0]
        assert (failed.attempts, failed.note) == (3, "the disk is full")
        assert [line.split()[0] for line in said if "a_seed-1" in line] == ["retried", "retried", "failed"]

    def test_a_no_go_of_preflight_is_not_tried_again(self, tmp_path):
        sweep, said = sweep_of(tmp_path, "a", "b", retries=2), []
        tell = (
            "import sys; from pathlib import Path; from moetrain import errors\n"
            "from moetrain.launch.record import recorded\n"
            "try:\n"
            "    with recorded(Path(sys.argv[1])): raise getattr(errors, sys.argv[2])('node1: no way')\n"
            "except errors.MoetrainError as error: sys.exit(print(f'moetrain: {error}') or 2)"
        )
        programs = {
            each.point: [sys.executable, "-c", tell, str(sweep.run_dir(each)), kind]
            for each, kind in zip(sweep.runs, ("NoGoError", "LaunchError"), strict=True)
        }
        run(sweep, said, **programs)
        assert statuses(sweep) == {"a": "failed", "b": "failed"}
        assert [(each.attempts, each.note) for each in Sweep.read(tmp_path).runs] == [(1, "node1: no way"),
                                                                                      (3, "node1: no way")]  # fmt: skip
        # what an earlier start has left counts no more
        again = sweep_of(tmp_path, "a", "b", retries=1)
        run(again, a=fails())
        assert [each.attempts for each in again.runs] == [2, 0]

    def test_a_run_that_exits_well_without_a_result_has_failed(self, tmp_path):
        sweep = sweep_of(tmp_path, "a", retries=0)
        run(sweep, a=[sys.executable, "-c", "pass"])
        assert statuses(sweep) == {"a": "failed"}

    def test_what_failed_waits_again_at_the_next_start(self, tmp_path):
        run(sweep_of(tmp_path, "a", retries=0), a=fails())
        again = sweep_of(tmp_path, "a", retries=0)
        assert (again.runs[0].status, again.runs[0].attempts) == ("waiting", 0)
        run(again)
        assert statuses(again) == {"a": "done"}


class TestSideBySide:
    def test_no_more_than_jobs_at_a_time(self, tmp_path):
        spans = "import sys,time;p=sys.argv[1];t=time.time();time.sleep(.3);open(p,'a').write(f'{t} {time.time()}\\n')"
        sweep = sweep_of(tmp_path, *"abcdef", jobs=3, retries=0)
        program = [sys.executable, "-c", spans, str(tmp_path / "spans")]
        run(sweep, **dict.fromkeys("abcdef", program))
        times = [tuple(map(float, line.split())) for line in (tmp_path / "spans").read_text().splitlines()]
        at_once = [sum(begun <= moment < ended for begun, ended in times) for moment, _ in times]
        assert len(times) == 6
        assert max(at_once) <= 3

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are bound on Linux alone")
    def test_a_run_is_bound_to_cores_of_its_own_and_we_are_not(self, tmp_path):
        before = os.sched_getaffinity(0)
        sweep = sweep_of(tmp_path, "a", "b", jobs=len(before), retries=0)
        show = "import os,sys;open(sys.argv[1],'a').write(f'{sorted(os.sched_getaffinity(0))}\\n')"
        program = [sys.executable, "-c", show, str(tmp_path / "cores")]
        run(sweep, a=program, b=program)
        for line in (tmp_path / "cores").read_text().splitlines():
            assert len(json.loads(line)) == 1
        assert os.sched_getaffinity(0) == before

    def test_the_machine_is_divided_evenly(self):
        assert [slot.cores for slot in slots(2, cores=[0, 1, 2, 3, 4], environment={})] == [(0, 1), (2, 3)]
        assert [slot.cores for slot in slots(3, cores=[0, 1], environment={})] == [(), (), ()]


class TestStops:
    def test_a_request_lets_every_run_save_and_the_next_start_goes_on(self, tmp_path):
        sweep = sweep_of(tmp_path, "a", "b")
        slow = writes(sweep.run_dir(sweep.runs[0]), loss=3.0, seconds=20)
        metrics = sweep.run_dir(sweep.runs[0]) / "metrics.jsonl"
        threading.Thread(target=_signal_when, args=(metrics, os.getpid())).start()
        assert run(sweep, a=slow)
        assert statuses(sweep) == {"a": "waiting", "b": "waiting"}
        assert read_result(sweep.run_dir(sweep.runs[0])) is None
        so_far = len(metrics.read_text().splitlines())
        assert not run(sweep_of(tmp_path, "a", "b"))
        assert statuses(sweep) == {"a": "done", "b": "done"}
        assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(1, 11), 10]
        assert so_far < 10

    def test_a_run_that_a_killed_sweep_left_at_work_is_waited_for(self, tmp_path):
        sweep, said = sweep_of(tmp_path, "a"), []
        place = sweep.run_dir(sweep.runs[0])
        hold = (
            "import sys,time,subprocess;from pathlib import Path;from moetrain.launch.lock import RunLock\n"
            "with RunLock(Path(sys.argv[1])):\n"
            "    print('held', flush=True); time.sleep(.5); subprocess.run(sys.argv[2:])"
        )
        with subprocess.Popen([sys.executable, "-c", hold, str(place), *writes(place, loss=2.5)],
                              stdout=subprocess.PIPE, text=True) as left:  # fmt: skip
            assert left.stdout is not None
            assert left.stdout.readline() == "held\n"
            run(sweep, said, a=fails())
        assert "another process is at work" in said[0]
        assert Sweep.read(tmp_path).results()["a_seed-1"].loss == 2.5


class TestHalving:
    def test_the_worse_half_stops_at_the_rung(self, tmp_path):
        sweep = sweep_of(tmp_path, *"abcd", halving=2, rungs=[0.5])
        losses = {"a": 2.0, "b": 4.0, "c": 1.0, "d": 5.0}
        programs = {name: writes(tmp_path / "runs" / f"{name}_seed-1", loss=loss, seconds=1.5)
                    for name, loss in losses.items()}  # fmt: skip
        run(sweep, steps=dict.fromkeys("abcd", 10), **programs)
        # b is worse than a, c better than all before, d worse than the best two of four
        assert statuses(sweep) == {"a": "done", "b": "stopped", "c": "done", "d": "stopped"}
        assert "is not among the best 1 of 2" in Sweep.read(tmp_path).runs[1].note

    def test_the_loss_at_a_step_is_of_the_lines_up_to_it(self):
        lines = [{"step": step, "loss": float(step)} for step in (2, 4, 6, 8)]
        assert loss_at(lines, step=6) == 4.0
        assert loss_at(lines, step=9) is None
        assert loss_at([], step=1) is None


class TestState:
    def test_a_sweep_grows_and_keeps_what_it_has(self, tmp_path):
        run(sweep_of(tmp_path, "a"))
        assert statuses(sweep_of(tmp_path, "a", "b", seeds=[1, 2])) == {"a": "waiting", "b": "waiting"}
        kept = [(each.name, each.status) for each in Sweep.read(tmp_path).runs]
        assert ("a_seed-1", "done") in kept
        assert len(kept) == 4

    def test_another_point_of_the_same_name_is_refused(self, tmp_path):
        sweep_of(tmp_path, "a")
        other = point("a")
        other = type(other)(**{**other.__dict__, "overrides": ("optim.lr=1",)})
        with pytest.raises(ConfigError, match=r"1 points of .* other settings than before, such as a, name=a -> optim"):
            open_sweep(tmp_path, SweepConfig(), [other])

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"points": [{}], "runs": [], "config": {}}'])
    def test_a_damaged_file_is_told(self, tmp_path, text):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            Sweep.read(tmp_path)


def _signal_when(path, pid):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
