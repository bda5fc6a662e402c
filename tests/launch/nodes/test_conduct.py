"""Real agents of several nodes, all on this machine: they meet, hear each other, and end together.

A shell takes the place of ssh and starts them; the ranks are small scripts, so no test imports torch.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import moetrain
from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import ConfigError, DataError, LaunchError
from moetrain.launch.fault import NodeLost
from moetrain.launch.local import Outcome
from moetrain.launch.nodes.conduct import conduct, make_spec
from moetrain.launch.nodes.spec import SPEC_FILE, Spec, from_word, in_a_word, launch_directory, request

PRELUDE = """
import json, os, pathlib, signal, sys, time
from moetrain.parallel.lifeline import die_with_parent
assert die_with_parent()
run_dir, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
def ready():
    (run_dir / f"pid_{rank}.tmp").write_text(str(os.getpid()))
    (run_dir / f"pid_{rank}.tmp").rename(run_dir / f"pid_{rank}")
def sleep_until_killed():
    ready()
    while True: time.sleep(1)
def fail(**entry):
    entry = {"rank": rank, "user": False, "time": time.time()} | entry
    (run_dir / "log" / f"rank_{rank:05d}.error.json").write_text(json.dumps(entry))
    sys.exit(2)
def wait_for(rank):
    while not (run_dir / f"pid_{rank}").exists(): time.sleep(0.01)
"""
STOPS_ON_REQUEST = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nsleep_until_killed()"

MakeSpec = Callable[..., Spec]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    # a name that a shell would take apart
    place = tmp_path / "it's a $RUN & more"
    place.mkdir()
    return place


@pytest.fixture
def spec(run_dir: Path, tmp_path: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch) -> MakeSpec:
    """The spec of a run whose ranks have this body."""
    monkeypatch.chdir(tmp_path)

    def make(body: str, *, nodes: int = 2, **settings: object) -> Spec:
        (tmp_path / "ranks_of_test.py").write_text(PRELUDE + body)
        launch = replace(LaunchConfig(), nodes=nodes, processes=2, master_port=unused_port, lost_after_seconds=3,
                         start_seconds=20)  # fmt: skip
        path = os.pathsep.join([str(Path(moetrain.__file__).parents[1]), str(tmp_path)])
        made = make_spec(run_dir, launch, module="ranks_of_test", hosts=[f"host{n}" for n in range(nodes)],
                         master_addr="127.0.0.1", environment={"PYTHONPATH": path}, node_variable="NODE",
                         dropped=["HIDDEN"])  # fmt: skip
        return replace(made, **settings)

    return make


def agents(spec: Spec, *, only: int | None = None) -> list[str]:
    """A command that starts an agent for each node, or for so many of them, and ends after them."""
    word = in_a_word(launch_directory(Path(spec.run_dir)) / SPEC_FILE)
    command = shlex.join([sys.executable, "-m", "moetrain.launch.nodes.agent", word])
    count = spec.nodes if only is None else only
    return ["sh", "-c", " ".join(f"NODE={node} {command} &" for node in range(count)) + " wait"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(moetrain.__file__).parents[1]), "HIDDEN": "x"}


def run(spec: Spec) -> Outcome:
    return conduct(spec, agents(spec), environment=environment())


@pytest.fixture
def conducted(run_dir: Path) -> Iterator[Callable[[Spec], subprocess.Popen[str]]]:
    """A launcher in a process of its own, which prints what came of it."""
    started: list[subprocess.Popen[str]] = []

    def start(spec: Spec) -> subprocess.Popen[str]:
        body = f"""
