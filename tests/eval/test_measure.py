"""`atma.measure` gives what `atma eval lengths` and `atma eval retrieval` give, and shows it."""

import importlib.util
import sysconfig
from xml.etree import ElementTree

import numpy as np
import pytest

import atma
from atma.checkpoint import save_model
from atma.cli import main
from atma.config import preset
from atma.model import Model
from atma.ops import native
from atma.tokenizer import byte_tokenizer
from tests.documents.policy import texts
from tests.eval.test_hugging_face import made

SIZES = {"documents": 2, "trials": 2, "depths": [10, 90]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, data of its tokenizer, and a small standard library in the place of the whole one."""
    folder = tmp_path_factory.mktemp("measure")
    texts(folder / "library")
    save_model(folder / "tiny", Model(preset("nano-test")), byte_tokenizer())
    atma.prepare(folder / "library", folder / "data")
    real = sysconfig.get_path
    native.status()  # built, if it is not yet, before the cache is another
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sysconfig,
            "get_path",
            lambda name, *rest: str(folder / "library") if name == "stdlib" else real(name, *rest),
        )
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def results(place):
    return atma.measure(place / "tiny", [256, 512], **SIZES, data=place / "data")


def figures_of(rows):
    """Rows without what tells where they came from."""
    return [{key: value for key, value in row.items() if key not in ("provenance", "key")} for row in rows]


def test_the_rows_are_those_of_the_commands(place, results, tmp_path) -> None:
    common = ["--model", str(place / "tiny"), "--lengths", "256", "512"]
    lengths = ["--data", str(place / "data"), "--documents", "2", "--needle-trials", "0", "--no-junk"]
    grid = ["--tasks", "niah", "--haystacks", "natural", "--depths", "10", "90", "--per-cell", "2"]
    out = tmp_path / "rows.jsonl"
    assert main(["eval", "lengths", *common, *lengths, "--out", str(out)]) == 0
    assert main(["eval", "retrieval", *common, *grid, "--out", str(out)]) == 0
    theirs = atma.Results.read(out)
    assert figures_of(theirs.rows) == figures_of(results.rows)
    assert [row["key"] for row in theirs.rows] == [row["key"] for row in results.rows]
    kept = out.read_bytes()
    assert atma.measure(place / "tiny", [256, 512], **SIZES, data=place / "data", out=out).rows == theirs.rows
    assert out.read_bytes() == kept


def test_the_table_has_a_line_for_each_length(results) -> None:
    head, *lines = results.table().splitlines()
    assert "tiny: loss" in head and "tiny: prefixes" in head and "tiny: needles" in head
    assert [line.split()[0] for line in lines] == ["256", "512"]
    assert "of 2" in lines[0]
    assert results.table() in repr(results)


def test_curves_and_heat_maps_hold_the_figures_of_the_rows(results) -> None:
    [curve] = results.curve().figures
    assert curve.data[0]["y"] == [row["loss"] for row in results.rows if row["kind"] == "fixed"]
    assert curve.layout["shapes"] == []
    [found] = results.curve("needles").figures
    assert found.data[0]["x"] == [256, 512]
    [squares] = results.heat_map().figures
    assert squares.data[0]["y"] == ["depth 10%", "depth 90%"]
    assert squares.title.startswith("tiny: ")
    assert results.curve().plotly().layout.title.text == curve.title


def test_what_a_notebook_shows_is_plain_html_that_asks_for_nothing(results) -> None:
    for shown in (results, results.curve(), results.curve("position"), results.curve("needles"), results.heat_map()):
        html = shown._repr_html_()
        ElementTree.fromstring(f"<div>{html.replace('<br>', '<br/>')}</div>")
        assert "<script" not in html and "http" not in html


def test_rows_show_themselves_as_a_table(results) -> None:
    assert repr(results.rows).startswith(f"{len(results.rows)} rows\nkind")
    assert len(repr(atma.Results.rows.fget(results + results + results)).splitlines()) < 30
    assert "<table" in results.rows._repr_html_()


def test_a_run_and_what_was_loaded_are_models_too_and_others_are_told(place, results) -> None:
    loaded = atma.load(place / "tiny")
    assert atma.measure(loaded, [256, 512], **SIZES, data=place / "data").rows == results.rows
    with pytest.raises(ValueError, match="not a Model"):
        atma.measure(loaded.model, [256])


def test_two_models_stand_side_by_side(results) -> None:
    both = results + atma.Results([results.parts[0]._replace(name="<other>", trained_length=64)])
    assert [trace["name"] for trace in both.curve().figures[0].data] == ["tiny", "<other>"]
    assert [shape["x0"] for shape in both.curve().figures[0].layout["shapes"]] == [64]
    assert len(both.heat_map().figures) == 2
    assert "&lt;other&gt;" in both._repr_html_() and "<other>" not in both.curve()._repr_html_()


def test_models_of_the_same_name_are_told_apart(results) -> None:
    both = results + results
    assert [part.name for part in both.parts] == ["tiny", "tiny (2)"]
    assert len(both.table().splitlines()[0].split("tiny")) == 7


def test_rows_are_saved_and_read_again_and_charts_become_a_page(results, tmp_path) -> None:
    again = atma.Results.read(results.save(tmp_path / "rows.jsonl"))
    assert again.rows == results.rows
    assert "Needles by length" in results.save(tmp_path / "page.html").read_text()
    assert results.curve().save(tmp_path / "curve.html").exists()
    with pytest.raises(ValueError, match=r"end the name in .jsonl"):
        results.save(tmp_path / "page.txt")
    with pytest.raises(ValueError, match=r"end the name in .html"):
        results.curve().save(tmp_path / "curve.png")
    with pytest.raises(ValueError, match="no such file"):
        atma.Results.read(tmp_path / "none.jsonl")


def test_one_length_depth_and_task_need_no_list_and_arrays_are_lists(place) -> None:
    one = atma.measure(place / "tiny", 256, documents=0, trials=1, depths=50, tasks="niah")
    several = atma.measure(place / "tiny", np.array([256]), documents=0, trials=1, depths=[np.int64(50)])
    assert one.rows == several.rows


def test_one_half_may_be_left_out(place) -> None:
    losses = atma.measure(place / "tiny", [64], documents=1, trials=0, data=place / "data")
    assert {row["kind"] for row in losses.rows} == {"nested", "position", "fixed", "summary"}
    with pytest.raises(ValueError, match="no heat map: it takes needles by depth"):
        losses.heat_map()
    needles = atma.measure(place / "tiny", [256], documents=0, trials=1, depths=[50])
    assert {row["kind"] for row in needles.rows} == {"retrieval", "absent"}
    with pytest.raises(ValueError, match="no curve 'fixed'"):
        needles.curve()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"documents": 0, "trials": 0}, "nothing to measure"),
        ({"documents": -1}, "'documents' must be 0 or more"),
        ({"lengths": [512, 256]}, "strictly increasing"),
        ({"depths": []}, "'depths' must be one or more"),
        ({"depths": [101]}, "percentages"),
        ({"tasks": ["needle"]}, "no retrieval task 'needle'"),
        ({"model": "no-such"}, "no such model folder"),
        ({"lengths": ["a"]}, "'lengths' must be a whole number or a list of them"),
        ({"lengths": None}, "'lengths' must be a whole number or a list of them"),
        ({"depths": [0.5]}, "'depths' must be a whole number or a list of them"),
        ({"trials": "8"}, "'trials' must be 0 or more, not '8'"),
        ({"tasks": [5]}, "'tasks' must be a task's name or a list of them"),
        ({"tasks": "needle"}, "no retrieval task 'needle'"),
    ],
)
def test_what_cannot_be_measured_is_told_first(place, wrong, told) -> None:
    with pytest.raises(ValueError, match=told):
        atma.measure(**{"model": place / "tiny", "lengths": [64], **wrong})


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_tokenizer_whose_end_of_text_has_a_name_of_its_own_is_no_hindrance(place, tmp_path) -> None:
    import transformers

    folder = made("bos", tmp_path / "own")
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<over-and-out>")
    (folder / "tokenizer.json").write_text(text)
    named = {"eos_token": "<over-and-out>", "bos_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named).save_pretrained(folder)
    results = atma.measure(f"hf:{folder}", [128], documents=1, trials=0)
    assert {row["kind"] for row in results.rows} >= {"fixed", "nested"}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers_is_measured_alike(place, tmp_path) -> None:
    folder = made("llama", tmp_path / "llama")
    results = atma.measure(f"hf:{folder}", [256], documents=1, trials=1, depths=[50])
    assert {row["kind"] for row in results.rows} >= {"fixed", "nested", "retrieval"}
    assert "llama: loss" in results.table()
    measured = atma.Measured(f"hf:{folder}", dtype="float64")
    assert atma.measure(measured, [64], documents=1, trials=0).rows[0]["provenance"]["dtype"] == "float64"


def test_a_model_of_transformers_is_measured_by_length_and_drawn(place, tmp_path, capsys) -> None:
    made("lfm2", tmp_path / "theirs")
    page, sizes = tmp_path / "lengths.html", ["--documents", "2", "--needle-trials", "2", "--no-junk"]
    assert main(["eval", "lengths", f"hf:{tmp_path / 'theirs'}", "--lengths", "256", *sizes, "--page", str(page)]) == 0
    said = capsys.readouterr().out
    assert "theirs on " in said and f"page: {page}" in said and "theirs" in page.read_text()
    assert main(["eval", "lengths", "nano", "--page", str(tmp_path / "page.txt")]) == 2
    assert "page.txt" in capsys.readouterr().err


def test_tokenizers_that_differ_are_told_beside_nats(place, results) -> None:
    rows = [row | {"provenance": row["provenance"] | {"tokenizer_sha256": "other"}} for row in results.rows]
    both = results + atma.Results([results.parts[0]._replace(rows=rows)])
    assert "compare the shapes" in both.curve("fixed").title and "compare" not in results.curve("fixed").title
    assert "(" in results.table()
