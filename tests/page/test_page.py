"""What the page of a run or a sweep says, and its pictures as files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made import a_run, a_sweep

from moetrain.errors import DataError
from moetrain.metrics.log import read_metrics
from moetrain.page.charts import Chart, HeatMap, Series, Table, charts_of
from moetrain.page.experts import Experts, experts_section, read_experts
from moetrain.page.html import write_page
from moetrain.page.interactive import figure
from moetrain.page.run import Facts, read_incidents, run_sections
from moetrain.page.static import draw
from moetrain.page.sweep import sweep_sections
from moetrain.sweep.answer import margin, means, measured, pareto, seed_noise

CHART = Chart(key="c", title="c", x_label="x", y_label="y", log_x=True, ticks=[1, 10], series=[
    Series(name="a", x=[1, 10], y=[2.0, None], error=[0.1, None], band=([1.0, 1.0], [3.0, 3.0]), markers=True),
    Series(name="b", x=[1], y=[2.0], dashed=True)])  # fmt: skip
BARS = Chart(key="k", title="k", x_label="x", y_label="y", categories=["p", "q"], series=[
    Series(name="a", x=["q", "p"], y=[2.0, 1.0], lines=False, markers=True, text=["1", "2"])])  # fmt: skip
MAP = HeatMap(key="m", title="m", x_label="x", y_label="y", low=0, high=2, scale_label="s",
              frames=[("1", [[0.0, 1.0]]), ("2", [[2.0, None]]), ("3", [[1.0, 1.0]]), ("4", [[0.5, 1.5]])])  # fmt: skip

ALL = HeatMap(key="all", title="m", x_label="x", y_label="y", low=0, high=2, scale_label="s", every_frame=True,
              frames=[(str(number), [[1.0, 0.5 * number]]) for number in range(4)])  # fmt: skip


@pytest.mark.parametrize("part", [CHART, BARS, MAP, ALL], ids=lambda part: part.key)
def test_a_picture_is_drawn_as_png_and_svg(part, tmp_path):
    png, svg = draw(part, tmp_path, title="t")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in svg.read_text()
    before = svg.read_bytes()
    draw(part, tmp_path, title="t")
    assert svg.read_bytes() == before, "the same picture, the same file"


@pytest.mark.parametrize("part", [CHART, BARS, MAP, ALL], ids=lambda part: part.key)
def test_plotly_takes_every_figure(part):
    objects = pytest.importorskip("plotly.graph_objects")
    made = figure(part)
    objects.Figure({"data": made["data"], "layout": made["layout"]}, skip_invalid=False)


def test_a_run_tells_its_incidents_dead_experts_and_changes(tmp_path):
    run = a_run(tmp_path / "made")
    facts = Facts(run=run, incidents=read_incidents(tmp_path / "made"), differences={"optim.lr": (3e-3, 1e-3)},
                  preset="model=tiny", checkpoints=[("step_00000040", "3.2", "1 MB")], planned=("cpu", 5000.0),
                  sample=("My fellow", "citizens"))  # fmt: skip
    sections = {each.title: each for each in run_sections(read_metrics(tmp_path / "made" / "metrics.jsonl"), facts)}
    assert "layer 0: 3; layer 2: 3" in sections["Experts"].text
    (incidents,) = sections["Incidents"].parts
    assert isinstance(incidents, Table)
    assert incidents.rows == [["12", "spike", "loss <b>9</b>"]]
    changed = sections["Settings"].parts[0]
    assert isinstance(changed, Table)
    assert changed.rows == [("optim.lr", "0.003", "0.001")]
    assert "5,000 tokens/s" in charts_of([sections["Throughput"]])[0].note


def test_a_run_that_has_logged_nothing_has_a_page_too(tmp_path):
    run = a_run(tmp_path / "made")
    titles = [each.title for each in run_sections([], Facts(run=run))]
    assert titles == ["At a glance", "Specialisation", "Incidents", "Checkpoints", "Settings"]


def test_a_run_tells_what_its_experts_have_made_their_own(tmp_path):
    run = a_run(tmp_path / "made")
    facts = Facts(run=run, experts=read_experts(tmp_path / "made"))
    (section,) = [each for each in run_sections([], facts) if each.title == "Specialisation"]
    by_source, apart_by_layer, by_token, *tables = section.parts
    assert isinstance(by_source, HeatMap)
    name, rows = by_source.frames[1]
    # two sources of equal weight: what one takes more of, the other takes less of
    assert name == "</script>"
    assert [a + b for a, b in zip(rows[2], by_source.frames[0][1][2], strict=True)] == pytest.approx([2.0] * 4)
    assert isinstance(apart_by_layer, Chart)
    assert apart_by_layer.series[0].y == pytest.approx(apart_by_layer.series[1].y)
    assert isinstance(by_token, Chart)
    assert [table.rows[1][2] for table in tables] == ["␣the 3.6x"] * 4
    assert tables[0].rows[0][2] == "none stands out"
    assert tables[0].rows[3][2] == "⏎ 4.0x"


def test_the_tables_of_many_experts_stay_few(tmp_path):
    favourites = [[[{"text": "a", "occurrences": 10, "share": 0.5, "times": 2.0}]] * 256] * 60
    found = Experts(step=1, tokens=1, all=[[1 / 256] * 256] * 60, sources={"one": [[1 / 256] * 256] * 60},
                    told_by_token=[0.1] * 60, favourites=favourites)  # fmt: skip
    tables = [part for part in experts_section(found).parts if isinstance(part, Table)]
    assert [table.title.split(",")[0] for table in tables] == [
        f"tokens of MoE layer {layer}" for layer in (0, 8, 17, 25, 34, 42, 51, 59)]  # fmt: skip
    assert {len(table.rows) for table in tables} == {64}


def test_a_damaged_count_is_told(tmp_path):
    (tmp_path / "experts.json").write_text('{"step": 1}')
    with pytest.raises(DataError, match=r"experts.json cannot be read .* moetrain evaluate .* writes it anew"):
        read_experts(tmp_path)


class TestSweep:
    def test_the_law_of_the_smaller_sizes_predicts_the_largest(self, tmp_path):
        sections = {each.title: each for each in sweep_sections(a_sweep(tmp_path))}
        held = sections["The smaller sizes predict the largest"]
        hits, runs = map(int, re.findall(r"(\d+) of its (\d+) runs lie inside", held.text)[0])
        assert runs == 12
        assert hits >= 8

    def test_one_seed_is_no_certainty(self, tmp_path):
        (answer,) = [each.text for each in sweep_sections(a_sweep(tmp_path, seeds=1)) if each.title == "Answer"]
        assert answer.endswith("with one seed each, nobody knows how sure this is.")

    def test_what_is_not_finished_is_said(self, tmp_path):
        sections = sweep_sections(a_sweep(tmp_path, unfinished=3))
        assert "3 of 36 runs are not finished" in sections[0].text

    def test_nothing_finished_is_said_too(self, tmp_path):
        assert sweep_sections(a_sweep(tmp_path, unfinished=36))[0].title == "Nothing yet"

    def test_the_front_has_no_point_that_is_dearer_and_worse(self, tmp_path):
        found = means(measured(a_sweep(tmp_path)))
        front = pareto(found, lambda run: run.total_parameters)
        for mean in found:
            dominated = [each for each in found if each.loss < mean.loss
                         and each.first.total_parameters <= mean.first.total_parameters]  # fmt: skip
            assert (mean in front) == (not dominated)

    def test_the_noise_between_seeds_is_pooled(self, tmp_path):
        found = means(measured(a_sweep(tmp_path)))
        noise, freedom = seed_noise(found)
        squares = sum((mean.losses[0] - mean.losses[1]) ** 2 / 2 for mean in found)
        assert (noise, freedom) == (pytest.approx((squares / 18) ** 0.5), 18)
        # t of 18 degrees of freedom at 0.95 is 1.734 (tables)
        assert margin(found, 2) == pytest.approx(1.734 * noise / 2**0.5, rel=1e-3)


def test_without_plotly_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(DataError, match=r'pip install "moetrain\[report\]"'):
        write_page(tmp_path / "a.html", title="a", subtitle="", sections=[])
    assert list(Path(tmp_path).iterdir()) == []
