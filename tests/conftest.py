"""What every test may use: groups of real processes, golden files, and the skip of tests that need a GPU."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from as_typed import Output
from hypothesis import settings

# a busy machine is slow now and then, and that is no fault of what is tested
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

TIME_LIMIT_SECONDS = 120.0
COLLECTIVE_SECONDS = 60.0

Ranks = Callable[..., list[Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/*.txt anew; then read what changed in them"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` holds a text against tests/golden/NAME.txt, or writes the file with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert text == expected, f"{path} says otherwise; if the change is meant: pytest --update-golden"

    return compare


def pytest_configure() -> None:
    # tensors here are small: more threads only wait for each other, on a busy machine for minutes
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # a long file that is begun late leaves the other processes idle at the end; a small one does not
    long = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, -tests[item.path], item.path))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and there is none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """``ranks(world_size, function, *args)``: the results of ``function(rank, *args)`` in that many real processes.

    Each process has joined a gloo process group and has RANK, WORLD_SIZE and LOCAL_RANK set. The function must be at
    the top of its module and return tensors, numbers, texts or lists and dicts of them. A rank that fails, dies or
    takes longer than ``time_limit`` seconds fails the test, and every other rank is killed.

    Ranks are forks of one process that has imported what they need. With ``fresh=True`` each is an interpreter of its
    own, which takes seconds: for what is measured of the whole process, and for what may depend on the order of sets,
    which only then is another in each rank, as it is in real runs.
    """
    running: list[Any] = []

    def run(
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        time_limit: float = TIME_LIMIT_SECONDS,
        fresh: bool = False,
    ) -> list[Any]:
        directory = Path(tempfile.mkdtemp(prefix="ranks", dir=tmp_path))
        deadline = time.monotonic() + time_limit
        group = _start(world_size, function, args, directory, fresh=fresh)
        running.extend(group)
        fault = _watch(group, deadline=deadline)
        _kill(group)
        if fault:
            pytest.fail(f"{fault}\n{_first_traceback(directory)}", pytrace=False)
        return [torch.load(directory / f"result{rank}", weights_only=True) for rank in range(world_size)]

    yield run
    _kill(running)


def _start(
    world_size: int, function: Callable[..., Any], args: tuple[Any, ...], directory: Path, *, fresh: bool
) -> list[Any]:
    context: Any = torch.multiprocessing.get_context("spawn" if fresh else "forkserver")
    # pickled apart, so that a rank has its environment before it imports the module of the test
    work = pickle.dumps((function, args))
    group = []
    common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(world_size),
              "TORCH_EXTENSIONS_DIR": str(directory / "torch_extensions")}  # fmt: skip
    for rank in range(world_size):
        own = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank_main, args=(rank, world_size, directory, own, work))
        with pytest.MonkeyPatch.context() as environment:
            for name, value in (own if fresh else _of_the_server()).items():
                environment.setenv(name, value)
            process.start()
        group.append(process)
    return group


def _of_the_server() -> dict[str, str]:
    """The environment of the process that ranks are forks of; the first of them starts it."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["rank_imports"])
    # by this alone it finds the modules
    path = os.pathsep.join(path for path in sys.path if path)
    return {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


@pytest.fixture
def real_runs(ranks: Ranks, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run directories of ``real_checkpoints``, trained once in the whole session."""
    import real_checkpoints

    kept = tmp_path_factory.getbasetemp() / "real runs"
    if not kept.exists():
        ranks(2, real_checkpoints.save_runs, tmp_path / "being made")
        (tmp_path / "being made").rename(kept)
    return Path(shutil.copytree(kept, tmp_path / "runs"))


@pytest.fixture
def unused_port() -> int:
    """A port below those that the system hands out: nobody is given it between this look and its use."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def _rank_main(rank: int, world_size: int, directory: Path, environment: dict[str, str], work: bytes) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(work)  # noqa: S301 - made by _start
        # a file, not a TCP port: tests may run side by side without colliding
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        torch.save(function(rank, *args), directory / f"result{rank}")
        if dist.is_initialized():
            # a rank that left early would break the collectives of those behind it
            dist.barrier()
            dist.destroy_process_group()
        # the result is on disk: threads that a library left behind could still abort the interpreter's own clean-up
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        # named by the clock: a failing rank breaks the others, and only the first says why
        (directory / f"{time.monotonic_ns():020d}.traceback").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        # without clean-up, which could wait for the other ranks
        os._exit(1)


def _watch(group: list[Any], *, deadline: float) -> str | None:
    """What went wrong, or None once all have ended well."""
    waiting = {process.sentinel: rank for rank, process in enumerate(group)}
    while waiting:
        ended = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            return f"ranks {sorted(waiting.values())} of {len(group)} were still running at the time limit"
        for sentinel in ended:
            rank = waiting.pop(sentinel)
            group[rank].join()
            if group[rank].exitcode:
                return f"rank {rank} of {len(group)} ended with exit code {group[rank].exitcode}"
    return None


def _kill(group: list[Any]) -> None:
    for process in group:
        if process.is_alive():
            process.kill()
    for process in group:
        process.join()


def _first_traceback(directory: Path) -> str:
    tracebacks = sorted(directory.glob("*.traceback"))
    return tracebacks[0].read_text() if tracebacks else "no rank left a traceback"


@pytest.fixture
def moetrain_in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """The verb without a new process, which would cost half a second."""

    def run(*words: str) -> Output:
        from moetrain.cli.main import main

        code = main(words)
        captured = capsys.readouterr()
        return Output(words, code, captured.out, captured.err)

    return run
