"""What tests of the command line share: what a command gave, and what must hold of every refusal."""

from __future__ import annotations

import subprocess
from pathlib import Path

Output = subprocess.CompletedProcess[str]


def assert_told(done: Output, *fragments: str) -> None:
    """One message on stderr, exit code 2."""
    assert done.returncode == 2
    assert done.stderr.startswith("moetrain: ")
    assert done.stderr.count("moetrain: ") == 1
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in done.stderr, done.stderr


def everything(place: Path) -> dict[str, bytes | None]:
    """Every file and directory below a place, with its content."""
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}
