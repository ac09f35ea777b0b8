"""Suites asked of the cells of a sweep: what is measured, how figures are named, going on, and what cannot be."""

import dataclasses
import re

import pytest

from atma.eval.results import read_rows
from atma.sweep.analysis import analyse
from atma.sweep.cell import ROWS, run_cell, run_folder
from atma.sweep.cells import expand
from atma.sweep.data import check_evaluations
from atma.sweep.ledger import Ledger
from atma.sweep.metrics import suite_metrics
from atma.sweep.suites import SUITES, read_suites
from atma.sweep.table_metrics import KNOWN, digits_of, rises
from atma.sweep.table_reading import load_table
from atma.sweep.worker import Worker
from tests.sweep.conftest import TINY, tiny_sweep

ATTENTION = {"field": "model.core", "values": ["polar", "rope"]}


def asked(corpus, own=None):
    """Four suites, as little of each as there can be."""
    text = str(corpus.parent / "text")
    tables = {
        "likelihood": {"texts": text, "lengths": [32, 64], "documents": 2, "target_bytes": 16, "text_bytes": 400},
        "retrieval": {
            "tasks": ["passkey"],
            "haystacks": ["synthetic"],
            "lengths": [128],
            "depths": [50],
            "per_cell": 2,
        },
        "reasoning": {"tasks": ["qa1"], "lengths": [0], "per_cell": 2, "scoring": "ranking"},
        "recall": {"task": "copy", "sizes": ["16"], "tokens": 128, "batch_tokens": 64, "every": 1, "held_out": 2}
        | {"trials": 2, "factors": [1, 2], "mixers": ["rope"]},
    }
    table = {"factors": {"attention": ATTENTION}}
    return expand(
        TINY | {"name": "tiny", "data": {"path": str(corpus)}, "sweep": table, "suites": tables | (own or {})}
    )


def worker(sweep, folder, run=run_cell):
    return Worker(sweep, Ledger.create(folder, sweep), "cpu", None, lambda text: None, run)


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    sweep, folder = asked(corpus), tmp_path_factory.mktemp("suites") / "sweep"
    assert check_evaluations(sweep) == []
    assert worker(sweep, folder).go() == 2
    return sweep, folder


def test_a_result_holds_the_rows_options_and_metrics_of_every_suite(done):
    sweep, folder = done
    for cell, result in zip(sweep.cells, Ledger.open(folder).results(), strict=True):
        assert list(result["suites"]) == [name for name in SUITES if name != "tasks"] == list(cell.suites)
        likelihood = result["suites"]["likelihood"]
        assert likelihood["options"]["documents"] == 2
        row = next(row for row in likelihood["rows"] if (row["kind"], row.get("length")) == ("fixed", 64))
        assert result["metrics"]["likelihood_fixed_bits_per_byte_64"] == row["bits_per_byte"]
        assert {row["suite"] for row in result["rows"]} == {"lengths"}
        weights = result["provenance"]["weights_sha256"]
        assert all(row["provenance"]["weights_sha256"] == weights for row in likelihood["rows"])
        kept = read_rows(run_folder(Ledger.open(folder).task(cell.id).folder, 1) / ROWS)
        assert {row["suite"] for row in kept} == {"lengths", *cell.suites}


def test_metrics_of_suites_are_named_by_one_rule(done):
    metrics = Ledger.open(done[1]).results()[0]["metrics"]
    expected = {
        "likelihood_clean_bits_per_byte_32",
        "likelihood_junk_bits_per_byte_64",
        "likelihood_fixed_slope",
        "retrieval_passkey_synthetic_depth50_forced_token_accuracy_128",
        "retrieval_absent_passkey_synthetic_forced_cross_entropy_128",
        "reasoning_ranking_qa1_accuracy_0",
        "recall_copy_16_rope_accuracy_32",
        "clean_nll_64",
    }
    assert expected <= metrics.keys()
    ours = [name for name in metrics if name.startswith(tuple(SUITES))]
    assert all(KNOWN.fullmatch(name) for name in ours)
    assert not KNOWN.fullmatch("recall_share")


def test_the_table_and_the_analysis_judge_by_a_figure_of_a_suite(done):
    found = analyse(load_table(done[1]), "likelihood_clean_bits_per_byte")
    assert found.metric == "likelihood_clean_bits_per_byte_64"
    assert len(found.leaders) == len(found.effects[0].differences) * 2 == 2


