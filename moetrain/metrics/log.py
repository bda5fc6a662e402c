"""Numbers out, on rank 0 alone: RUN_DIR/metrics.jsonl, one JSON object a line, and Weights & Biases beside it."""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from moetrain.errors import DataError

_logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends lines to RUN_DIR/metrics.jsonl; each is on its way to the disk when ``write`` returns.

    A run resumed at step s writes the steps after s again, so their old lines are dropped first, with a last line
    torn by a crash: no step stands in the file twice.

    Args:
        run_dir: directory of the run; it exists.
        resume_step: last step that is already behind us; 0 for a new run.

    Raises:
        DataError: the file holds a line that is not one of ours.
    """

    def __init__(self, run_dir: Path, *, resume_step: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._file = self._opened(resume_step)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            metrics: "step" and what else there is: plain numbers, strings, lists and dicts. NaN and the infinities,
                which JSON has no words for, become null.
        """
        assert isinstance(metrics.get("step"), int), "a line of metrics has its step"
        self._file.write(_to_line(metrics))
        self._file.flush()

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps: the run has gone back and makes them anew."""
        self._file.close()
        self._file = self._opened(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _opened(self, resume_step: int) -> TextIO:
        path = self._path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        beside = path.with_suffix(".jsonl.tmp")
        with beside.open("w", encoding="ascii") as file:
            file.writelines(_to_line(line) for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        return path.open("a", encoding="ascii")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl, oldest first; a last line torn by a crash is left out.

    Raises:
        DataError: the file cannot be read, or another line is not a JSON object with a "step".
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f'{path}, line {number}, is not a JSON object with a whole "step": mend or remove the line'
            ) from error
        metrics.append(entry)
    return metrics


class WandbLog:
    """The same numbers on Weights & Biases; made by ``open_wandb``.

    Nothing that goes wrong there ends a run: the first failure is told, and the numbers are in metrics.jsonl anyway.
    """

    def __init__(self, run: Any, *, histogram: Callable[[list[float]], Any]) -> None:
        self._run = run
        self._histogram = histogram
        self._told = False

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Log one line, as given to ``MetricsLog.write``.

        A list holds a number per layer and becomes one curve for each. A list of lists holds a number per expert,
        too many for curves of their own, and becomes one histogram over the experts for each layer.
        """
        self._try(lambda: self._run.log(self._curves(metrics)))

    def close(self, *, exit_code: int = 0) -> None:
        """Send what is left; waits for the network when online."""
        self._try(lambda: self._run.finish(exit_code=exit_code))

    def _curves(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        curves: dict[str, Any] = {}
        for key, value in metrics.items():
            if not isinstance(value, list):
                curves[key] = value
                continue
            for layer, entry in enumerate(value):
                curves[f"{key}/layer_{layer:02d}"] = self._histogram(entry) if isinstance(entry, list) else entry
        return curves

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # wandb raises whatever it likes, and none of it is worth a run
            if not self._told:
                _logger.warning("Weights & Biases failed, the run goes on without: %s: %s", type(error).__name__, error)
            self._told = True


def open_wandb(run_dir: Path, *, mode: str, project: str, name: str, config: Mapping[str, Any]) -> WandbLog | None:
    """Start logging to Weights & Biases, or go on with the same run there if this run directory has one.

    Its files lie under RUN_DIR/wandb, the id of the run there in RUN_DIR/wandb_id.txt.

    Args:
        run_dir: directory of the run; it exists.
        mode: auto, online, offline or off. auto: what WANDB_MODE says, else online when logged in, else offline.
            Without a login, online becomes offline with a warning, so that nobody waits for a prompt.
        project: project on Weights & Biases.
        name: what the run is called there.
        config: settings shown with the run.

    Returns:
        None when it is off, or could not start, which a warning tells.
    """
    assert mode in ("auto", "online", "offline", "off"), mode
    chosen = _wandb_mode(mode)
    if chosen in ("off", "disabled"):
        return None
    try:
        import wandb

        run = wandb.init(
            project=project,
            name=name,
            config=dict(config),
            dir=run_dir,
            id=_wandb_id(run_dir),
            mode=chosen,
            resume="allow" if chosen == "online" else None,
            # Its copy of the terminal would fight with the progress bar.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own step must grow, and a resumed run goes back: our step is the axis instead.
        run.define_metric("*", step_metric="step")
    except Exception as error:
        _logger.warning("Weights & Biases cannot start, the run goes on without: %s: %s", type(error).__name__, error)
        return None
    return WandbLog(run, histogram=wandb.Histogram)


def _wandb_mode(mode: str) -> Any:
    """What ``wandb.init`` is to be told; it refuses what WANDB_MODE should not say."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
    if mode == "online" and not _logged_in():
        _logger.warning("log.wandb is online, but nobody is logged in: logging offline (`wandb login`, `wandb sync`)")
        mode = "offline"
    return mode


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        beside = path.with_suffix(".txt.tmp")
        beside.write_text(secrets.token_hex(4) + "\n", encoding="ascii")
        os.replace(beside, path)
    return path.read_text(encoding="ascii").strip()


def _logged_in() -> bool:
    """Whether wandb would find a key, by the places it looks in; the key itself is not kept."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for place in places:
        try:
            if netrc.netrc(os.path.expanduser(place)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _to_line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(_finite(metrics), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
