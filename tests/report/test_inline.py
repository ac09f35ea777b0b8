"""Figures as HTML for a notebook: every number is drawn where it belongs, text is escaped, and nothing is fetched."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from atma.report.chart import Chart
from atma.report.content import Report, Section
from atma.report.figures import figures
from atma.report.inline import Axis, _blend, _ticks, figure_html


@pytest.fixture
def section(report: Report) -> Section:
    return report.sections[0]


def parsed(html):
    return ElementTree.fromstring(f"<div>{html.replace('<br>', '<br/>')}</div>")


def test_every_figure_of_a_report_is_drawn_with_a_curve_for_each_trace(section) -> None:
    for figure in figures(section):
        tree = parsed(figure_html(figure))
        assert len(tree.findall(".//polyline")) == len(figure.data)
        points = [len(line.get("points").split()) for line in tree.iter("polyline")]
        assert points == [len(trace["x"]) for trace in figure.data]


def test_everything_drawn_is_within_the_drawing(section) -> None:
    for figure in figures(section):
        html = figure_html(figure)
        for points in re.findall(r'points="([^"]*)"', html):
            for point in points.split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 680 and 0 <= y <= 310


def test_titles_and_names_are_escaped(section) -> None:
    figure = replace(figures(section)[0], title='<b>"', caption="<i>")
    figure.data[0]["name"] = "<script>"
    html = figure_html(figure)
    parsed(html)
    assert "<script>" not in html and "<b>&lt;b&gt;" in html and "<i>" not in html


def test_a_report_shows_its_figures_and_prints_in_a_line(report) -> None:
    html = report._repr_html_()
    parsed(html)
    assert "<svg" in html and "http" not in html
    assert len(repr(report).splitlines()) == 1
    assert all(len(repr(run)) < 200 for run in report.runs)


def test_a_long_chart_prints_on_one_screen_and_its_table_whole(section) -> None:
    chart = Chart("all", figures(section))
    assert len(repr(chart).splitlines()) <= 25
    assert "more lines" in repr(chart)
    assert len(chart.table().splitlines()) > 25


def test_ticks_are_round_and_within() -> None:
    assert _ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert _ticks(1.58, 3.21) == [2, 2.5, 3]
    assert _ticks(2.0, 2.0) == [2.0]


def test_an_axis_may_be_logarithmic_or_of_one_value() -> None:
    assert Axis(1, 100, 0, 200, True)(10) == pytest.approx(100)
    assert Axis(5, 5, 0, 200)(5) == 100


def test_colours_are_those_of_the_scale_and_between() -> None:
    scale = [[0.0, "#000000"], [0.5, "#804000"], [1.0, "#ffffff"]]
    assert [_blend(value, scale) for value in (0, 0.25, 0.5, 1)] == [
        (0, 0, 0),
        (64, 32, 0),
        (128, 64, 0),
        (255, 255, 255),
    ]
