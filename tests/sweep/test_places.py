"""Where the runs of a sweep work: hosts in groups, SLURM's queue; what does not fit is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from programs import statuses, sweep_of, writes

from moetrain.config.checks import resolve
from moetrain.config.freeze import freeze, write_run
from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import ConfigError, LaunchError
from moetrain.launch.cluster import slurm
from moetrain.launch.nodes.hosts import hosts_of, shared
from moetrain.launch.record import read_record, recorded
from moetrain.sweep.settings import SweepConfig
from moetrain.sweep.state import Run, Sweep
from moetrain.sweep.work.array import next_directory, settle, take_up
from moetrain.sweep.work.places import launch_of
from moetrain.sweep.work.queue import host_slots, run_queue


def on_hosts(*names: str, **settings: object) -> LaunchConfig:
    return LaunchConfig(kind="hostfile", hosts=list(names), **settings)  # type: ignore[arg-type]


class TestHosts:
    def test_a_run_has_all_hosts_or_its_part_of_them(self):
        assert shared(on_hosts("a", "b", "c", "d"), jobs=1).nodes == 4
        assert shared(on_hosts("a", "b", "c", "d", "e"), jobs=2).nodes == 2
        assert shared(on_hosts("a", "b", "c", "d", nodes=1), jobs=3).nodes == 1

    def test_slots_of_a_file_are_processes_of_every_run(self, tmp_path):
        (tmp_path / "hosts").write_text("a slots=3\nb slots=3\n")
        launch = shared(LaunchConfig(kind="hostfile", hostfile=str(tmp_path / "hosts")), jobs=2)
        assert (launch.nodes, launch.processes) == (1, 3)
        groups = host_slots(launch, jobs=2, directory=tmp_path / "groups")
        assert [Path(slot.words[0].partition("=")[2].strip('"')).read_text() for slot in groups] == [
            "a slots=3\n", "b slots=3\n"]  # fmt: skip

    @pytest.mark.parametrize(
        ("launch", "jobs", "told"),
        [
            (on_hosts("a", "b"), 3, "jobs is 3, each on 1 host, but 2 are named: use jobs=2"),
            (on_hosts("a", "b", "c", nodes=2), 2, "jobs is 2, each on 2 hosts, but 3 are named: use jobs=1"),
            (on_hosts("a", "b", master_addr="a"), 2, "launch.master_addr is a, but jobs is 2"),
        ],
    )
    def test_hosts_that_do_not_suffice_are_told(self, launch, jobs, told):
        with pytest.raises(ConfigError, match=told):
            shared(launch, jobs=jobs)

    def test_each_run_gets_the_hosts_of_its_group_and_no_two_at_a_time_the_same(self, tmp_path):
        launch = shared(on_hosts("a", "b", "c", "d"), jobs=2)
        places = host_slots(launch, jobs=2, directory=tmp_path / "hosts")
        groups = [
            [host.name for host in hosts_of(LaunchConfig(kind="hostfile", hostfile=str(tmp_path / "hosts" / name)))]
            for name in ("hosts_0", "hosts_1")
        ]
        assert groups == [["a", "b"], ["c", "d"]]
        sweep = sweep_of(tmp_path / "s", "p", "q", retries=0)
        show = "import sys,time; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n'); time.sleep(.5)"
        words = [sys.executable, "-c", show, str(tmp_path / "seen")]
        run_queue(sweep, command=lambda run: words, steps={}, say=lambda line: None, places=places)
        seen = (tmp_path / "seen").read_text().splitlines()
        assert sorted(seen) == sorted(slot.words[0] for slot in places)


class TestLaunchers:
    def test_one_launcher_for_a_sweep(self):
        with pytest.raises(ConfigError, match=r"launch.kind is local and slurm in one sweep"):
            launch_of(SweepConfig(), [LaunchConfig(), LaunchConfig(kind="slurm")])
        with pytest.raises(ConfigError, match=r"kubernetes, but a sweep knows local, hostfile and slurm"):
            launch_of(SweepConfig(), [LaunchConfig(kind="kubernetes")])
        with pytest.raises(ConfigError, match=r"halving is 2, but in SLURM's queue nobody compares the runs"):
            launch_of(SweepConfig(halving=2), [LaunchConfig(kind="slurm")])

    def test_the_launcher_may_change_from_start_to_start(self, moetrain_in_process, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        words = ("model.num_layers=1,2", "name=moved", "launch=slurm", "launch.slurm.partition=gpu", "launch.nodes=2")
        done = moetrain_in_process("sweep", *words, "jobs=4", "retries=3", "--dry-run")
        assert "#SBATCH --array=0-1%4\n" in done.stdout
        assert "#SBATCH --nodes=2\n" in done.stdout
        assert "--retries 3 --array" in done.stdout
        assert list(tmp_path.iterdir()) == []


class TestQueued:
    """What became of a run that SLURM has or had; squeue itself is asked in tests/cluster."""

    @pytest.fixture
    def queued(self, tmp_path) -> tuple[Sweep, Run]:
        sweep = sweep_of(tmp_path, "a")
        (run,) = sweep.runs
        run.status = "queued"
        return sweep, run

    def test_one_that_is_at_its_end_is_done(self, queued):
        sweep, run = queued
        subprocess.run(writes(sweep.run_dir(run), loss=2.0), check=True)
        settle(sweep)
        assert (run.status, run.note) == ("done", "")

    def test_one_that_never_ran_has_failed_and_waits_again_at_the_next_start(self, queued):
        sweep, run = queued
        settle(sweep)
        assert run.status == "failed"
        assert run.note.startswith("it left the queue before anything ran")
        take_up(sweep)
        assert statuses(sweep) == {"a": "waiting"}

    def test_one_that_failed_says_why_and_one_that_was_stopped_waits(self, queued):
        sweep, run = queued
        with pytest.raises(LaunchError), recorded(sweep.run_dir(run)):
            raise LaunchError("rank 1 ended with exit code 1\nmore")
        settle(sweep)
        assert (run.status, run.note) == ("failed", "rank 1 ended with exit code 1")

    def test_nothing_is_guessed_where_squeue_does_not_answer(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        sweep = sweep_of(tmp_path, "a")
        sweep.runs[0].status = "queued"
        slurm.remember(sweep.run_dir(sweep.runs[0]), "7_0")
        with pytest.raises(LaunchError, match="squeue is not installed here"):
            settle(sweep)
        assert sweep.runs[0].status == "queued"

    def test_each_array_has_a_directory_of_its_own(self, tmp_path):
        sweep = sweep_of(tmp_path, "a")
        assert next_directory(sweep) == tmp_path / "array" / "001"
        (tmp_path / "array" / "009").mkdir(parents=True)
        assert next_directory(sweep).name == "010"

    def test_a_run_whose_sweep_is_gone_is_not_shown_as_running(self, tmp_path):
        sweep = sweep_of(tmp_path, "a")
        sweep.runs[0].status = "running"
        settle(sweep)
        assert (sweep.runs[0].status, sweep.runs[0].note) == ("waiting", "its sweep is gone: the same command goes on")


def test_a_command_of_an_array_is_tried_again_in_its_place(tmp_path):
    """The first process of a job needs nothing of SLURM for that."""
    count = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.open('a').write('x'); sys.exit(int(sys.argv[2]))"

    def starts(code: int) -> tuple[int, int]:
        path = tmp_path / str(code)
        words = ["-m", "moetrain.launch.cluster.job", "--retries", "2", "--"]
        command = [sys.executable, "-c", count, str(path), str(code)]
        done = subprocess.run([sys.executable, *words, *command], capture_output=True)
        return done.returncode, len(path.read_text())

    assert starts(2) == (2, 3)
    assert starts(0) == (0, 1)
    assert starts(75) == (75, 1), "a stop that was asked for"
    assert starts(1) == (1, 1), "ended by moetrain cancel"


def test_a_run_of_an_array_whose_nodes_are_not_fit_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run_dir = tmp_path / "runs" / "unfit"
    run_dir.mkdir(parents=True)
    write_run(resolve(replace(freeze({"name": "unfit"}), run_dir=str(run_dir)), default_processes=1), run_dir)
    words = ["-m", "moetrain.launch.cluster.job", "--retries", "2", "--", *slurm.run_words(run_dir)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("was not started: preflight says no-go: ") == 1
    assert "is tried again" not in done.stdout
    record = read_record(run_dir)
    assert record is not None
    assert (record.state, record.final) == ("failed", True)
    assert "GLOO_SOCKET_IFNAME=ib77: there is no interface ib77" in record.message
