"""Tables on the terminal: columns where they fit, else the cells of a row below one another."""

import pytest

from atma.commands.tables import print_table

HEAD = ["context", "loss", "needles"]
ROWS = [["1,024", "2.345 [2.301, 2.389]", "98% [91%, 100%], 32"], ["16,384", "2.345 [2.301, 2.389]", "–"]]


def shown(capsys, monkeypatch, width, **given):
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    print_table("What a model does [at length]", HEAD, ROWS, "a caption of several words, longer than some lines are")
    return capsys.readouterr().out.splitlines()


@pytest.fixture(params=["xterm", "dumb"], autouse=True)
def terminal(request, monkeypatch):
    """Rich takes the width of a dumb one to be 80 columns."""
    monkeypatch.setenv("TERM", request.param)


@pytest.mark.parametrize("width", [24, 40, 60, 100, None])
def test_no_number_is_ever_cut_in_two(width, capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, width)
    for word in (word for row in ROWS for cell in row for word in cell.split()):
        assert any(word in line for line in lines)
    assert width is None or max(map(len, lines)) <= width


def test_a_narrow_terminal_gets_the_cells_below_one_another(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, 29)
    assert lines[:4] == ["What a model does [at length]", "", "1,024", "  loss: 2.345 [2.301, 2.389]"]
    assert any("┏" in line for line in shown(capsys, monkeypatch, 60))


def test_what_is_piped_is_as_wide_as_it_must_be(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = [["a" * 90, "b" * 90]]
    print_table("t", ["x", "y"], wide)
    assert any("a" * 90 in line and "b" * 90 in line for line in capsys.readouterr().out.splitlines())
