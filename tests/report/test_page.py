"""The page is one file that a real browser shows without errors, overflow or requests, at phone and desk width."""

import dataclasses
import re
from pathlib import Path

import pytest

from atma.report import Report, environment, page
from atma.report.page import html
from tests.harness.watching import Watched


def without_plotly(text: str) -> str:
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_has_plotly_once_and_refers_to_nothing_outside(report: Report):
    text = html(report)
    assert text.count("plotly.js v") == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)", without_plotly(text))


def test_text_from_runs_is_escaped(report: Report):
    text = without_plotly(html(report))
    assert "alert('no')" not in text
    assert "&lt;script&gt;" in text
    assert "invented &lt;one&gt;" in text


def test_the_page_says_that_training_mixed_in_synthetic_rows(report: Report):
    assert "30% of the training rows" in html(report)


def test_the_page_names_command_environment_hashes_and_every_run(report: Report):
    text = html(report)
    for words in ("atma demo --out runs/demo", "processor", "ab" * 8, "cd" * 8, "ef" * 8, "nano-rope", "RoPE control"):
        assert words in text


def test_the_environment_names_interpreter_torch_processor_threads_and_system():
    assert {"Python", "torch", "processor", "threads", "system"} <= set(environment())
    assert all(isinstance(value, str) and value for value in environment().values())


def test_a_single_length_has_no_slope_and_still_a_page(report: Report):
    section = report.sections[0]
    lone = {"kind": "summary", "measure": "fixed", "lengths": [256], "documents": 8}
    run = dataclasses.replace(section.runs[0], evaluation=[section.runs[0].rows("fixed")[0], lone])
    text = html(dataclasses.replace(report, sections=[dataclasses.replace(section, runs=[run])]))
    assert "Does loss rise" not in text
    assert "Loss on fixed targets" in text


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory) -> Path:
    return page(report, tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_whole(written: Path, tab, width: int, scheme: str):
    watched = Watched(tab, written, width, scheme)
    view = watched.page
    view.wait_for_function("document.querySelectorAll('.chart:has(.main-svg)').length == 12")
    sizes = view.eval_on_selector_all(".chart svg.main-svg", "all => all.map(e => e.getBoundingClientRect().toJSON())")
    assert len(sizes) >= 12
    assert all(size["width"] > 200 and size["height"] > 200 for size in sizes)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.locator(".chart .scatterlayer .trace").count() == view.evaluate(
        "[...document.querySelectorAll('figure script')].reduce((n, s) => n + JSON.parse(s.textContent).data.length, 0)"
    )
    watched.close()


def test_the_trained_length_is_drawn_where_the_axis_has_it(written: Path, tab):
    watched = Watched(tab, written)
    view = watched.page
    view.wait_for_selector(".chart .shapelayer path", state="attached")
    middle = "e => e.getBoundingClientRect().x + e.getBoundingClientRect().width / 2"
    line = view.eval_on_selector(".chart .shapelayer path", middle)
    point = view.eval_on_selector(".chart .scatterlayer .points path", middle)
    assert line == pytest.approx(point, abs=2)
    watched.close()