def test_what_was_measured_before_a_stop_is_not_measured_again(done, corpus, tmp_path):
    """Stopped within the retrieval; the next attempt takes the likelihood from the rows of the first."""
    sweep = done[0]
    stages: list[list[str]] = [[], []]

    def attempt(place, stops):
        first = worker(dataclasses.replace(sweep, cells=sweep.cells[:1]), tmp_path / "s")

        def run(cell, claim, device, stop, told):
            def count(stage, done, of):
                stages[place].append((stage, done, of))
                if stops and stage.startswith("passkey"):
                    first.why = "asked to"
                told(stage, done, of)

            return run_cell(cell, claim, device, stop, count)

        first.run = run
        return first.go()

    assert attempt(0, True) == 0
    assert attempt(1, False) == 1
    again = [one for one in stages[1] if one[0] == "clean"]
    assert again == [("clean", again[0][2], again[0][2])]
    task = Ledger.open(tmp_path / "s").task(sweep.cells[0].id)
    undisturbed = Ledger.open(done[1]).task(sweep.cells[0].id).result()
    ended = task.result()
    assert ended is not None and undisturbed is not None
    ours, theirs = ended["suites"], undisturbed["suites"]
    for name in ("likelihood", "retrieval", "reasoning"):
        assert ours[name]["rows"] == theirs[name]["rows"]


def test_a_sweep_without_suites_has_results_as_before(corpus, tmp_path):
    sweep = tiny_sweep(corpus, {"factors": {"model.core": ["polar"]}})
    assert worker(sweep, tmp_path / "s").go() == 1
    [result] = Ledger.open(tmp_path / "s").results()
    keys = ["cell", "factors", "seed", "metrics", "rows", "config", "provenance", "started", "seconds"]
    assert list(result) == [*keys, "processor_seconds"]
    assert not [name for name in result["metrics"] if name.startswith(tuple(SUITES))]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"likelihood": {"texts": "no/such/file"}}, "[suites.likelihood] cannot work: no/such/file"),
        ({"retrieval": {"tasks": ["niah"], "lengths": [16]}}, "[suites.retrieval] cannot work: length 16 has no room"),
        ({"recall": {"mixers": ["polaris"]}}, "[suites.recall] cannot work"),
    ],
)
def test_a_suite_that_can_never_be_asked_is_told_before_anything_is_trained(corpus, own, said):
    with pytest.raises(ValueError, match=r"cell attention=polar seed=0: .*" + re.escape(said)):
        check_evaluations(asked(corpus, own))


def test_every_suite_of_the_table_is_there_and_runs_under_its_name():
    assert {name: read_suites({name: {}})[name].name for name in SUITES} == {name: name for name in SUITES}


def test_runs_of_several_seeds_are_averaged_and_a_figure_that_one_lacks_is_none():
    rows = [
        {"kind": "run", "task": "mqar", "size": "64,4", "mixer": "polar+memory", "rate": 0.5, "length": 64}
        | {"tokens_to_99": tokens, "memory_bytes": 8}
        for tokens in (100, None)
    ]
    assert suite_metrics({"recall": rows}) == {"recall_mqar_64-4_polar+memory_rate0.5_memory_bytes": 8}
    assert suite_metrics({"recall": rows[:1]})["recall_mqar_64-4_polar+memory_rate0.5_tokens_to_learn"] == 100


def test_figures_of_lm_eval_become_metrics_and_their_errors_do_not():
    row = {"kind": "task", "task": "arc_easy", "filter": "none", "trials": 4, "acc": 0.5, "acc_stderr": 0.1}
    assert suite_metrics({"tasks": [row]}) == {"tasks_arc_easy_acc": 50.0}


def test_figures_of_suites_have_a_direction_and_decimals():
    names = ["retrieval_niah_forced_exact_accuracy_64", "recall_mqar_64-4_rope_tokens_to_learn", "tasks_piqa_acc_norm"]
    assert [rises(name) for name in names] == [True, False, True]
    assert [digits_of(name) for name in (*names, "likelihood_clean_bits_per_byte_64")] == [2, 0, 2, 4]
