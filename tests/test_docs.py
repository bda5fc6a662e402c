"""Every command in the README and the docs is run, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from made import a_run, a_sweep
from own_runs import write_tiny

from moetrain.cli.main import main
from moetrain.compose import compose, presets
from moetrain.config.freeze import freeze
from moetrain.plan.flops import count_parameters, format_count

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


CASES = [(page.name, line) for page in PAGES for line in commands(page)]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A directory with the files that the pages speak of."""
    import pyarrow
    import pyarrow.parquet

    texts = [f"Chapter {n}. It was a dark and stormy night, number {n * n}." for n in range(40)]
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    (tmp_path / "notes.jsonl").write_text("\n".join(f'{{"text": "{text}"}}' for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "wiki.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), CASES)
def test_a_command_of_the_docs_runs(page, line, shelf, capsys, request, monkeypatch):
    words = shlex.split(line, comments=True)
    if words[:2] == ["moetrain", "checkpoint"]:
        runs = request.getfixturevalue("real_runs")
        (runs / "ep2").rename(runs / "tiny")
        shutil.copytree(runs / "tiny", runs / "other")
    if words[:2] == ["moetrain", "report"] or words[1:3] in (["sweep", "status"], ["sweep", "predict"]):
        a_run(shelf / "runs" / "tiny")
        a_sweep(shelf / "sweeps" / "expert_count")
    if words[1] in ("export", "evaluate", "sample"):
        write_tiny(shelf / "runs" / "tiny", shelf / "of tiny")
    if words[:2] == ["moetrain", "import"]:
        write_tiny(shelf / "runs" / "tiny", shelf / "of tiny")
        assert main(["export", "runs/tiny", f"out={words[2]}", "check=false"]) == 0
    if words[:2] == ["python", "scripts/preferences.py"]:
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        from preferences import arguments

        arguments(words[2:])  # it runs in tests/hub/test_preferences.py
        return
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    assert words[0] == "moetrain", f"{page}: no test knows how to run {line!r}"
    # what starts processes has its own tests; here its settings are composed and checked as they stand
    extra = (
        ["--dry-run"]
        if words[1] in ("train", "verify", "bench", "sweep", "preflight") and "--dry-run" not in words
        else []
    )
    extra = [] if words[2:3] in (["status"], ["predict"]) else extra
    assert main([*words[1:], *extra]) == 0, capsys.readouterr().err


def test_the_docs_hold_commands():
    assert len(CASES) > 15


def test_the_table_of_models_has_the_counts_of_the_presets():
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", (ROOT / "docs/models.md").read_text(), flags=re.MULTILINE
    )
    assert {name for name, *_ in rows} == set(presets("model"))
    for name, total, active in rows:
        count = count_parameters(freeze(compose([f"model={name}"]).settings).model)
        assert (total, active) == (format_count(count.total), format_count(count.active)), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
