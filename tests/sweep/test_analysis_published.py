"""The paper's stage I figures come out of its own table of 120 cells (maths.md, section 8)."""

from pathlib import Path

import pytest

from atma.sweep.analysis import analyse
from atma.sweep.analysis_compare import PUBLISHED, common_multiple, compare
from atma.sweep.contrasts_words import read_contrasts
from atma.sweep.table import Table
from atma.sweep.table_metrics import number_text
from atma.sweep.table_reading import load_table
from tests.sweep.synthetic_sweep import write_sweep

TABLE = Path(__file__).resolve().parents[3] / "shared" / "published" / "stage1_120_cells.csv"


@pytest.fixture(scope="module")
def published() -> Table:
    if not TABLE.is_file():
        pytest.skip("the published table (../shared/published) is not beside this checkout")
    return load_table(TABLE)


def test_the_table_is_a_full_factorial_judged_by_the_needle_at_64k(published):
    assert [len(levels) for levels in published.levels.values()] == [3, 5, 2, 2, 2]
    assert len(published.cells) == 3 * 5 * 2 * 2 * 2
    assert published.metric() == "needle_token_acc_65536" == published.metric("needle_token_acc@32x")


@pytest.mark.parametrize(
    ("words", "mean", "positive", "zero", "pairs"),
    [
        ("memory where attention=polar", "+47.8", 20, 0, 20),
        ("memory where attention=nope", "+4.6", 11, 2, 20),
        ("memory where attention=rope", "0.0", 0, 20, 20),
        ("polar+memory - nope+memory", "+41.7", 19, 1, 20),
        ("polar+memory - rope+memory", "+50.3", 20, 0, 20),
        ("window where polar+memory", "-25.5", 2, 0, 10),
        ("distractor where polar+memory", "-6.0", 4, 0, 10),
    ],
)
def test_a_matched_contrast_is_the_papers(published, words, mean, positive, zero, pairs):
    (found,) = read_contrasts(published, published.metric(), words)
    assert number_text(found.mean, 1, signed=True) == mean
    assert (found.positive, found.zero, len(found.differences)) == (positive, zero, pairs)
    assert found.unmatched == 0


def test_what_memory_does_to_polar_has_the_papers_median_and_range(published):
    (found,) = read_contrasts(published, published.metric(), "memory where polar")
    assert (found.mean, found.median) == (47.75, 51.25)
    assert (min(found.differences), max(found.differences)) == (7.5, 92.5)
    assert found.p == 2 / 2**20


def test_the_leader_is_the_cell_that_the_paper_selects(published):
    leader = analyse(published).leaders[0]
    assert leader.factors == {
        "attention": "polar",
        "regularizer": "baseline",
        "distractor": 0,
        "memory": 1,
        "window": 0,
    }
    assert leader.metrics["needle_token_acc_65536"] == 92.5
    losses = [leader.metrics[f"clean_nll_{length}"] for length in (2048, 65536)]
    assert [number_text(loss, 3) for loss in losses] == ["2.703", "1.960"]


def test_a_table_agrees_with_itself_in_every_published_contrast(published):
    found = compare(published, published)
    assert [comparison.words for comparison in found] == list(PUBLISHED)
    assert [comparison.agree for comparison in found] == [comparison.clear or None for comparison in found]
    assert [comparison.words for comparison in found if comparison.clear] == [
        "memory where polar",
        "polar+memory - nope+memory",
        "polar+memory - rope+memory",
        "window where polar+memory",
    ]


def test_a_sweep_is_compared_at_the_longest_common_multiple_and_says_what_it_lacks(published, tmp_path):
    ours = load_table(write_sweep(tmp_path))
    assert common_multiple(ours, published, "needle_token_acc") == 16
    found = {comparison.words: comparison for comparison in compare(ours, published)}
    memory = found["memory where polar"]
    assert memory.ours.metric == "needle_token_acc_4096"
    assert memory.published.metric == "needle_token_acc_32768"
    assert memory.agree
    missing = found["distractor where polar+memory"]
    assert (missing.ours, missing.agree) == (None, None)
    assert "write a factor (attention, memory, window)" in missing.reason
    assert found["window where polar+memory"].ours.label == "window 64 − none where polar +memory"


def test_tables_without_a_common_multiple_are_an_error(published, tmp_path):
    path = tmp_path / "ours.csv"
    path.write_text("attention,needle_token_acc_100,needle_token_acc_300\npolar,9,8\n")
    ours = load_table(path).where({})
    assert common_multiple(ours, published, "needle_token_acc") == 1
    for cell in ours.cells:
        cell.config["train"] = {"length": 50}
    assert common_multiple(ours, published, "needle_token_acc") == 2
    for cell in ours.cells:
        cell.config["train"] = {"length": 90}
    with pytest.raises(ValueError, match="measure a common multiple"):
        common_multiple(ours, published, "needle_token_acc")
