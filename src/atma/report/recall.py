"""Recall at length: right answers by length with their intervals, and every question with what was written."""

from html import escape

from atma.report.content import Recall
from atma.report.figures import Table
from atma.report.parts import items, table_html
from atma.statistics import wilson


def recall_html(recall: Recall) -> str:
    """The first section of a page."""
    header = ["fact", "tokens later", *recall.models]
    rows = [[told, f"{gap:,}", *written] for (told, gap), written in _questions(recall)]
    every = f"<details><summary>Every question and answer</summary>{table_html(Table(header, rows))}</details>"
    note = f"<p>{escape(recall_note(recall))}</p>"
    return (
        f'<section id="recall"><h2>Recall at length</h2>{items(recall_sentences(recall))}{note}'
        f"{table_html(recall_table(recall))}{every}</section>"
    )


def recall_note(recall: Recall) -> str:
    """How it was measured."""
    tokens = recall.haystack_tokens
    again = ", read round and round" if tokens < recall.longest else ""
    return (
        "A fact, a record's number and its code of five digits, is told at the beginning; then comes other text; then "
        "the model is asked, and writes the five digits itself (the likeliest each; nothing is given away). The text "
        f"between: {recall.haystack}, {tokens:,} tokens{again}. Guessing is right once in 100,000. Intervals are 95% "
        "(Wilson)."
    )


def recall_sentences(recall: Recall) -> list[str]:
    """One sentence a model, at the greatest length, and what it does at the training length."""
    sentences = []
    for model in recall.models:
        right, asked = recall.right(model, recall.longest)
        at, of = recall.right(model, recall.trained_length)
        factor = recall.longest / recall.trained_length
        told = f"{model} wrote {right} of {asked} facts right {_interval(right, asked)}"
        where = f"in texts of {recall.longest:,} tokens, {factor:.3g}× its training length"
        own = f", and {at} of {of} {_interval(at, of)} at its training length" if of and factor > 1 else ""
        sentences.append(f"{told} {where}{own}.")
    return sentences


def recall_table(recall: Recall) -> Table:
    """A row for each length and a column for each model, n in every cell."""
    rows = []
    for length in recall.lengths:
        cells = []
        for model in recall.models:
            right, asked = recall.right(model, length)
            cells.append(f"{right} of {asked} {_interval(right, asked)}" if asked else "–")
        rows.append([f"{length:,} ({length / recall.trained_length:.3g}×)", *cells])
    return Table(["length of the text, tokens", *recall.models], rows)


def _questions(recall: Recall) -> list[tuple[tuple[str, int], list[str]]]:
    """Of each fact and length, what every model wrote."""
    asked: dict[tuple[int, int], dict[str, str]] = {}
    about: dict[tuple[int, int], tuple[str, int]] = {}
    for answer in recall.answers:
        key = answer.trial, answer.length
        about[key] = answer.told, answer.gap
        asked.setdefault(key, {})[answer.model] = f"{answer.written} ({'right' if answer.right else 'wrong'})"
    return [(about[key], [written.get(model, "–") for model in recall.models]) for key, written in asked.items()]


def _interval(right: int, asked: int) -> str:
    low, high = wilson(right, asked)
    return f"[{low:.0%}, {high:.0%}]"
