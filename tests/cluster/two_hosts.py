"""Two hosts on one machine: network namespaces with an sshd each, joined by a link that can be cut and slowed.

Nothing leaves them: neither has a route to anywhere but the other. They share this machine's file systems, as nodes of
a cluster share one. Needs root and the Debian packages iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PORT = 2222
NAMES = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def missing() -> str:
    """Why the hosts cannot be made here; empty: they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, to make network namespaces"
    absent = [name for name in ("ip", "sshd", "ssh", "ssh-keygen", "pdsh") if _find(name) is None]
    if absent:
        return f"needs {', '.join(absent)}: apt-get install iproute2 openssh-server pdsh"
    tried = f"moetrain-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", tried], capture_output=True, text=True)
    if done.returncode:
        return f"needs network namespaces, which are not allowed here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", tried], check=True)
    return ""


class Hosts:
    """The two hosts, for the length of a ``with`` block.

    Args:
        directory: of keys and settings; without spaces, which ssh's configuration does not take.
        with_ssh: false: no sshd is started, and nothing is set up for ssh.
    """

    def __init__(self, directory: Path, *, with_ssh: bool = True) -> None:
        self.directory = directory
        self._with_ssh = with_ssh
        # of each pair its own: one process may make several
        mark = secrets.token_hex(4)
        self._spaces = [f"moetrain-{mark}-{name}" for name in NAMES]
        self._servers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            if self._with_ssh:
                self._write_ssh()
            for space in self._spaces:
                _call("ip", "netns", "add", space)
            first, second = self._spaces
            _call("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for number, address in enumerate(ADDRESSES):
                self._ip(number, "addr", "add", f"{address}/24", "dev", "eth0")
                self._ip(number, "link", "set", "eth0", "up")
                self._ip(number, "link", "set", "lo", "up")
                if self._with_ssh:
                    self._serve(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.terminate()
            server.wait()
        for space in self._spaces:
            # whatever a failed test left running there
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-KILL", *pids], capture_output=True) if pids else None
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def start(
        self, number: int, command: Sequence[str], *, environment: Mapping[str, str], cwd: Path
    ) -> subprocess.Popen[str]:
        """Start a command on host 0 or 1, where ssh finds the other by name."""
        own = dict(environment) | {"PATH": f"{self.directory / 'bin'}:{environment['PATH']}"}
        return subprocess.Popen(
            ["ip", "netns", "exec", self._spaces[number], *command], env=own, cwd=cwd, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def cut(self) -> None:
        """Take the link down."""
        self._ip(1, "link", "set", "eth0", "down")

    def join(self) -> None:
        """Bring it back."""
        self._ip(1, "link", "set", "eth0", "up")

    def slow(self, rate: str) -> None:
        """Shape the link, e.g. to 10mbit."""
        for space in self._spaces:
            _call("ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate,
                  "burst", "64kb", "latency", "400ms")  # fmt: skip

    def pids(self, number: int) -> list[int]:
        """What runs on a host, sshd aside."""
        told = subprocess.run(["ip", "netns", "pids", self._spaces[number]], capture_output=True, text=True).stdout
        found = []
        for word in told.split():
            try:
                words = Path(f"/proc/{word}/cmdline").read_bytes()
            except OSError:
                continue
            if words and b"sshd" not in words:
                found.append(int(word))
        return found

    def _ip(self, number: int, *words: str) -> None:
        _call("ip", "-n", self._spaces[number], *words)

    def _write_ssh(self) -> None:
        place = self.directory
        for name in ("id", "hostkey"):
            (place / name).unlink(missing_ok=True)
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / name))
        Path("/run/sshd").mkdir(exist_ok=True)
        (place / "sshd_config").write_text(
            f"Port {PORT}\nHostKey {place}/hostkey\nAuthorizedKeysFile {place}/id.pub\nStrictModes no\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nMaxStartups 100\n"
        )
        hosts = "".join(f"Host {name}\n HostName {address}\n" for name, address in zip(NAMES, ADDRESSES, strict=True))
        (place / "ssh_config").write_text(
            f"{hosts}Host *\n Port {PORT}\n User root\n IdentityFile {place}/id\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n ConnectTimeout 5\n"
        )
        (place / "bin").mkdir(exist_ok=True)
        (place / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {_find("ssh")} -F {place}/ssh_config "$@"\n')
        (place / "bin" / "ssh").chmod(0o755)

    def _serve(self, number: int) -> None:
        words = [
            str(_find("sshd")),
            "-D",
            "-f",
            f"{self.directory}/sshd_config",
            "-E",
            f"{self.directory}/sshd{number}.log",
        ]
        self._servers.append(subprocess.Popen(["ip", "netns", "exec", self._spaces[number], *words]))
        for _ in range(50):
            done = subprocess.run(
                ["ip", "netns", "exec", self._spaces[number], f"{self.directory}/bin/ssh", NAMES[number], "true"],
                capture_output=True,
            )
            if done.returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"sshd of {NAMES[number]} does not answer: {done.stderr.decode()}")


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
