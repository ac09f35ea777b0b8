"""Progress where there is no terminal: a line now and then, with the time that is left."""

import io
import re
import sys

from atma.bars import NARROW, TAKEN, Lines, _columns, bars, clock, rate

LONG = "a stage with a name that is longer than the line has room for it"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_line_comes_every_so_many_seconds_and_says_what_is_left():
    said, now = [], Clock()
    tell = Lines(said.append, 15.0, now)
    for done in range(0, 101, 5):
        tell("reading", done, 100)
        now.now += 5
    assert said[0] == "reading: 15 of 100 (15%), 1.00/s, 1:25 left"
    assert len(said) == 6
    assert said[-1] == "reading: 90 of 100 (90%), 1.00/s, 0:10 left"


def test_a_new_stage_begins_its_own_time_and_an_unknown_end_is_not_guessed():
    said, now = [], Clock()
    tell = Lines(said.append, 15.0, now)
    tell("one", 0, 10)
    now.now += 20
    tell("two", 0, None)
    now.now += 20
    tell("two", 7000, None)
    assert said == ["two: 0 done", "two: 7,000 done, 350/s"]


def test_a_job_that_ends_soon_says_nothing_and_needs_no_stderr(capsys, monkeypatch):
    with bars() as progress:
        progress("short", 1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", None)
    Lines(seconds=0.0)("long", 1, 2)


def test_a_bar_stays_on_one_line_of_a_narrow_terminal():
    from rich.console import Console
    from rich.progress import Progress

    for width in (30, 40, NARROW, 100):
        shown = io.StringIO()
        console = Console(file=shown, width=width, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
        with Progress(*_columns(width), console=console, auto_refresh=False) as progress:
            progress.add_task(LONG[: max(8, width - TAKEN)], total=10, completed=3)
            progress.refresh()
        lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]", shown.getvalue())]
        assert any("30%" in line for line in lines)
        assert max(map(len, lines)) <= width


def test_times_are_told_as_people_do():
    assert [clock(seconds) for seconds in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert [clock(seconds) for seconds in (float("inf"), float("nan"))] == ["–", "–"]


def test_a_rate_has_three_digits_and_a_unit():
    told = [rate(each) for each in (0.25, 7.254, 350.4, 999.9, 31_400, 2e6, 512e6, 3e9)]
    assert told == ["0.250/s", "7.25/s", "350/s", "1.00k/s", "31.4k/s", "2.00M/s", "512M/s", "3.00G/s"]
