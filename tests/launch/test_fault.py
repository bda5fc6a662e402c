from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from moetrain.errors import ConfigError, DataError, LaunchError
from moetrain.launch.fault import Ended, find_fault, remove_old_errors
from moetrain.parallel.lifeline import STOPPED


def ended(
    log_dir: Path, rank: int, code: int, *, by_us: bool = False, seen: float = 100.0, log_start: int = 0
) -> Ended:
    log = log_dir / f"rank_{rank:05d}.log"
    return Ended(rank=rank, code=code, by_us=by_us, seen=seen, log=log, log_start=log_start)


def write_error(
    log_dir: Path, rank: int, *, kind: str = "RuntimeError", message: str = "boom", user: bool = False, time: float
) -> None:
    entry = {"rank": rank, "type": kind, "message": message, "user": user, "time": time}
    (log_dir / f"rank_{rank:05d}.error.json").write_text(json.dumps(entry))


def test_the_earliest_error_is_the_cause_and_the_only_one_told(tmp_path: Path) -> None:
    write_error(tmp_path, 0, message="connection closed by peer", time=99.9)
    write_error(tmp_path, 1, kind="ValueError", message="a bad token", time=99.5)
    fault = find_fault([ended(tmp_path, 0, 1, seen=99.8), ended(tmp_path, 1, 3)], log_dir=tmp_path)
    assert type(fault) is LaunchError
    assert "rank 1" in str(fault)
    assert "ValueError: a bad token" in str(fault)
    assert "exit code 3" in str(fault)
    assert str(tmp_path / "rank_00001.log") in str(fault)
    assert "rank 0" not in str(fault)
    assert "connection closed" not in str(fault)


def test_a_killed_rank_goes_before_the_connection_errors_it_caused(tmp_path: Path) -> None:
    # The other rank's error is written before the launcher's next look notices the death.
    write_error(tmp_path, 0, message="connection closed by peer", time=99.95)
    fault = find_fault([ended(tmp_path, 0, 1), ended(tmp_path, 1, -signal.SIGKILL)], log_dir=tmp_path)
    assert "rank 1 ended with SIGKILL (often out of memory" in str(fault)


def test_an_abort_well_after_the_first_error_is_a_consequence_of_it(tmp_path: Path) -> None:
    write_error(tmp_path, 0, message="the loss is not finite", time=98.0)
    fault = find_fault([ended(tmp_path, 0, 1), ended(tmp_path, 1, -signal.SIGABRT)], log_dir=tmp_path)
    assert "rank 0 failed with RuntimeError: the loss is not finite" in str(fault)


def test_ranks_ended_by_the_launcher_are_not_the_cause(tmp_path: Path) -> None:
    workers = [
        ended(tmp_path, 0, -signal.SIGKILL, by_us=True, seen=99.0),
        ended(tmp_path, 1, STOPPED, seen=99.0),
        ended(tmp_path, 2, 1),
    ]
    assert "rank 2 ended with exit code 1" in str(find_fault(workers, log_dir=tmp_path))


def test_without_an_error_file_the_end_of_this_starts_log_is_shown(tmp_path: Path) -> None:
    old = "from an earlier start\n"
    (tmp_path / "rank_00000.log").write_text(old + "".join(f"line {i}\n" for i in range(40)))
    shown = str(find_fault([ended(tmp_path, 0, 1, log_start=len(old))], log_dir=tmp_path)).splitlines()[1:]
    assert [line.strip() for line in shown] == [f"line {i}" for i in range(25, 40)]
    (tmp_path / "rank_00000.log").write_text(old)
    assert "earlier" not in str(find_fault([ended(tmp_path, 0, 1, log_start=len(old))], log_dir=tmp_path))


def test_a_torn_error_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.error.json").write_text('{"rank": 0, "type": "Val')
    (tmp_path / "rank_00000.log").write_text("Traceback: disk full\n")
    assert "disk full" in str(find_fault([ended(tmp_path, 0, 1)], log_dir=tmp_path))


@pytest.mark.parametrize(
    "error", [DataError("data.text: no such file"), ConfigError(["a is 1,\n    but b is 2", "c is 3"])]
)
def test_a_users_fault_comes_back_as_it_was_raised(tmp_path: Path, error: Exception) -> None:
    write_error(tmp_path, 1, kind=type(error).__name__, message=str(error), user=True, time=99.0)
    fault = find_fault([ended(tmp_path, 0, -signal.SIGTERM, by_us=True), ended(tmp_path, 1, 2)], log_dir=tmp_path)
    assert type(fault) is type(error)
    assert str(fault) == str(error)


@pytest.mark.parametrize("kind", ["SomebodysError", "annotations", "MoetrainError"])
def test_a_users_fault_of_unknown_type_still_shows_its_message_alone(tmp_path: Path, kind: str) -> None:
    write_error(tmp_path, 0, kind=kind, message="mend this", user=True, time=99.0)
    assert str(find_fault([ended(tmp_path, 0, 2)], log_dir=tmp_path)) == "mend this"


def test_old_error_files_go_and_logs_stay(tmp_path: Path) -> None:
    write_error(tmp_path, 3, time=1.0)
    (tmp_path / "rank_00003.log").write_text("kept")
    remove_old_errors(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_00003.log"]
