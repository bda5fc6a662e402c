"""The nodes of a run, by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moetrain.config.launch.settings import LaunchConfig
from moetrain.errors import ConfigError
from moetrain.launch.nodes.hosts import Host, hosts_of, read_hostfile, with_hosts


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# the rack\nnode1 slots=8\n\nnode-2.cluster slots=8  # behind the pillar\n10.0.0.3\n")
    return path


def test_a_hostfile_has_hosts_comments_and_blank_lines(hostfile: Path) -> None:
    assert read_hostfile(hostfile) == [
        Host(name="node1", slots=8),
        Host(name="node-2.cluster", slots=8),
        Host(name="10.0.0.3", slots=None),
    ]


def test_all_that_is_wrong_with_a_hostfile_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=8\nnode1 slots=4\nnode2 slots=0\n$(reboot) slots=1\nnode[1-3] slots=2\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert [re.search(r"line \d", problem)[0] for problem in caught.value.problems] == [
        "line 2", "line 3", "line 4", "line 5",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_a_hostfile_without_a_host_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(ConfigError, match="names no host"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def test_slots_give_the_processes_and_hosts_the_nodes(hostfile: Path) -> None:
    resolved = with_hosts(LaunchConfig(kind="hostfile", hostfile=str(hostfile)))
    assert (resolved.nodes, resolved.processes) == (3, 8)
    fewer = with_hosts(LaunchConfig(kind="hostfile", hostfile=str(hostfile), nodes=2, processes=4))
    assert (fewer.nodes, fewer.processes) == (2, 4)
    assert [host.name for host in hosts_of(fewer)] == ["node1", "node-2.cluster"]
    named = with_hosts(LaunchConfig(kind="hostfile", hosts=["a", "b"]))
    assert (named.nodes, named.processes) == (2, None)


def test_more_than_there_is_is_refused(hostfile: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch\.nodes is 4, but .* names 3 hosts"):
        with_hosts(LaunchConfig(kind="hostfile", hostfile=str(hostfile), nodes=4))
    with pytest.raises(ConfigError, match=r"launch\.processes is 9, but node1 has slots=8"):
        with_hosts(LaunchConfig(kind="hostfile", hostfile=str(hostfile), processes=9))


def test_different_slots_need_a_number_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=8\nb slots=4\n")
    with pytest.raises(ConfigError, match=r"different slots \(a 8, b 4\).*set launch\.processes"):
        with_hosts(LaunchConfig(kind="hostfile", hostfile=str(path)))
    assert with_hosts(LaunchConfig(kind="hostfile", hostfile=str(path), processes=4)).nodes == 2
