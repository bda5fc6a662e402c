"""Worker processes: kept from one round of tasks to the next, and never left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.errors import DataError
from moetrain.parallel.pool import Here, Pool, WorkerLost

MODULE = """
import os, signal, time
from moetrain.errors import DataError
from moetrain.parallel.pool import do_tasks

def do(task, tell):
    match task["what"]:
        case "pid":
            return {"pid": os.getpid()}
        case "tell":
            print("a library's chatter")
            for number in range(task["count"]):
                tell({"number": number})
            return {}
        case "sleep":
            time.sleep(60)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "data":
            raise DataError("the data is bad")
        case "full":
            raise OSError(28, "No space left on device")

if __name__ == "__main__":
    do_tasks(do)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    (tmp_path / "worker_of_test.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    made = Pool("worker_of_test", workers=2)
    yield made
    made.close()


def pids(pool: Pool, count: int = 20) -> set[int]:
    return {done.answer["pid"] for done in pool.run({"what": "pid"} for _ in range(count))}


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_workers_are_kept_for_the_next_round_and_gone_when_closed(pool: Pool) -> None:
    first = pids(pool)
    assert os.getpid() not in first
    assert len(first | pids(pool) | pids(pool)) <= 2
    pool.close()
    assert not any(map(is_alive, first))
    assert not first & pids(pool), "tasks that come later start new ones"


def test_what_a_worker_tells_meanwhile_is_heard_in_order_before_its_answer(pool: Pool) -> None:
    seen: list[object] = []
    for done in pool.run([{"what": "tell", "count": 3}], heard=lambda task, told: seen.append(told["number"])):
        seen.append(done.task["what"])
    assert seen == [0, 1, 2, "tell"]


def test_a_round_that_is_left_in_the_middle_leaves_no_process_and_waits_for_none(pool: Pool) -> None:
    before = pids(pool)
    start = time.monotonic()
    for _ in pool.run([{"what": "pid"}, {"what": "sleep"}]):
        break
    assert time.monotonic() - start < 10
    assert not any(map(is_alive, before))
    assert pids(pool)


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [("die", WorkerLost, "SIGKILL"), ("data", DataError, "the data is bad"), ("full", OSError, "No space left")],
)
def test_a_fault_of_a_worker_comes_through(pool: Pool, what: str, error: type[BaseException], told: str) -> None:
    with pytest.raises(error, match=told):
        list(pool.run([{"what": what}]))
    assert pids(pool), "and the next tasks are done"


def test_here_tasks_are_done_one_after_the_other_as_their_answers_are_asked_for() -> None:
    done: list[object] = []

    def do(task, tell):  # type: ignore[no-untyped-def]
        tell({"begun": task["number"]})
        return {"square": task["number"] ** 2}

    answers = Here(do).run(({"number": number} for number in range(3)), heard=lambda task, told: done.append(told))
    assert next(iter(answers)).answer == {"square": 0}
    assert done == [{"begun": 0}]
    assert [one.answer["square"] for one in answers] == [1, 4]
