"""`atma runs`: the table, its order, JSON, and the page of curves."""

import json
import re

import pytest

from atma.cli import main
from atma.runs.page import differences, figures, thin
from atma.runs.reading import Point, read_run
from atma.runs.table import ordered, rows
from tests.runs.test_reading import RECIPE, make, row


@pytest.fixture
def runs(tmp_path, monkeypatch):
    make(tmp_path / "runs/long", steps=20, final=20)
    make(tmp_path / "runs/short", steps=5, recipe=RECIPE + "seed = 7\n[model]\nwidth = 64\n")
    make(tmp_path / "runs/bad", recipe="x = [")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def test_the_table_has_a_row_for_every_run_in_the_order_asked_for(runs, capsys):
    assert main(["runs", "--sort", "loss"]) == 0
    said = capsys.readouterr().out
    cells = [line.split("│")[1:4] for line in said.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in cells] == [
        ["long", "finished", "20/10"], ["bad", "broken", "10"], ["short", "stopped", "5/10"],
    ]  # fmt: skip
    assert re.search(r"broken: runs/bad: recipe.toml: ", said)


def test_json_has_the_same_runs(runs, capsys):
    assert main(["runs", "runs/long", "runs/short", "--sort", "name", "--reverse", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = [(one["name"], one["state"], one["loss"]) for one in found]
    assert told == [
        ("short", "stopped", 4.5),
        ("long", "finished", 3.0),
    ]


def test_a_folder_without_runs_is_one_line(runs, capsys):
    (runs / "empty").mkdir()
    assert main(["runs", "empty"]) == 2
    assert main(["runs", "nowhere"]) == 2
    assert [line[:20] for line in capsys.readouterr().err.splitlines()] == [
        "atma: error: empty: ",
        "atma: error: nowhere",
    ]


def test_the_page_is_one_file_with_every_curve_and_asks_the_network_for_nothing(runs, capsys):
    assert main(["runs", "--page", "out/curves.html"]) == 0
    assert "page: out/curves.html" in capsys.readouterr().out
    text = (runs / "out/curves.html").read_text()
    drawn = [json.loads(one) for one in re.findall(r'<script type="application/json" id="f\d+d">(.*?)</script>', text)]
    assert [figure["layout"]["xaxis"]["title"]["text"] for figure in drawn] == [
        name for name in ("training tokens", "steps", "minutes of training") for _ in range(2)
    ]
    assert {trace["name"] for figure in drawn for trace in figure["data"]} == {"long", "short", "bad"}
    assert "train.seed" in text and "model.width" in text
    assert 'content="light dark"' in text and "default-src 'none'" in text
    assert main(["runs", "--page", "runs"]) == 2


def test_a_page_that_is_not_called_so_is_refused(runs, capsys):
    assert main(["runs", "--page", "new/curves.txt"]) == 2
    said = "atma: error: --page new/curves.txt: a page is HTML; name a file that ends in .html\n"
    assert capsys.readouterr().err == said and not (runs / "new").exists()


def test_names_that_are_two_runs_are_told_by_their_folders(tmp_path):
    found = [read_run(make(tmp_path / name)) for name in ("x/a", "y/a", "b")]
    assert [cells[0] for cells in rows(found)] == [str(tmp_path / "x/a"), str(tmp_path / "y/a"), "b"]


def test_every_column_sorts_what_is_not_known_too(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/recipe.toml").write_text("")
    found = [read_run(tmp_path / "new"), read_run(make(tmp_path / "a"))]
    for column in ("started", "name", "state", "steps", "tokens", "loss", "validation", "rate", "time", "size"):
        assert len(ordered(found, column)) == 2
    assert ordered(found, "loss")[0].name == "a"


def test_a_record_of_many_rows_becomes_few_points_whose_mean_is_the_same(tmp_path):
    folder = make(tmp_path / "a")
    lines = (row("train", n, loss=n / 10_000, tokens_per_second=50.0) for n in range(1, 20_001))
    (folder / "metrics.jsonl").write_text("".join(lines))
    run = read_run(folder)
    few = thin(run.train)
    assert len(few) == 300
    assert sum(point.loss for point in few) / 300 == pytest.approx(1.00005, rel=1e-3)
    assert all(len(trace["x"]) <= 300 for figure in figures([run]) for trace in figure.data)
    assert thin([Point(1, 2, 3.0, 4.0)]) == [Point(1, 2, 3.0, 4.0)]


def test_alike_recipes_differ_in_nothing(tmp_path):
    a, b = read_run(make(tmp_path / "a")), read_run(make(tmp_path / "b"))
    assert differences([a, b]).rows == []
    assert figures([read_run(make(tmp_path / "c", steps=0))])[0].data  # a validation alone
