"""What passes between the launcher and the agents of the nodes, by way of the shared RUN_DIR/launch/.

node.json          what the agents are to do (mode 0600: it holds the environment handed over, and the token)
end_TOKEN_00000.json    how a node ended, written by its agent; TOKEN tells one start from another
stop               a request to save and stop, or, if its text is ``kill``, to end at once (`moetrain cancel`)
hostfile           for the deepspeed launcher
"""

from __future__ import annotations

import json
import os
import urllib.parse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.errors import LaunchError
from moetrain.launch.fault import Ended
from moetrain.launch.machine.ranks import Order

SPEC_FILE = "node.json"
STOP_FILE = "stop"
CONSOLE = "console.txt"
"""In RUN_DIR/log: what rank 0 prints, where it has no terminal."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What the agents do."""

    run_dir: str
    """Absolute."""
    module: str
    """Each rank runs ``python -m MODULE RUN_DIR``."""
    directory: str
    """Where the command was given: relative paths of the settings start there."""
    hosts: list[str]
    """Names of the nodes in order; empty where they are known only there."""
    nodes: int
    processes: int
    bind_cores: bool
    master_addr: str
    master_port: int
    token: str
    """Whoever shows it is one of us."""
    environment: dict[str, str]
    """Of the ranks, over the one that the agent finds."""
    interface: str | None
    interfaces: dict[str, str]
    lost_after_seconds: float
    start_seconds: float
    node_variable: str
    """Environment variable that tells a node its number."""
    unattended: bool = False
    """No launcher waits for the agents (Kubernetes): the first one sees to what is left of an earlier start, and a stop
    that was asked for counts as an end."""
    dropped: list[str]
    """Environment variables that whoever starts the agents sets, and that must not reach the ranks."""

    def write(self) -> Path:
        """Leave it where the agents look for it, and remove what an earlier start left."""
        remove_old_ends(Path(self.run_dir))
        path = launch_directory(Path(self.run_dir)) / SPEC_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, asdict(self))
        return path

    def remove(self) -> None:
        """Take it away: what was handed over may hold secrets."""
        (launch_directory(Path(self.run_dir)) / SPEC_FILE).unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class NodeEnd:
    """How one node ended."""

    node: int
    host: str
    ended: list[Ended]
    never_ready: bool = False
    lost: list[int]
    """Nodes that this one has not heard any more; [0] from another than the first: the first one."""
    problem: str = ""
    """Why the ranks here did not even start, or had to end."""
    user: bool = False
    """Whether the problem is one that the user can mend."""
    killed: bool = False
    """Ended by a second request."""

    def write(self, spec: Spec) -> None:
        """Leave it where the launcher looks for it."""
        content = asdict(self) | {"ended": [asdict(each) | {"log": str(each.log)} for each in self.ended]}
        _write(_end_file(spec, self.node), content)


def launch_directory(run_dir: Path) -> Path:
    """Where the launcher and the agents meet."""
    return run_dir / "launch"


def read_spec(path: Path) -> Spec:
    """What the launcher wrote.

    Raises:
        LaunchError: the file is not to be seen from here.
    """
    try:
        return Spec(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LaunchError(
            f"{path} cannot be read on this node ({error}): run_dir must lie in a file system that all nodes share, "
            "under the same path"
        ) from None


def read_ends(spec: Spec) -> dict[int, NodeEnd]:
    """What the agents have written so far, by node."""
    found = {}
    for node in range(spec.nodes):
        try:
            entry: dict[str, Any] = json.loads(_end_file(spec, node).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        ended = [Ended(**each | {"log": Path(each["log"])}) for each in entry["ended"]]
        found[node] = replace(NodeEnd(**entry | {"ended": []}), ended=ended)
    return found


def remove_old_ends(run_dir: Path) -> None:
    """Forget how the nodes ended the last time."""
    for old in launch_directory(run_dir).glob("end_*.json"):
        old.unlink(missing_ok=True)


def no_requests(run_dir: Path) -> None:
    """Forget what was asked of an earlier run; between the starts of one, a request stays."""
    (launch_directory(run_dir) / STOP_FILE).unlink(missing_ok=True)


def requested(run_dir: Path) -> Order:
    """What RUN_DIR/launch/stop asks for."""
    try:
        text = (launch_directory(run_dir) / STOP_FILE).read_text(encoding="utf-8")
    except OSError:
        return Order.GO_ON
    return Order.KILL if text.strip() == "kill" else Order.STOP


def request(run_dir: Path, *, kill: bool) -> None:
    """Leave a request, which the run meets within about a second (a network file system may take up to a minute)."""
    place = launch_directory(run_dir)
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f"{STOP_FILE}.partial"
    partial.write_text("kill\n" if kill else "save\n", encoding="utf-8")
    os.replace(partial, place / STOP_FILE)


def in_a_word(path: Path) -> str:
    """A path as a word that no shell and no launcher takes for anything else."""
    return urllib.parse.quote(str(path), safe="/").replace("~", "%7E").replace("%", "=")


def from_word(word: str) -> Path:
    """The path again."""
    return Path(urllib.parse.unquote(word.replace("=", "%")))


def _end_file(spec: Spec, node: int) -> Path:
    # a node that was cut off may still write how it ended when the next start, with other numbers, has begun
    return launch_directory(Path(spec.run_dir)) / f"end_{spec.token[:8]}_{node:05d}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
