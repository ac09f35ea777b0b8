"""`atma diagnose` from a folder and a text to sentences, tables, rows and a page that a real browser shows."""

import json

import numpy as np
import pytest

from atma.checkpoint import save_model
from atma.cli import main
from atma.diagnose import diagnosis
from atma.diagnose.page import figures
from atma.diagnose.plan import SIZES, Plan
from atma.eval.likelihood.prefixes import Documents
from atma.tokenizer import byte_tokenizer
from tests.diagnose.conftest import Loaded, made
from tests.harness.watching import Watched

FEW = {"--lengths": ["128", "192"], "--documents": ["2"], "--records": ["1"], "--stress": ["1"], "--dtype": ["float64"]}


@pytest.fixture
def folder(tmp_path):
    """A model folder and a text beside it."""
    save_model(tmp_path / "tiny", made().float(), byte_tokenizer(), {"recipe": {"train": {"length": 64}}})
    letters = np.random.default_rng(3).integers(97, 123, 500).tolist()
    (tmp_path / "text.txt").write_bytes(bytes(letters))
    return tmp_path


def arguments(folder, *more):
    """A diagnosis of the folder's model; `more` takes the place of what is set here."""
    places = {"--text": "text.txt", "--page": "page.html", "--out": "rows.jsonl"}
    usual = FEW | {option: [str(folder / name)] for option, name in places.items()}
    kept = [word for option, values in usual.items() if option not in more for word in (option, *values)]
    return ["diagnose", str(folder / "tiny"), *kept, *more]


def test_a_diagnosis_is_sentences_tables_rows_and_a_page(folder, capsys, monkeypatch):
    assert main(arguments(folder, "--cap-half-life", "4", "--heads", "3.1")) == 0
    said = capsys.readouterr().out
    assert said.startswith("1. ")
    for words in ("as it is", "without head 3.1", "head 3.1 capped", "Half-lives", "What each head does"):
        assert words in said
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    kinds = {row["kind"] for row in rows} - {"finding"}
    assert kinds == {"loss", "far", "recall", "channel", "branch", "retention", "gain", "effect"}
    assert {row["change"] for row in rows if row["kind"] == "loss"} >= {"without any memory", "head 3.1 capped at 4"}
    page = (folder / "page.html").read_text()
    assert "Diagnosis of tiny" in page and "Half-lives" in page and "Block gains" in page

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(diagnosis, "read", never)
    monkeypatch.setattr(diagnosis, "gains", never)
    assert main(arguments(folder, "--cap-half-life", "4", "--heads", "3.1")) == 0
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] == rows


def test_changes_that_are_asked_for_are_rows_tables_and_figures(folder, capsys):
    asked = ["--mask", "none", "--stress", "0", "--interpolate", "3.1=0.5", "--scale", "3.read=0.5", "1.mlp=0"]
    assert main(arguments(folder, *asked, "--choose-heads", "1", "--paths", "straight", "--sinks")) == 0
    said = capsys.readouterr().out
    assert "Heads, one after the other" in said and "econdary sink" in said and "Heads chosen" in said
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    effects = {row["change"]: row for row in rows if row["kind"] == "effect"}
    assert effects["head 3.1 moved 0.5 to the identity"]["strength"] == 0.5
    assert effects["the read of layer 3 times 0.5"]["factor"] == 0.5 and "the mlp of layer 1 times 0" in effects
    assert sum(change.endswith(" at the head") for change in effects) == 8
    assert {"choice", "sinks"} <= {row["kind"] for row in rows}
    assert "Heads chosen" in (folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lengths", "64", "128"], "the first length, 64, must be at least 90"),
        (["--lengths", "128", "600"], "the text has 500 tokens, less than the length 600"),
        (["--lengths", "192", "128"], "'lengths' must be strictly increasing"),
        (["--lengths", "128", "150"], "'lengths' must be 64 or more apart"),
        (["--heads", "0.0"], "there is no memory head 0.0"),
        (["--heads", "9"], "heads are named as in 2.5,6.1"),
        (["--interpolate", "0.0=1"], "head 0.0 has no map of weights"),
        (["--interpolate", "3.0=2"], "a strength from 0 to 1"),
        (["--interpolate", "3.0"], "--interpolate is written as in 2.0,2.1=0.5 or all=1"),
        (["--scale", "wisdom=0"], "no layer has this channel"),
        (["--choose-strength", "0"], "'choose_strength' must be over 0 and at most 1"),
        (["--records", "0"], "'records' must be at least 1"),
        (["--cap-half-life", "-3"], "'cap_half_life' must be positive, or 0"),
        (["--text", "/nowhere.txt"], "/nowhere.txt: No such file"),
        (["--page", "."], "--page .: a folder; name the .html file to write"),
        (["--seed", str(1 << 80)], "'seed' must be below 2**62"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_measured(folder, capsys, more, said):
    assert main(arguments(folder, *more)) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (folder / "rows.jsonl").exists()


@pytest.mark.parametrize("core", ["nope", "rope"])
def test_models_without_memory_or_count_have_the_figures_of_what_they_have(core):
    documents = Documents(np.random.default_rng(1).integers(97, 123, (2, 200)), 256)
    plan = Plan(lengths=(128, 192), records=1, stress=0)
    found = diagnosis.diagnose(Loaded(made(core, False, 100), byte_tokenizer()), documents, plan)
    titles = [figure.title for figure in figures(found.rows)]
    assert "Copy score" in titles and "What each part is worth: loss" in titles
    assert not {"Half-lives", "Weight on the null sink", "Memory norm", "Magnitude μ", "Block gains"} & set(titles)
    assert {row["change"] for row in found.rows if row["kind"] == "effect"} == {
        "without the read of layer 1",
        "without the read of layer 3",
        "without any read",
        *(f"without head {layer}.{head}" for layer in (1, 3) for head in (0, 1)),
    }


def test_the_cap_is_the_trained_length_and_takes_the_worst_heads(folder):
    documents = Documents(np.random.default_rng(1).integers(97, 123, (2, 200)), 256)
    loaded = Loaded(made(), byte_tokenizer())
    plan = Plan(lengths=(128, 192), records=1, stress=0, mask="none", heads="worst2", cap_half_life=3)
    rows = diagnosis.diagnose(loaded, documents, plan).rows
    assert {row["tokens"] for row in rows if row["kind"] == "retention"} == {2 * 192}  # of the texts, not of questions
    changes = {row["change"] for row in rows if row["kind"] == "effect"}
    assert len(changes) == 3 and sum(change.startswith("heads ") for change in changes) == 1
    from atma.loading import load

    assert diagnosis.trained_length(load(folder / "tiny")) == 64
    assert diagnosis.trained_length(loaded) is None
    assert diagnosis.diagnose(loaded, documents, Plan(lengths=(128, 192), records=1, stress=0, mask="none")).cap == 128


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_a_plan(size):
    assert Plan(size=size).extent == SIZES[size]
    assert Plan(lengths=SIZES[size].lengths).extent.lengths == SIZES[size].lengths


def test_a_browser_shows_the_page_whole(folder, tab):
    assert main(arguments(folder, "--mask", "channels")) == 0
    for width in (390, 1280):
        watched = Watched(tab, folder / "page.html", width)
        charts = tab.locator(".chart").count()
        tab.wait_for_function(f"document.querySelectorAll('.chart:has(.main-svg)').length == {charts}")
        assert charts == 16
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        watched.close()
