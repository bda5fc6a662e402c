"""Worker processes: each takes the next task as soon as it is free.

Processes of their own (``python -m``), neither forked nor ``multiprocessing``: a fork after a parallel encode can
hang, and nothing here needs pickle, an importable main module, or an orphan to be looked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moetrain.errors import DataError

Task = dict[str, Any]


class WorkerLost(DataError):
    """A worker process was killed; the data is not at fault, and what was done before counts."""


@dataclass(frozen=True)
class Done:
    """A task and its answer."""

    task: Task
    answer: dict[str, Any]


def run_tasks(tasks: Iterator[Task], *, module: str, workers: int) -> Iterator[Done]:
    """Have tasks done by worker processes; answers come as they are ready, in any order.

    Args:
        tasks: what is to be done; drawn from as workers become free.
        module: what ``python -m`` runs; it calls ``do_tasks``.
        workers: processes; each has one thread.

    Raises:
        WorkerLost: a worker was killed.
        DataError: a worker found the data at fault.
        OSError: a worker could not read or write.
        RuntimeError: a worker failed otherwise.
    """
    results: queue.Queue[Done | BaseException | None] = queue.Queue()
    lock = threading.Lock()
    processes = [_start(module) for _ in range(workers)]

    def serve(process: subprocess.Popen[str]) -> None:
        try:
            while True:
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                results.put(Done(task=task, answer=_ask(process, task)))
        except BaseException as error:
            results.put(error)
        finally:
            results.put(None)

    threads = [threading.Thread(target=serve, args=(process,), daemon=True) for process in processes]
    try:
        for thread in threads:
            thread.start()
        open_ends = len(threads)
        while open_ends:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                open_ends -= 1
            else:
                yield result
    finally:
        _stop(processes, threads)


def do_tasks(do: Callable[[Task], dict[str, Any]]) -> None:
    """Be a worker process: a task from each line of standard input, until it ends, and an answer to each.

    Args:
        do: from a task to its answer; what it raises is raised where ``run_tasks`` is called.
    """
    # whatever a library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"done": do(json.loads(line))}
        except DataError as error:
            answer = {"data_error": str(error)}
        except OSError as error:
            answer = {"errno": error.errno or 0, "error": str(error)}
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _start(module: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        # an interrupt from the terminal is this process's to handle
        start_new_session=True,
    )  # fmt: skip


def _stop(processes: list[subprocess.Popen[str]], threads: list[threading.Thread]) -> None:
    for process in processes:
        process.kill()
        process.wait()
    for thread in threads:
        thread.join(timeout=5)
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a task that the killed worker did not read
                pipe.close()


def _ask(process: subprocess.Popen[str], task: Task) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except (BrokenPipeError, ValueError):
        line = ""
    if not line:
        raise WorkerLost(_death(process.wait()))
    answer: dict[str, Any] = json.loads(line)
    if "data_error" in answer:
        raise DataError(answer["data_error"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["error"])
    if "crash" in answer:
        raise RuntimeError(f"a worker failed on {task}:\n{answer['crash']}")
    done: dict[str, Any] = answer["done"]
    return done


def _death(code: int) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    why = " (often out of memory: set prepare.workers lower)" if code == -signal.SIGKILL else ""
    return f"a worker process ended with {how}{why}; the same command goes on from the shards that are done"
