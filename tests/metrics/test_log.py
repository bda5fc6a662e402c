from __future__ import annotations

import json
import logging
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from moetrain.errors import DataError
from moetrain.metrics.log import MetricsLog, WandbLog, open_wandb, read_metrics


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    log.write({"step": 10, "loss": 7.25, "load": [[0.5, 0.5]]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "loss": 7.25, "load": [[0.5, 0.5]]}
    log.write({"step": 20})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_what_json_has_no_words_for_becomes_null_at_any_depth(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    log.write(
        {"step": 1, "loss": math.nan, "load": [[0.5, math.inf], (-math.inf,)], "mfu": None, "deep": {"x": math.nan}}
    )
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "load": [[0.5, None], [None]], "mfu": None, "deep": {"x": None}}


def test_a_resumed_run_holds_no_step_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resume_step=0)
    for step in (10, 20, 20, 30, 40):  # training and evaluation share step 20
        log.write({"step": step})
    log.close()
    log = MetricsLog(tmp_path, resume_step=20)
    assert steps(tmp_path) == [10, 20, 20]
    log.write({"step": 30, "again": True})
    log.close()
    assert steps(tmp_path) == [10, 20, 20, 30]
    MetricsLog(tmp_path, resume_step=0).close()
    assert steps(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 3', '{"step": 30, "loss": 2.', "{", '{"ste'])
def test_a_last_line_torn_by_a_crash_is_left_out_and_goes_at_the_next_start(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n' + torn)
    assert [line["step"] for line in read_metrics(path)] == [10, 20]
    log = MetricsLog(tmp_path, resume_step=100)
    log.write({"step": 110})
    log.close()
    assert steps(tmp_path) == [10, 20, 110]


def test_a_whole_last_line_that_only_lacks_its_newline_stays(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    log = MetricsLog(tmp_path, resume_step=20)
    log.write({"step": 30})
    log.close()
    assert steps(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"loss": 1.0}', '{"step": "1"}', "7", "null"])
def test_a_broken_line_elsewhere_is_told_with_its_place(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 10}}\n{line}\n{{"step": 20}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2, is not a JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_metrics(tmp_path / "metrics.jsonl")


# - - - Weights & Biases - - -


class FakeWandb(types.ModuleType):
    """Stands in for the library and keeps what it is told."""

    Settings = dict
    Histogram = tuple

    def __init__(self, *, broken: str = "") -> None:
        super().__init__("wandb")
        self.broken = broken
        self.init_arguments: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []

    def init(self, **arguments: Any) -> FakeWandb:
        if self.broken == "init":
            raise RuntimeError("no network")
        self.init_arguments.append(arguments)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        if self.broken == "log":
            raise OSError("service is gone")
        self.logged.append(values)

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nobody is logged in, whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def open_with(fake: FakeWandb, environment: pytest.MonkeyPatch, run_dir: Path, mode: str) -> WandbLog | None:
    environment.setitem(sys.modules, "wandb", fake)
    return open_wandb(run_dir, mode=mode, project="moetrain", name="tiny", config={"seed": 1})


@pytest.mark.parametrize(
    ("mode", "variables", "netrc", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40}, "", "online"),
        ("auto", {}, "machine api.wandb.ai login user password k\n", "online"),
        ("auto", {}, "machine github.com login user password k\n", "offline"),
        ("auto", {}, "machine api.wandb.ai login user password k\nwhat is this\n", "offline"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.lab.org"}, "machine wandb.lab.org login u password k\n", "online"),
        ("auto", {"WANDB_BASE_URL": "https://wandb.lab.org"}, "machine api.wandb.ai login u password k\n", "offline"),
        ("auto", {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ("offline", {"WANDB_API_KEY": "k" * 40}, "", "offline"),
        ("online", {"WANDB_API_KEY": "k" * 40}, "", "online"),
    ],
)
def test_the_mode_follows_the_login(
    tmp_path: Path,
    environment: pytest.MonkeyPatch,
    mode: str,
    variables: dict[str, str],
    netrc: str,
    expected: str,
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    fake = FakeWandb()
    assert open_with(fake, environment, tmp_path, mode) is not None
    (arguments,) = fake.init_arguments
    assert arguments["mode"] == expected
    assert arguments["dir"] == tmp_path
    assert "k" * 40 not in repr(arguments)


def test_online_without_a_login_goes_offline_and_says_so(
    tmp_path: Path, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeWandb()
    open_with(fake, environment, tmp_path, "online")
    assert fake.init_arguments[0]["mode"] == "offline"
    assert "nobody is logged in" in caplog.text


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_off_imports_nothing(tmp_path: Path, environment: pytest.MonkeyPatch, mode: str) -> None:
    environment.setenv("WANDB_MODE", "disabled")
    environment.setitem(sys.modules, "wandb", None)  # importing it raises
    assert open_wandb(tmp_path, mode=mode, project="moetrain", name="tiny", config={}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WANDB_API_KEY", "k" * 40)
    fake = FakeWandb()
    (tmp_path / "other").mkdir()
    for run_dir in (tmp_path, tmp_path, tmp_path / "other"):
        open_with(fake, environment, run_dir, "online")
    first, second, other = (arguments["id"] for arguments in fake.init_arguments)
    assert first == second == (tmp_path / "wandb_id.txt").read_text().strip()
    assert other != first
    assert fake.init_arguments[1]["resume"] == "allow"


def test_each_layer_is_a_curve_and_its_experts_a_histogram(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    log = open_with(fake, environment, tmp_path, "offline")
    assert log is not None
    log.write({"step": 1, "loss": 2.5, "cv": [0.1, 0.2], "load": [[0.25, 0.75], [0.5, 0.5]]})
    log.close(exit_code=3)
    assert fake.logged == [
        {
            "step": 1,
            "loss": 2.5,
            "cv/layer_00": 0.1,
            "cv/layer_01": 0.2,
            "load/layer_00": (0.25, 0.75),
            "load/layer_01": (0.5, 0.5),
        }
    ]
    assert fake.exit_code == 3


def test_a_failure_is_told_once_and_ends_nothing(
    tmp_path: Path, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = open_with(FakeWandb(broken="log"), environment, tmp_path, "offline")
    assert log is not None
    for step in range(3):
        log.write({"step": step})
    log.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "OSError: service is gone" in caplog.text


def test_a_start_that_fails_is_told_and_ends_nothing(
    tmp_path: Path, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_with(FakeWandb(broken="init"), environment, tmp_path, "offline") is None
    assert "RuntimeError: no network" in caplog.text


def test_the_real_library_writes_offline_under_the_run_directory_in_silence(
    tmp_path: Path, environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # as in a process that has not used it yet, whatever ran here before
    logging.getLogger("wandb").setLevel(logging.NOTSET)
    log = open_wandb(tmp_path, mode="auto", project="moetrain", name="tiny", config={"model": {"d_model": 64}})
    assert log is not None
    log.write({"step": 1, "loss": 2.5, "mfu": None, "load": [[0.25, 0.75]], "cv": [0.1]})
    log.close()
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    (data,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    # its service writes the last lines after finish() returned; it outlives this process, if need be
    until = time.monotonic() + 60
    while b"load/layer_00" not in data.read_bytes():
        assert time.monotonic() < until, data.read_bytes()[-200:]
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
