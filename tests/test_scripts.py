"""The scripts run."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_the_texts_of_debians_packages_are_taken_apart(tmp_path):
    from debian_corpus import dictionary_entries, kernel_documents

    (tmp_path / "a.dict.dz").write_bytes(
        gzip.compress(b"Aback \\a*back\\, adv.\n   Backward.\n\nAbaft, prep.\n   Behind.\n")
    )
    assert list(dictionary_entries(tmp_path)) == ["Aback \\a*back\\, adv.\n   Backward.", "Abaft, prep.\n   Behind."]
    for name, text in {"a.rst.gz": "one", "b.txt": "two", "html/c.txt": "no", "translations/d.rst": "no", "e.png": "no",
                       "f.rst": "  "}.items():  # fmt: skip
        path = tmp_path / "doc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert list(kernel_documents(tmp_path / "doc")) == ["one", "two"]


def test_the_comparison_of_routers_names_settings_that_pass_the_checks():
    from compare_routers import ROUTERS

    from moetrain.cli.main import main
    from moetrain.config.routers import ROUTERS as THERE_ARE

    assert set(ROUTERS) == set(THERE_ARE) - {"balanced"}
    for router, own in ROUTERS.items():
        assert main(["train", f"model.moe.router={router}", f"name={router}", *own, "--dry-run"]) == 0


def test_the_sweep_script_finds_what_a_killed_sweep_left(tmp_path):
    from expert_count_sweep import at_work, done
    from made import a_sweep

    assert done(tmp_path) == 0
    sweep = a_sweep(tmp_path, seeds=1, unfinished=2)
    sweep.runs[-1].status = "running"
    sweep.write()
    lock = sweep.run_dir(sweep.runs[-1]) / "lock"
    lock.parent.mkdir()
    lock.write_text("4711 host\n")
    assert (done(tmp_path), at_work(tmp_path)) == (16, [4711])
