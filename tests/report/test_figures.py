"""Figures are valid plotly, hold the numbers of their rows, and stand beside a table of the same numbers."""

import dataclasses

import plotly.graph_objects as go
import pytest

from atma.report.content import Report, Section, size_text
from atma.report.figures import CURVE_POINTS, figures, loss_by_length, needles, thin, training
from atma.report.headline import headline


@pytest.fixture
def section(report: Report) -> Section:
    return report.sections[0]


def test_every_figure_is_valid_for_plotly(section):
    made = figures(section)
    assert len(made) == 6
    for figure in made:
        go.Figure({"data": figure.data, "layout": figure.layout})


def test_the_loss_figure_holds_the_losses_with_their_intervals(section):
    figure = loss_by_length(section, "fixed")
    rows = section.runs[1].rows("fixed")
    trace = figure.data[1]
    assert trace["x"] == [256 * 2**i for i in range(7)]
    assert trace["y"] == [row["loss"] for row in rows]
    assert trace["error_y"]["array"] == pytest.approx([0.1] * len(rows))


def test_the_trained_length_is_marked_on_a_logarithmic_axis(section):
    layout = loss_by_length(section, "fixed").layout
    assert layout["xaxis"]["type"] == "log"
    assert [shape["x0"] for shape in layout["shapes"]] == [256]


def test_the_table_beside_a_figure_has_the_same_numbers(section):
    figure = loss_by_length(section, "nested")
    for column, trace in enumerate(figure.data, 1):
        assert [row[column].split()[0] for row in figure.table.rows] == [f"{y:.3f}" for y in trace["y"]]


def test_needles_show_tokens_exact_and_the_absent_baseline_of_each_run(section):
    names = [trace["name"] for trace in needles(section).data]
    assert names == [
        f"{run}{kind}" for run in ("ATMA", "RoPE control") for kind in ("", ", all five", ", needle absent")
    ]


def test_measures_that_were_not_made_have_no_figure(section):
    bare = Section("bare", [dataclasses.replace(run, evaluation=[], metrics=[]) for run in section.runs])
    assert figures(bare) == []


def test_one_colour_means_one_model_in_every_figure(section):
    for figure in figures(section):
        colours = {trace["name"].split(",")[0]: trace["line"]["color"] for trace in figure.data}
        assert colours == {"ATMA": "#2f7fe0", "RoPE control": "#dd6b10"}


def test_seeds_of_one_model_share_its_colour_and_are_told_apart_by_name(section):
    atma = section.runs[0]
    train = dataclasses.replace(atma.recipe.train, seed=1)
    second = dataclasses.replace(atma, recipe=dataclasses.replace(atma.recipe, train=train))
    figure = loss_by_length(Section("seeds", [atma, second]), "fixed")
    assert [trace["name"] for trace in figure.data] == ["ATMA, seed 0", "ATMA, seed 1"]
    assert figure.data[0]["line"]["color"] == figure.data[1]["line"]["color"]
    assert figure.data[0]["marker"]["symbol"] != figure.data[1]["marker"]["symbol"]


def test_a_loss_that_is_not_finite_is_left_out_of_the_curve(section):
    run = dataclasses.replace(section.runs[0], metrics=[{"kind": "train", "tokens": 1, "loss": float("nan")}])
    assert training(Section("nan", [run])) is None


def test_the_caption_says_how_many_documents_were_joined_from_neighbouring_files(section):
    rows = [row | {"joined_documents": 3} for row in section.runs[0].rows("fixed")]
    run = dataclasses.replace(section.runs[0], evaluation=rows)
    caption = loss_by_length(Section("joined", [run]), "fixed").caption
    assert "8 held-out documents, 3 of them made of neighbouring files." in caption


def test_thinning_keeps_the_mean_and_the_order():
    rows = [{"tokens": i, "loss": 1000 - i} for i in range(1, 1000)]
    thinned = thin(rows)
    assert len(thinned) == CURVE_POINTS
    assert [row["tokens"] for row in thinned] == sorted(row["tokens"] for row in thinned)
    weights = [len(rows) * (i + 1) // CURVE_POINTS - len(rows) * i // CURVE_POINTS for i in range(CURVE_POINTS)]
    mean = sum(w * row["loss"] for w, row in zip(weights, thinned, strict=True)) / len(rows)
    assert mean == pytest.approx(500)


def test_the_headline_says_what_the_rows_say(section):
    sentences = headline(section)
    assert sentences[0].startswith("Loss rises less with length in ATMA than in RoPE control")
    assert sentences[1] == (
        "ATMA at 64× its training length: 2.91 → 2.90 nats per token "
        "(no difference seen: −0.012, 95% interval −0.062 to +0.038)."
    )
    assert "2.95 → 4.09 nats per token (higher by 1.140" in sentences[3]
    assert sentences[4] == (
        "RoPE control recalls 0% [0%, 8%] of a needle's tokens in a sequence of 16K tokens (64×; 32 "
        "needles, teacher-forced)."
    )


def test_the_headline_is_empty_when_nothing_was_measured(section):
    bare = Section("bare", [dataclasses.replace(run, evaluation=[]) for run in section.runs])
    assert headline(bare) == []


@pytest.mark.parametrize(("length", "text"), [(96, "96"), (256, "256"), (1024, "1K"), (1536, "1.5K"), (2**20, "1M")])
def test_token_counts_read_well(length, text):
    assert size_text(length) == text
