"""Numbers as people and programs read them."""

from __future__ import annotations

import json

import pytest

from moetrain.bench.timing import Report, Row, row_of, text, write_json

WHAT = {"dtype": "fp32", "routing": "balanced", "experts": 8, "top_k": 2}
DENSE = row_of([0.02, 0.01, 0.03], yardstick=[0.02, 0.01, 0.03], peak_bytes=3 << 20, contestant="dense", **WHAT)
OURS = row_of([0.03], yardstick=[0.02], peak_bytes=1 << 19, contestant="moetrain", note="a note", **WHAT)
LEFT_OUT = Row(contestant="transformers_eager", note="not timed: why", **WHAT)
OTHER = Row(contestant="dense", ms=1234.5, turns=1, **WHAT | {"experts": 64, "dtype": "bf16"})
REPORT = Report(
    title="A title", about={"torch": "2.13", "settings": {"tokens": 1}}, rows=[DENSE, OURS, LEFT_OUT, OTHER],
    remarks=["a remark"],
)  # fmt: skip


def test_a_row_has_the_median_the_quartiles_and_the_ratio():
    assert (DENSE.ms, DENSE.spread_ms, DENSE.turns, DENSE.ratio) == (20, pytest.approx(10), 3, 1)
    assert (OURS.ms, OURS.spread_ms, OURS.ratio, OURS.peak_mib) == (30, None, 1.5, 0.5)


def test_the_table_is_aligned():
    assert text(REPORT).splitlines() == [
        "A title",
        "torch 2.13",
        "",
        "fp32, balanced routing",
        "experts  top_k  contestant            ms  [spread]  ratio  peak MiB",
        "      8      2  dense               20.0    [10.0]   1.00       3.0",
        "                moetrain            30.0       [-]   1.50       0.5  a note",
        "                transformers_eager     -                -         -  not timed: why",
        "",
        "bf16, balanced routing",
        "experts  top_k  contestant       ms  [spread]  ratio  peak MiB",
        "     64      2  dense       1,234.5       [-]      -         -",
        "",
        "a remark",
    ]


def test_the_file_has_the_same_numbers(tmp_path):
    write_json(REPORT, tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["about"] == REPORT.about
    assert [row["contestant"] for row in found["rows"]] == ["dense", "moetrain", "transformers_eager", "dense"]
    assert found["rows"][0]["ms"] == DENSE.ms
    assert found["rows"][2]["ms"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
