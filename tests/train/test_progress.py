"""What a run shows while it goes."""

import io
import re

import pytest
import rich.console

from atma.train.progress import Bar, Lines
from atma.train.samples import Sample

ROWS = [
    {"kind": "train", "step": 3, "loss": 2.345, "tokens_per_second": 12345.0},
    {"kind": "validation", "step": 3, "loss": 2.5},
    {"kind": "train", "step": 400, "loss": 2.125, "tokens_per_second": 12345.0},
]


@pytest.mark.parametrize("kind", ["lines", "bar", "narrow bar"])
def test_a_sample_that_the_output_cannot_write_stops_no_run(kind, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    width = 40 if kind == "narrow bar" else 100
    console = rich.console.Console(file=out, width=width, force_terminal=True, _environ={"TERM": "xterm"})
    monkeypatch.setattr("rich.console.Console", lambda: console)
    shown = Lines(out) if kind == "lines" else Bar()
    shown.start("prüfung", 400, 0)
    for row in [Sample(3, "a", "\u6f22\x1b").row(), *ROWS]:
        shown.show(row)
    shown.stop()
    assert "a???" in out.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_the_bar_of_a_run_stays_on_one_line_and_has_the_loss_and_the_time_left(width, monkeypatch):
    shown = io.StringIO()
    console = rich.console.Console(
        file=shown, width=width, force_terminal=True, color_system=None, _environ={"TERM": "xterm"}
    )
    monkeypatch.setattr("rich.console.Console", lambda: console)
    bar = Bar()
    bar.start("a-run-of-some-name", 1000, 0)
    for row in ROWS:
        bar.show(row)
    bar.stop()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]", shown.getvalue())]
    last = [line for line in lines if "loss" in line][-1]
    assert max(map(len, lines)) <= width
    assert "loss 2.1" in last and re.search(r"(-+:-+|\d:\d\d) *$", last)
    assert ("12,345 tokens/s" in last) == (width >= 80)
