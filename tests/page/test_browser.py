"""The page as a person opens it: in a browser, without a network."""

from __future__ import annotations

import time
from typing import Any

import pytest
from browser import opened
from made import a_run, a_sweep

from moetrain.cli.main import main


def report(directory: Any) -> Any:
    assert main(["report", str(directory), "--no-files"]) == 0
    return directory / "report.html"


def drawn(driver: Any) -> list[str]:
    script = (
        "return [...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg.main-svg')).map(p => p.id)"
    )
    return list(driver.execute_script(script))


def colours(driver: Any) -> tuple[str, str]:
    """Of the ground, and of the words in the first picture."""
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    words = driver.execute_script("return getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    return ground, words


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("page") / "made"
    a_run(directory)
    with opened(report(directory)) as driver:
        yield driver


def test_every_picture_of_a_run_is_drawn_and_nothing_is_wrong(run_page):
    assert {"plot-loss", "plot-loss_by_source", "plot-gradient_norm", "plot-expert_load", "plot-max_over_mean",
            "plot-entropy", "plot-dropped_share", "plot-throughput", "plot-experts_by_source", "plot-sources_apart",
            "plot-told_by_token"} == set(drawn(run_page))  # fmt: skip
    assert run_page.get_log("browser") == []


def test_the_page_asks_for_nothing_else(run_page):
    loaded = run_page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_the_theme_changes_ground_and_words(run_page):
    light = colours(run_page)
    run_page.find_element("id", "theme").click()
    dark = colours(run_page)
    assert light != dark
    assert (light[0], dark[0]) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    run_page.find_element("id", "theme").click()
    assert colours(run_page) == light


def test_the_slider_goes_through_the_load(run_page):
    values = "return document.getElementById('plot-expert_load').data[0].z"
    last = run_page.execute_script(values)
    move = """
        const slider = document.querySelector('#plot-expert_load .slider-rail-touch-rect');
        const box = slider.getBoundingClientRect(), at = { bubbles: true, clientX: box.left + 2, clientY: box.top + 4 };
        slider.dispatchEvent(new MouseEvent('mousedown', at)); document.dispatchEvent(new MouseEvent('mouseup', at));
    """
    run_page.execute_script("document.getElementById('plot-expert_load').scrollIntoView()")
    run_page.execute_script(move)
    # Plotly draws at the browser's next frame, which a busy machine lets wait
    deadline = time.monotonic() + 20
    while (first := run_page.execute_script(values)) == last and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first != last
    frames = "return figures.expert_load.layout.sliders[0].steps[0].args[0].z[0]"
    assert first == run_page.execute_script(frames)


def test_the_loss_is_shown_over_tokens_flops_and_time(run_page):
    over = {"tokens": 4096 * 2, "seconds of training": 4096 * 2 / 2000, "steps": 2}
    for label, first in over.items():
        for button in run_page.find_elements("css selector", ".choices button"):
            if button.text == label:
                button.click()
        assert run_page.execute_script("return document.getElementById('plot-loss').data[0].x[0]") == first
    assert run_page.get_log("browser") == []


def test_text_of_the_run_is_no_markup(run_page):
    assert "loss <b>9</b>" in run_page.find_element("id", "incidents").text
    names = run_page.execute_script("return document.getElementById('plot-loss_by_source').data.map(t => t.name)")
    assert names == ["wiki", "</script>"]


def test_the_page_of_a_sweep_has_its_answer_and_its_pictures(tmp_path):
    a_sweep(tmp_path / "sweep")
    with opened(report(tmp_path / "sweep")) as driver:
        names = ["loss_against_num_experts", "loss_against_compute", "held_out_size", "pareto_time", "pareto_memory"]
        assert set(drawn(driver)) == {f"plot-{name}" for name in names}
        assert driver.find_element("id", "answer").text.startswith("Answer\nAt equal active FLOPs, take num_experts=32")
        assert driver.get_log("browser") == []
