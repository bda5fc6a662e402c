"""Who is behind, from what every rank wrote; and the files they write."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from moetrain.errors import DataError
from moetrain.parallel.lifeline import HUNG
from moetrain.watch.board import Beat, Board, claim, clear, furthest_step, read_beats
from moetrain.watch.hang import verdict
from moetrain.watch.incidents import Incidents, read_incidents, summary
from moetrain.watch.progress import TRAINING, Progress
from moetrain.watch.rank import Stragglers

HOST = socket.gethostname()
WAITING = Beat(rank=0, host=HOST, pid=1, beat=7, count=120, step=37, waits=True,
               place="the all-to-all of layer 2 (the forward pass)")  # fmt: skip


def test_the_rank_with_the_fewest_marks_is_named_and_where_the_others_wait():
    late = replace(WAITING, rank=1, count=117, place="the forward pass of layer 2", waits=False)
    before = [WAITING, late, replace(WAITING, rank=2)]
    after = [replace(each, beat=9) for each in before]
    found = verdict(before, after, host=HOST)
    assert found.rank == 1
    assert found.text == (
        "rank 1 is behind, in the forward pass of layer 2 at step 37; "
        "ranks 0, 2 wait in the all-to-all of layer 2 (the forward pass)"
    )


def test_a_rank_that_writes_no_more_is_the_culprit_even_in_the_same_collective():
    process = subprocess.Popen(["sleep", "60"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        stopped = replace(WAITING, rank=1, pid=process.pid)
        found = verdict([WAITING, stopped], [replace(WAITING, beat=9), stopped], host=HOST)
        assert found.rank == 1
        assert (
            "rank 1 is behind: its process is stopped (SIGSTOP), last seen in the all-to-all of layer 2" in found.text
        )
        elsewhere = replace(stopped, host="node7")
        found = verdict([WAITING, elsewhere], [replace(WAITING, beat=9), elsewhere], host=HOST)
        assert f"no sign of life from it, process {process.pid} on node7" in found.text
    finally:
        process.kill()
        process.wait()


def test_where_all_are_as_far_nobody_is_blamed():
    both = [WAITING, replace(WAITING, rank=1)]
    found = verdict(both, [replace(each, beat=9) for each in both], host=HOST)
    assert found.rank is None
    assert "no rank is behind, look at the network between them" in found.text


def test_a_rank_that_never_began_is_told():
    found = verdict([WAITING, None], [replace(WAITING, beat=9), None], host=HOST)
    assert found.rank == 1
    assert found.text.startswith("rank 1 never began; rank 0 waits in")


def test_the_board_holds_what_each_rank_wrote_last(tmp_path):
    boards = [Board(tmp_path, rank=rank) for rank in range(2)]
    long = replace(WAITING, place="the all-to-all of counts of layer 12 (the backward pass)", own_seconds=0.25)
    boards[0].write(long)
    boards[0].write(WAITING)
    assert read_beats(tmp_path, world_size=3) == [WAITING, None, None]
    boards[1].write(replace(WAITING, rank=1, step=38))
    assert furthest_step(read_beats(tmp_path, world_size=3)) == 38
    assert [claim(tmp_path), claim(tmp_path)] == [True, False]
    clear(tmp_path)
    assert read_beats(tmp_path, world_size=2) == [None, None]
    clear(tmp_path)


HANGS_ON_A_FULL_DISK = """
import errno, sys, time
from pathlib import Path
from moetrain.watch.hang import Patience, Watchdog
from moetrain.watch.progress import Progress

def on_hang(step, found):
    raise OSError(errno.ENOSPC, "No space left on device")

watchdog = Watchdog(Path(sys.argv[1]), rank=0, world_size=1, progress=Progress(), on_hang=on_hang,
                    patience=Patience(training=0.2, otherwise=0.2), log=open("/dev/full", "w"))
watchdog.start()
time.sleep(60)
"""


def test_a_rank_that_hangs_ends_although_the_disk_is_full(tmp_path):
    command = [sys.executable, "-c", HANGS_ON_A_FULL_DISK, str(tmp_path)]
    assert subprocess.run(command, timeout=30, check=False).returncode == HUNG


def test_progress_says_in_words_where_a_rank_is():
    progress = Progress()
    assert progress.place() == "starting"
    progress.task = TRAINING
    progress.at("the forward pass", 3)
    assert progress.place() == "the forward pass of layer 3"
    progress.enter("the all-to-all")
    assert progress.place() == "the all-to-all of layer 3 (the forward pass)"
    progress.leave()
    with progress.during("saving"):
        assert progress.place() == "saving: the forward pass of layer 3"
    assert progress.place() == "the forward pass of layer 3"
    assert progress.count == 4


def beats(*seconds: float | None) -> list[Beat]:
    return [replace(WAITING, rank=rank, own_seconds=each) for rank, each in enumerate(seconds)]


def test_a_slow_rank_is_told_once_when_it_starts_and_once_when_it_ends():
    stragglers = Stragglers(ratio=1.5)
    assert stragglers.look(beats(0.1, None, 0.3)) == [], "not all have measured yet"
    assert stragglers.look(beats(0.1, 0.1, 0.14)) == []
    (started,) = stragglers.look(beats(0.1, 0.11, 0.2))
    assert (started.rank, started.is_slow) == (2, True)
    assert "rank 2" in started.text
    assert "200.0 ms" in started.text
    assert "(1.90 times)" in started.text, "0.2 over the median of 0.1 and 0.11"
    assert stragglers.look(beats(0.1, 0.11, 0.14)) == [], "not yet half-way back"
    (over,) = stragglers.look(beats(0.1, 0.11, 0.12))
    assert (over.rank, over.is_slow) == (2, False)


def test_of_two_ranks_the_slow_one_is_found():
    assert [each.rank for each in Stragglers(ratio=1.5).look(beats(0.1, 0.2))] == [1]


def test_incidents_are_lines_that_can_be_read_again(tmp_path):
    said: list[str] = []
    incidents = Incidents(tmp_path, say=said.append)
    incidents.add("spike", step=1200, rank=None, what="the loss is 9", done="nothing")
    incidents.add("hang", step=None, rank=3, what="no progress", done="stopped")
    incidents.add("spike", step=1300, rank=None, what="the loss is 8", done="nothing")
    found = read_incidents(tmp_path)
    assert [(each.kind, each.step, each.rank) for each in found] == [
        ("spike", 1200, None), ("hang", None, 3), ("spike", 1300, None),
    ]  # fmt: skip
    assert said[:2] == ["incident at step 1,200: the loss is 9; nothing", "incident: no progress; stopped"]
    assert summary(found) == "3 (2 spike, 1 hang)"
    with (tmp_path / "incidents.jsonl").open("a") as file:
        file.write('{"time": 1, "st')
    assert read_incidents(tmp_path) == found, "a line torn by a full disk"
    incidents.add("restart", step=1, rank=None, what="x", done="y")
    assert [each.kind for each in read_incidents(tmp_path)] == ["spike", "hang", "spike", "restart"]
    with (tmp_path / "incidents.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="line 6, is no incident"):
        read_incidents(tmp_path)
    assert read_incidents(tmp_path / "none") == []
