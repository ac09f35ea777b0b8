"""Progress in a notebook: one line that changes in its place. The kernel is a stand-in here."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from atma import notebook
from atma.bars import bars
from atma.train.progress import Lines, NotebookBar, terminal_progress


@pytest.fixture
def shown(monkeypatch):
    """What the only output of a cell has shown, the latest last."""
    texts = []
    shell, display = ModuleType("IPython"), ModuleType("IPython.display")
    shell.get_ipython = lambda: SimpleNamespace(kernel=object())

    def show(what, display_id):
        assert not texts
        texts.append(what)
        return SimpleNamespace(update=texts.append)

    display.HTML, display.display = str, show
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return texts


def test_a_terminal_is_no_notebook(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not notebook.active()
    assert isinstance(terminal_progress(), Lines)


def test_a_line_changes_four_times_a_second_at_most(shown) -> None:
    moments = iter([0.0, 0.0, 0.1, 0.2, 0.3, 0.3])
    line = notebook.Line(lambda: next(moments))
    for text in ("a", "b", "c", "<d>"):
        line.show(text, 0.5)
    assert len(shown) == 2
    assert "&lt;d&gt;" in shown[-1] and 'value="0.5000"' in shown[-1]


def test_a_bar_leaves_nothing_behind(shown) -> None:
    with bars() as advance:
        advance("needles", 1, 4)
        advance("no total", 1, None)
    assert "25%" in shown[0]
    assert shown[-1] == ""


def test_a_training_leaves_its_last_line_and_what_happened(shown, capsys) -> None:
    bar = terminal_progress()
    assert isinstance(bar, NotebookBar)
    bar.start("mine", 2, 0)
    row = {"kind": "train", "step": 2, "loss": 1.5, "tokens_per_second": 10.0}
    for one in (
        row | {"step": 1},
        {"kind": "event", "step": 1, "event": "resumed at step 1"},
        row,
        {"kind": "validation", "loss": 2.0},
    ):
        bar.show(one)
    bar.stop()
    assert shown[-1] == '<span style="font-size:90%">mine: step 2 of 2, loss 1.500, validation 2.000</span>'
    assert capsys.readouterr().out == "step 1: resumed at step 1\n"
