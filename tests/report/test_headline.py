"""Words follow intervals: of losses, of slopes beside each other, and of where lines start."""

import dataclasses

import pytest

from atma.report import Report, Run, Section
from atma.report.headline import caveats, comparisons, loss_sentence
from atma.report.page import html
from atma.report.recall import recall_sentences, recall_table


@pytest.fixture
def section(report: Report) -> Section:
    return report.sections[0]


def with_losses(run: Run, losses: dict[int, list[float]]) -> Run:
    rows = [{"kind": "fixed", "length": n, "loss": 1.0, "document_losses": losses[n]} for n in losses]
    return dataclasses.replace(run, evaluation=rows)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.3, 0.1, "no difference seen: −0.012"),
        (0.001, 0.1, "higher by 0.012"),
        (-0.3, -0.001, "lower by 0.012"),
        (None, None, "no difference seen: −0.012, no interval from one document"),
    ],
)
def test_the_word_for_a_change_of_loss_follows_its_interval(section, low, high, words):
    rows = [
        row | {"change_low": low, "change_high": high} if row["kind"] == "summary" else row
        for row in section.runs[0].evaluation
    ]
    assert words in loss_sentence("ATMA", dataclasses.replace(section.runs[0], evaluation=rows))


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ([2.0, 2.1, 2.2], "Loss rises less with length in ATMA than in RoPE control"),
        ([2.9, 3.0, 3.1], "here ATMA does not do what it is for"),
        ([2.0, 2.5, 3.1], "No difference seen between the slopes of ATMA and RoPE control"),
    ],
)
def test_slopes_beside_each_other_are_told_plainly_even_where_they_do_not_favour_ours(section, ours, words):
    first = with_losses(section.runs[0], {256: [2.0, 2.0, 2.0], 512: ours})
    other = with_losses(section.runs[1], {256: [2.0, 2.0, 2.0], 512: [2.5, 2.6, 2.5]})
    (sentence,) = comparisons(Section("two", [first, other]))
    assert words in sentence
    assert "95% interval" in sentence


def test_every_contender_is_set_beside_the_first(section):
    third = dataclasses.replace(section.runs[1], name="third")
    told = comparisons(Section("three", [*section.runs, third]))
    assert [("RoPE control" in text, "third" in text) for text in told] == [(True, False), (False, True)]


def test_where_a_control_is_behind_at_the_training_length_is_said_with_its_caveat(section):
    run = dataclasses.replace(section.runs[1], caveat="It has no Canon.")
    worse, known = caveats(dataclasses.replace(section, runs=[section.runs[0], run]))
    assert "RoPE control is worse than ATMA at 256 tokens already" in worse
    assert known == "About RoPE control: It has no Canon."


def test_lines_that_start_together_are_not_said_to_start_apart(section):
    losses = {256: [2.0, 2.2, 2.1], 512: [2.0, 2.2, 2.1]}
    shifted = {256: [2.1, 2.1, 2.1], 512: [2.0, 2.2, 2.1]}
    pair = [with_losses(section.runs[0], losses), with_losses(section.runs[1], shifted)]
    assert caveats(Section("same", pair)) == []


def test_recall_has_n_and_interval_in_every_cell(report):
    table = recall_table(report.recall)
    assert table.header == ["length of the text, tokens", "nano", "nano-rope"]
    assert [row[1].split(" [")[0] for row in table.rows] == ["4 of 4", "3 of 4"]
    assert all("[" in cell for row in table.rows for cell in row[1:])
    assert recall_sentences(report.recall)[0].startswith("nano wrote 3 of 4 facts right [30%, 95%] in texts of 16,384")


def test_a_question_that_not_every_model_answered_does_not_count(report):
    cut = dataclasses.replace(report.recall, answers=report.recall.answers[:-1]).complete(report.recall.models)
    assert len(cut.answers) == len(report.recall.answers) - 2


def test_the_page_opens_with_why_then_recall_then_slopes_then_what_was_cut(report):
    text = html(report)
    places = [
        text.index(words) for words in (report.opening[0][:40], "3 of 4 facts right", "nats per token", "9 steps")
    ]
    assert places == sorted(places)
    assert len(report.opening) == 3
