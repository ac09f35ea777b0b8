"""What a demonstration says in the terminal."""

from typing import TYPE_CHECKING

from atma.report import Report, Section, headline
from atma.report.figures import Figure, loss_by_length, needles
from atma.report.recall import recall_sentences

if TYPE_CHECKING:
    from rich.console import Console


def say_report(console: "Console", report: Report) -> None:
    """The report in the order of its page: why, recall, slopes, what was cut."""
    console.rule(report.title)
    for sentence in (*report.opening, *(recall_sentences(report.recall) if report.recall else ())):
        _say(console, sentence)
    for section in report.sections:
        _say_section(console, section)
    for cut in report.cuts:
        _say(console, f"Cut: {cut}")


def _say_section(console: "Console", section: Section) -> None:
    console.rule(section.title)
    for figure in (loss_by_length(section, "fixed"), loss_by_length(section, "nested"), needles(section)):
        if figure is not None:
            _print_table(console, figure)
    for sentence in headline(section):
        _say(console, sentence)
    for run in section.runs:
        if run.sample:
            console.print(f"\n{run.name} writes:", style="bold")
            _say(console, run.prompt + run.sample)


def _say(console: "Console", text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _print_table(console: "Console", figure: Figure) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=figure.title)
    for name in figure.table.header:
        table.add_column(Text(name), justify="right")
    for row in figure.table.rows:
        table.add_row(*map(Text, row))
    console.print(table)
