"""Recorded machines as hosts to read from."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from moetrain.preflight.seen.read import Host

MACHINES = Path(__file__).parent / "machines"


def recorded(
    name: str,
    directory: Path,
    *,
    files: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    smi: Mapping[tuple[int, str], str] | None = None,
    remapped: Mapping[tuple[int, str], str] | None = None,
    commands: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Host:
    """A machine of ``machines/``, laid out below ``directory``, with some things changed.

    Args:
        files: path -> content, over the recorded ones.
        without: paths and commands that are not there.
        smi: (row, column) -> value, in nvidia-smi's table.
        remapped: the same, in its table of remapped rows.
        commands: beginning of a command -> its output.
        environment: over the recorded one.
    """
    machine = yaml.safe_load((MACHINES / f"{name}.yaml").read_text())
    root = directory / machine["host"]
    for path, content in (machine["files"] | dict(files or {})).items():
        if not path.startswith(tuple(without) or "\0"):
            file = root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
    tables = {
        "--query-gpu=": _Table(machine.get("nvidia_smi"), smi),
        "--query-remapped-rows=": _Table(machine.get("remapped_rows"), remapped),
    }
    outputs = {key: text for key, text in (machine["commands"] | dict(commands or {})).items() if key not in without}

    def run(words: Sequence[str]) -> str | None:
        if "nvidia-smi" not in without:
            for option, table in tables.items():
                if words[0] == "nvidia-smi" and words[1].startswith(option):
                    assert words[2] == "--format=csv,noheader,nounits"
                    return table.columns(words[1].removeprefix(option).split(","))
        command = " ".join(words)
        known = [key for key in outputs if command == key or command.startswith(f"{key} ")]
        return outputs[max(known, key=len)] if known else None

    return Host(root=root, run=run, environment=machine["environment"] | dict(environment or {}), name=machine["host"])


class _Table:
    """What nvidia-smi knows of each GPU."""

    def __init__(self, text: str | None, changes: Mapping[tuple[int, str], str] | None) -> None:
        rows = [[cell.strip() for cell in row] for row in csv.reader((text or "").splitlines())]
        self._rows = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]] if rows else []
        for (row, column), value in (changes or {}).items():
            assert column in self._rows[row]
            self._rows[row][column] = value

    def columns(self, names: Sequence[str]) -> str | None:
        """As CSV; None where a name is not known, as nvidia-smi then fails."""
        if not self._rows or any(name not in self._rows[0] for name in names):
            return None
        return "".join(", ".join(row[name] for name in names) + "\n" for row in self._rows)