from moetrain.launch.nodes.conduct import conduct
from moetrain.launch.nodes.spec import Spec
try:
    print(conduct(Spec(**{spec.__dict__!r}), {agents(spec)!r}, environment={environment()!r}), flush=True)
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}", flush=True)
"""
        process = subprocess.Popen([sys.executable, "-c", body], env=environment(), stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def pids(run_dir: Path, *, count: int = 4) -> list[int]:
    """Process ids of the ranks, once all are ready."""
    wait_until(lambda: len(list(run_dir.glob("pid_[0-9]"))) == count)
    return [int((run_dir / f"pid_{rank}").read_text()) for rank in range(count)]


def wait_until(holds: Callable[[], object], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ranks_of_all_nodes_know_their_places(run_dir: Path, spec: MakeSpec, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "HIDDEN", "GLOO_SOCKET_IFNAME", "OWN")
(run_dir / f"of_{rank}").write_text(" ".join(str(os.environ.get(name)) for name in names))
(run_dir / f"port_{rank}").write_text(os.environ["MASTER_PORT"])
print("hello from rank", rank)
"""
    made = spec(body, interface="ib0", interfaces={"host1": "ib7"})
    made = replace(made, environment={**made.environment, "OWN": "a b"})
    assert run(made) == Outcome(stopped=False)
    interfaces = ["ib0", "ib0", "ib7", "ib7"]
    assert [(run_dir / f"of_{rank}").read_text() for rank in range(4)] == [
        f"{rank} {rank % 2} 4 2 127.0.0.1 None {interfaces[rank]} a b" for rank in range(4)
    ]
    assert len({(run_dir / f"port_{rank}").read_text() for rank in range(4)}) == 1
    assert capfd.readouterr().out == "hello from rank 0\n"
    assert (run_dir / "log/rank_00003.log").read_text() == "hello from rank 3\n"
    # the token and the environment are for the agents alone, and only while they run
    assert not (run_dir / "launch/node.json").exists()


def test_a_rank_that_fails_ends_all_nodes_and_its_error_alone_is_told(run_dir: Path, spec: MakeSpec) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda *_: fail(type="RuntimeError", message="connection closed by peer"))
if rank == 3:
    for other in range(3): wait_for(other)
    fail(type="ValueError", message="the culprit")
sleep_until_killed()
"""
    since = time.monotonic()
    with pytest.raises(LaunchError, match="rank 3 failed with ValueError: the culprit") as caught:
        run(spec(body))
    assert time.monotonic() - since < 15
    assert "connection closed" not in str(caught.value)
    assert not any(map(alive, pids(run_dir, count=3)))


def test_a_users_fault_on_another_node_is_raised_as_such(spec: MakeSpec) -> None:
    with pytest.raises(DataError, match=r"data\.text: no such file"):
        run(spec('if rank == 2: fail(type="DataError", message="data.text: no such file", user=True)'))


def test_clocks_that_differ_do_not_make_another_rank_the_culprit(spec: MakeSpec) -> None:
    """Rank 2 fails as a consequence, and its machine's clock is an hour behind."""
    from moetrain.launch.fault import Ended, find_fault, remove_old_errors
    from moetrain.parallel.lifeline import write_error

    log_dir = Path(spec("").run_dir) / "log"
    log_dir.mkdir()
    remove_old_errors(log_dir)
    write_error(log_dir, rank=0, error=ValueError("the culprit"))
    write_error(log_dir, rank=2, error=RuntimeError("closed by peer"))
    later = log_dir / "rank_00002.error.json"
    import json

    entry = json.loads(later.read_text())
    later.write_text(json.dumps(entry | {"time": entry["time"] - 3600 + 0.2}))
    ended = [
        Ended(rank=rank, code=1, by_us=False, seen=time.time() + ahead, log=log_dir / "x", log_start=0, ahead=ahead)
        for rank, ahead in ((0, 0.0), (2, -3600.0))
    ]
    assert "the culprit" in str(find_fault(ended, log_dir=log_dir))


