"""The fixture that runs a function in real processes: a fault in one of them must never pass for success."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist


def _report(rank: int, offset: int) -> dict[str, int]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return {"rank": int(os.environ["RANK"]), "world": int(os.environ["WORLD_SIZE"]), "sum": int(total)}


def _fail_while_others_wait(rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def _die(rank: int) -> None:
    os.kill(os.getpid(), 9)


def _sleep(rank: int) -> None:
    time.sleep(3600)


def test_results_come_in_the_order_of_ranks(ranks) -> None:
    assert ranks(2, _report, 10) == [{"rank": rank, "world": 2, "sum": 21} for rank in range(2)]


def test_a_failing_rank_fails_the_test_with_its_own_traceback(ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1:\n(.|\n)*ValueError: the reason"):
        ranks(2, _fail_while_others_wait)


def test_a_rank_that_dies_fails_the_test(ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 0 of 1 ended with exit code -9"):
        ranks(1, _die)


def test_a_rank_that_hangs_is_ended_at_the_time_limit(ranks) -> None:
    with pytest.raises(pytest.fail.Exception, match="still running at the time limit"):
        ranks(1, _sleep, time_limit=1.0)
