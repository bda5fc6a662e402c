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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from moetrain.errors import DataError

Task = dict[str, Any]
Tell = Callable[[dict[str, Any]], None]
Do = Callable[[Task, Tell], dict[str, Any]]


class WorkerLost(DataError):
    """A worker process was killed; the data is not at fault, and what was done before counts."""


@dataclass(frozen=True)
class Done:
    """A task and its answer."""

    task: Task
    answer: dict[str, Any]


Heard = Callable[[Task, dict[str, Any]], None]
"""Called with a task and what its worker tells of it before it is done."""


def nothing_heard(task: Task, told: dict[str, Any]) -> None:
    """Nobody asked."""


class Here:
    """Does tasks in this process, one after the other.

    Args:
        do: as for ``do_tasks``.
    """

    def __init__(self, do: Do) -> None:
        self._do = do

    def run(self, tasks: Iterable[Task], *, heard: Heard = nothing_heard) -> Iterator[Done]:
        """As ``Pool.run``; errors come as they are."""
        for task in tasks:
            yield Done(task=task, answer=self._do(task, partial(heard, task)))

    def close(self) -> None:
        """Nothing is left behind."""


class Pool:
    """Worker processes, started with their first tasks and kept for the next ones.

    Args:
        module: what ``python -m`` runs; it calls ``do_tasks``.
        workers: processes; each has one thread.
    """

    def __init__(self, module: str, *, workers: int) -> None:
        self._module, self._workers = module, workers
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, tasks: Iterable[Task], *, heard: Heard = nothing_heard) -> Iterator[Done]:
        """Have tasks done; answers come as they are ready, in any order.

        Args:
            tasks: what is to be done; drawn from as workers become free.
            heard: called, by whoever draws the answers, with what a worker tells meanwhile.

        Raises:
            WorkerLost: a worker was killed.
            DataError: a worker found the data at fault.
            OSError: a worker could not read or write.
            RuntimeError: a worker failed otherwise.
        """
        results: queue.Queue[Done | tuple[Task, dict[str, Any]] | BaseException | None] = queue.Queue()
        left, lock = iter(tasks), threading.Lock()
        if not self._processes:
            self._processes = [_start(self._module) for _ in range(self._workers)]

        def done(process: subprocess.Popen[str], task: Task) -> Done:
            return Done(task=task, answer=_ask(process, task, told=lambda told: results.put((task, told))))

        def serve(process: subprocess.Popen[str]) -> None:
            try:
                while True:
                    with lock:
                        task = next(left, None)
                    if task is None:
                        return
                    results.put(done(process, task))
            except BaseException as error:
                results.put(error)
            finally:
                results.put(None)

        threads = [threading.Thread(target=serve, args=(process,), daemon=True) for process in self._processes]
        open_ends = len(threads)
        try:
            for thread in threads:
                thread.start()
            while open_ends:
                match results.get():
                    case None:
                        open_ends -= 1
                    case Done() as one:
                        yield one
                    case (task, told):
                        heard(task, told)
                    case BaseException() as error:
                        raise error
        finally:
            if open_ends:  # some worker is in the middle of a task
                self.close()
            for thread in threads:
                thread.join(timeout=5)

    def close(self) -> None:
        """End the processes, whatever they do; tasks that come later start new ones."""
        processes, self._processes = self._processes, []
        _stop(processes)


def do_tasks(do: Do) -> None:
    """Be a worker process: a task from each line of standard input, until it ends, and an answer to each.

    Args:
        do: from a task, and a function that tells of it meanwhile, to its answer; what it raises is raised where the
            tasks are run.
    """
    # whatever a library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    for line in sys.stdin:
        try:
            say(done=do(json.loads(line), lambda told: say(told=told)))
        except DataError as error:
            say(data_error=str(error))
        except OSError as error:
            say(errno=error.errno or 0, error=str(error))
        except BaseException:
            say(crash=traceback.format_exc())


def _start(module: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        # an interrupt from the terminal is this process's to handle
        start_new_session=True,
    )  # fmt: skip


def _stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            # a task that the killed worker did not read; or a thread that still waits for its answer holds the pipe
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _ask(process: subprocess.Popen[str], task: Task, *, told: Tell) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError):
        raise WorkerLost(_death(process.wait())) from None
    while True:
        try:
            line = process.stdout.readline()
        except ValueError:
            line = ""
        if not line:
            raise WorkerLost(_death(process.wait()))
        answer: dict[str, Any] = json.loads(line)
        if "told" not in answer:
            return _done(answer, task=task)
        told(answer["told"])


def _done(answer: dict[str, Any], *, task: Task) -> dict[str, Any]:
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
