"""A real SLURM of two nodes on one machine: munged, slurmctld, and a slurmd for each node.

sbatch, srun, squeue, scontrol, arrays, --signal, time limits and requeueing are those of a cluster; only accounting is
missing, which would need a data base. Needs root and the Debian packages slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

NODES = ("n1", "n2")


def missing() -> str:
    """Why it cannot run here; empty: it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, to run SLURM's daemons"
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "srun", "munged") if _find(name) is None]
    return f"needs {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


class Slurm:
    """The cluster, for the length of a ``with`` block.

    Args:
        directory: of settings, states and logs; without spaces.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """With which SLURM's commands find this cluster."""
        return {"SLURM_CONF": str(self.directory / "slurm.conf")}

    def __enter__(self) -> Slurm:
        for name in ("ctld", "n1", "n2", "log"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        try:
            self._authenticate()
            (self.directory / "slurm.conf").write_text(self._settings())
            self._start("slurmctld", "-D")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name)
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemons:
            subprocess.run(["scancel", "--user=root"], env=os.environ | self.environment, capture_output=True)
            time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *words: str, cwd: Path | None = None) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(words, env=os.environ | self.environment, cwd=cwd, capture_output=True, text=True,
                              check=True, timeout=60)  # fmt: skip
        return done.stdout

    def _start(self, name: str, *words: str) -> None:
        log = (self.directory / "log" / f"{name}{'-'.join(words[2:])}.out").open("wb")
        environment = os.environ | self.environment
        self._daemons.append(
            subprocess.Popen(
                [str(_find(name)), *words], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        )
        log.close()

    def _authenticate(self) -> None:
        """A munged of our own, on a socket of our own: the machine's may be there or not."""
        place = self.directory / "munge"
        place.mkdir(exist_ok=True)
        key = place / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        words = [str(_find("munged")), "--foreground", "--force", f"--socket={place}/socket", f"--key-file={key}",
                 f"--log-file={place}/log", f"--pid-file={place}/pid", f"--seed-file={place}/seed"]  # fmt: skip
        log = (self.directory / "log" / "munged.out").open("wb")
        self._daemons.append(subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True))
        log.close()
        for _ in range(100):
            if (place / "socket").exists():
                return
            time.sleep(0.1)
        raise RuntimeError(f"munged does not start: {(self.directory / 'log' / 'munged.out').read_text()}")

    def _settings(self) -> str:
        place, controller, first, second = self.directory, *_ports(3)
        cores, memory = os.cpu_count() or 1, 1000
        return f"""ClusterName=moetrain-test
SlurmctldHost=localhost
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place}/ctld
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/ctld.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/log/ctld.log
SlurmdLogFile={place}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
KillWait=5
MinJobAge=300
MpiDefault=none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs={cores} RealMemory={memory}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs={cores} RealMemory={memory}
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""

    def _wait(self) -> None:
        for _ in range(100):
            done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=os.environ | self.environment,
                                  capture_output=True, text=True)  # fmt: skip
            if done.stdout.split() == ["idle", "idle"]:
                return
            time.sleep(0.2)
        logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.directory.glob("log/*")))
        raise RuntimeError(f"SLURM does not come up: {done.stdout}{done.stderr}\n{logs}")


def _ports(count: int) -> list[int]:
    """Below those that the system hands out: nobody is given one of them between this look and the daemons' start."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(10_000, 16_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.add(port)
    return list(found)


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