def test_a_node_whose_agent_is_killed_is_lost_and_takes_the_others_down(
    run_dir: Path, spec: MakeSpec, conducted: Callable[[Spec], subprocess.Popen[str]]
) -> None:
    process = conducted(spec("sleep_until_killed()"))
    ranks = pids(run_dir)
    agent = int(Path(f"/proc/{ranks[2]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(agent, signal.SIGKILL)
    assert process.communicate(timeout=40)[0].startswith("NodeLost: host1 is lost")
    assert not any(map(alive, ranks))


def test_a_node_that_stands_still_is_lost_within_the_stated_time(
    run_dir: Path, spec: MakeSpec, conducted: Callable[[Spec], subprocess.Popen[str]]
) -> None:
    process = conducted(spec("sleep_until_killed()"))
    ranks = pids(run_dir)
    agent = int(Path(f"/proc/{ranks[2]}/stat").read_text().rpartition(")")[2].split()[1])
    since = time.monotonic()
    os.kill(agent, signal.SIGSTOP)
    try:
        assert process.communicate(timeout=40)[0].startswith("NodeLost: host1 is lost")
        assert 2 < time.monotonic() - since < 3 + 10
    finally:
        os.kill(agent, signal.SIGKILL)


def test_a_node_that_does_not_come_is_named(spec: MakeSpec) -> None:
    made = spec("", start_seconds=2, nodes=3)
    with pytest.raises(NodeLost, match=r"host1, host2 did not start within 2 s") as caught:
        conduct(made, agents(made, only=1), environment=environment())
    assert caught.value.hosts == ("host1", "host2")


@pytest.mark.parametrize("begins", ["at once", "later"])
def test_a_launcher_that_gives_up_leaves_no_node_waiting(spec: MakeSpec, run_dir: Path, begins: str) -> None:
    """The first node was reached, the other was not; an agent is no child of the launcher's, as with ssh."""
    waits = spec("ready()", start_seconds=60)
    agent = agents(waits, only=1)[2].removesuffix("& wait")
    pid = shlex.quote(str(run_dir / "agent"))
    late = {"at once": "sleep 2", "later": "true"}[begins]
    told = "echo pdsh@here: host1: ssh exited with exit code 255"
    command = f"export NODE=0; setsid {agent.removeprefix('NODE=0 ')} & echo $! >{pid}; {late}; {told}; sleep 60"
    with pytest.raises(LaunchError, match="no node has started"):
        conduct(waits, ["sh", "-c", command], environment=environment())
    wait_until(lambda: not Path(f"/proc/{(run_dir / 'agent').read_text().strip()}").exists(), seconds=15)


def test_one_request_saves_on_all_nodes(
    run_dir: Path, spec: MakeSpec, conducted: Callable[[Spec], subprocess.Popen[str]]
) -> None:
    process = conducted(spec(STOPS_ON_REQUEST))
    pids(run_dir)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "Outcome(stopped=True, queued='')\n"


def test_a_request_by_file_saves_and_a_second_one_kills(
    run_dir: Path, spec: MakeSpec, conducted: Callable[[Spec], subprocess.Popen[str]]
) -> None:
    process = conducted(spec("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsleep_until_killed()"))
    ranks = pids(run_dir)
    request(run_dir, kill=False)
    time.sleep(2)
    assert all(map(alive, ranks))
    request(run_dir, kill=True)
    assert "LaunchError: killed at the second request" in process.communicate(timeout=20)[0]
    assert not any(map(alive, ranks))


def test_when_the_launcher_is_killed_the_run_saves_and_ends(
    run_dir: Path, spec: MakeSpec, conducted: Callable[[Spec], subprocess.Popen[str]]
) -> None:
    body = """
def save(*_):
    (run_dir / f"saved_{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
sleep_until_killed()
"""
    process = conducted(spec(body))
    ranks = pids(run_dir)
    time.sleep(1.5)  # until the launcher has met the agents
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, ranks)), seconds=15)
    assert len(list(run_dir.glob("saved_*"))) == 4


def test_a_port_in_use_is_told_with_a_way_out(spec: MakeSpec) -> None:
    import socket

    with socket.create_server(("", 0)) as other:
        made = spec("", master_port=other.getsockname()[1])
        with pytest.raises(ConfigError, match=r"launch\.master_port is \d+, which the first node cannot listen on"):
            run(made)


def test_what_does_not_know_the_token_is_not_heard(unused_port: int) -> None:
    from moetrain.launch.machine.ranks import Order
    from moetrain.launch.nodes.channel import First, Other

    first = First(unused_port, nodes=2, token="right", lost_after=5, port_of_ranks=1)
    other = Other(("127.0.0.1", unused_port), node=1, token="wrong", lost_after=5, seconds=1)
    try:
        other.tell(Order.KILL)
        wait_until(lambda: other.lost)
        assert first.missing() == [1]
        assert first.order is Order.GO_ON
    finally:
        first.close()
        other.close()


@pytest.mark.parametrize("path", ["/plain/path_1.json", "/it's a $(dir)/`x` & %n=~;ü\n", "/=3D"])
def test_a_path_becomes_one_harmless_word_and_comes_back(path: str) -> None:
    word = in_a_word(Path(path))
    assert shlex.quote(word) == word
    assert "%" not in word
    assert from_word(word) == Path(path)
