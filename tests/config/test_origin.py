"""The history of a run's starts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from moetrain.config import identity
from moetrain.config.identity import ORIGIN_FILE, write_origin
from moetrain.errors import ConfigError


def starts(directory: Path) -> list[dict]:
    return json.loads((directory / ORIGIN_FILE).read_text())["starts"]


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git repository with a package in it, which stands for ours."""
    package = tmp_path / "checkout" / "package"
    (package / "config").mkdir(parents=True)
    (package / "__init__.py").write_text("1\n")
    shutil.copy(identity.__file__, package / "config" / "identity.py")
    git(package.parent, "init", "--quiet")
    monkeypatch.setattr(identity, "__file__", str(package / "config" / "identity.py"))
    return package


def test_each_start_is_added_to_the_history(tmp_path):
    write_origin(tmp_path, command=["moetrain", "train"], data={"vocab_size": 7})
    write_origin(tmp_path, command=["moetrain", "train", "optim.lr=1"], data={"vocab_size": 7})
    assert [start["command"] for start in starts(tmp_path)] == [
        ["moetrain", "train"],
        ["moetrain", "train", "optim.lr=1"],
    ]
    assert starts(tmp_path)[0]["data"] == {"vocab_size": 7}
    assert [path.name for path in tmp_path.iterdir()] == [ORIGIN_FILE], "no temporary file stays"


def test_versions_are_those_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_PACKAGES", ("numpy", "no-such-package"))
    write_origin(tmp_path, command=[], data={})
    import numpy

    assert starts(tmp_path)[0]["versions"] == {"numpy": numpy.__version__, "no-such-package": None}


def test_the_commit_of_the_checkout_and_what_was_changed_in_it(tmp_path, checkout):
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "m")
    write_origin(tmp_path, command=[], data={})
    # bytes that are no UTF-8, as a data file in the checkout may hold
    (checkout / "__init__.py").write_bytes(b"2\n\xff\xfe\n")
    write_origin(tmp_path, command=[], data={})
    (checkout / "__init__.py").write_bytes(b"3\n\xff\xfe\n")
    write_origin(tmp_path, command=[], data={})
    clean, changed, otherwise = (start["code"] for start in starts(tmp_path))
    assert clean == {"commit": git(checkout, "rev-parse", "HEAD"), "uncommitted_sha256": ""}
    assert changed["commit"] == clean["commit"]
    assert len({clean["uncommitted_sha256"], changed["uncommitted_sha256"], otherwise["uncommitted_sha256"]}) == 3


def test_an_installation_inside_another_checkout_is_not_that_commit(tmp_path, checkout):
    (checkout.parent / "theirs.txt").write_text("x")
    git(checkout.parent, "add", "theirs.txt")
    git(checkout.parent, "commit", "--quiet", "-m", "theirs")
    write_origin(tmp_path, command=[], data={})
    assert starts(tmp_path)[0]["code"] is None


def test_no_checkout_and_no_git_are_no_fault(tmp_path, checkout, monkeypatch):
    shutil.rmtree(checkout.parent / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    write_origin(tmp_path, command=[], data={})
    monkeypatch.setenv("PATH", "")
    write_origin(tmp_path, command=[], data={})
    assert [start["code"] for start in starts(tmp_path)] == [None, None]


@pytest.mark.parametrize("content", ["{", "[]", '{"ends": []}', "null"])
def test_a_damaged_history_is_told_and_kept(tmp_path, content):
    (tmp_path / ORIGIN_FILE).write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/{ORIGIN_FILE} is no history of starts.*move it away"):
        write_origin(tmp_path, command=[], data={})
    assert (tmp_path / ORIGIN_FILE).read_text() == content
