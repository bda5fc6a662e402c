"""docker/compose.yaml without containers: its two services as network namespaces, each with files of its own.

Their entry point, their keys and the command are those of docker/; the image is not built here.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.conftest import LIMIT_SECONDS, SETTINGS, Place
from cluster.two_hosts import ADDRESSES, NAMES, Hosts, missing

pytestmark = pytest.mark.cluster

DOCKER = Path(__file__).parents[2] / "docker"
SHORT = ["schedule.steps=6", "checkpoint.every_steps=null", *SETTINGS]


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path / "hosts", with_ssh=False) as made:
        yield made


def inside(place: Path, number: int, command: list[str]) -> list[str]:
    """A command in a mount namespace of its own, where the user has a home of its own and the services have names."""
    home = place / NAMES[number]
    home.mkdir(parents=True)
    users = Path("/etc/passwd").read_text().splitlines()
    own = [f"root:x:0:0::{home}:/bin/sh", *(line for line in users if not line.startswith("root:"))]
    (home / "passwd").write_text("\n".join(own) + "\n")
    named = [f"{address} {name}" for name, address in zip(NAMES, ADDRESSES, strict=True)]
    (home / "hosts").write_text("\n".join(["127.0.0.1 localhost", *named]) + "\n")
    script = " && ".join(
        [f"mount --bind {shlex.quote(str(home / name))} /etc/{name}" for name in ("passwd", "hosts")]
        + [f"export HOME={shlex.quote(str(home))}", f"exec {shlex.join(command)}"]
    )
    return ["unshare", "--mount", "sh", "-c", script]


def test_the_compose_files_two_services_train_together(place: Place, containers: Hosts, tmp_path: Path) -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    keys = tmp_path / "keys"
    keys.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it where it runs as root
    started: list[subprocess.Popen[str]] = []
    try:
        for number in (1, 0):  # as depends_on has it
            service = services[NAMES[number]]
            assert service["entrypoint"] == ["moetrain-node", "/keys"]
            assert "COPY --chmod=755 docker/node.sh /usr/local/bin/moetrain-node" in (DOCKER / "Dockerfile").read_text()
            words = service["command"]
            if words:
                assert words[:2] == ["moetrain", "train"]
                words = place.words("train", *words[2:], *SHORT)
            command = inside(tmp_path, number, ["sh", str(DOCKER / "node.sh"), str(keys), *words])
            started.append(containers.start(number, command, environment=os.environ | place.environment,
                                            cwd=place.directory))  # fmt: skip
        output, errors = started[-1].communicate(timeout=LIMIT_SECONDS)
        assert started[-1].returncode == 0, errors
        assert "2 nodes of 1 processes (hostfile), expert parallel 2" in output
        assert place.step("two-containers") == 6
    finally:
        for process in started:
            process.kill()
            process.wait()
