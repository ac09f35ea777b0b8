"""The commands about kept states in benchmarks/, in their shortest forms."""

import argparse
import re

import pytest
import torch

from atma.loading import load
from atma.ops import native
from tests.bench.test_scripts import script

exact = pytest.mark.skipif(not native.available(torch.float32), reason="exact only by the compiled kernels")


def test_turns_tells_what_a_turn_costs_cold_kept_and_from_disk(capsys):
    assert script("serving_turns").main(["--lengths", "40", "600", "--repeats", "1", "--memory", "32"]) == 0
    short, long = (line.split("|") for line in capsys.readouterr().out.splitlines()[-2:])
    assert (short[0].strip(), long[0].strip()) == ("40", "600")
    assert float(long[1]) > float(long[2]) > 0
    assert int(long[5]) >= 1


def test_turns_ends_where_an_answer_is_not_that_of_a_cold_read(monkeypatch):
    turns = script("serving_turns")
    ask = turns._ask

    def other(engine, text, cache):
        turn = ask(engine, text, cache)
        turn.output.tokens[-1] += not cache
        return turn

    monkeypatch.setattr(turns, "_ask", other)
    with pytest.raises(SystemExit, match="same answer: False"):
        turns.main(["--lengths", "40", "--repeats", "1", "--memory", "32"])


@pytest.mark.slow
def test_reuse_is_whole_with_an_ample_budget_and_less_with_a_short_one(capsys):
    assert (
        script("serving_reuse").main(["--conversations", "6", "--turns", "3", "--ample", "64", "--percent", "12"]) == 0
    )
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    shares = [float(re.match(r" ([\d.]+)% of", row[4])[1]) for row in rows]
    assert shares[0] == shares[2] == 100
    assert shares[1] < 90
    assert [int(row[5]) for row in rows] == [0, 0, 0]


@exact
@pytest.mark.slow
def test_traces_of_the_packaged_model_are_those_of_cold_reads(capsys):
    traces, corpus = script("serving_traces"), "def main():\n    import os\n" * 100
    options = argparse.Namespace(model="nano", traces=3, other_traces=2, seed=0)
    assert traces.measure(load("nano"), options, corpus) == 0
    printed = capsys.readouterr().out
    assert "  3 traces" in printed
    assert printed.count("  2 traces") == len(traces.OTHERS)
    assert printed.count("with any difference from cold reads: 0; tokens: 0; log-probabilities: 0") == 5
    assert printed.count("exceeded: none") == 5


def test_guided_tells_what_a_structure_costs(capsys):
    pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
    assert script("serving_guided").main(["--tokens", "12", "--rounds", "1", "--streams", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "2"
    assert float(row[4]) > 0


def test_adapters_are_told_what_they_cost(capsys):
    assert script("serving_adapters").main(["--tokens", "10", "--rounds", "1", "--streams", "2"]) == 0
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[1].strip() for row in rows] == ["writing, 2 streams", "reading 4 prompts of 512 tokens"]
    assert all(float(cell) > 0 for row in rows for cell in row[2:5])


@exact
def test_speculation_tells_what_drafts_bring_and_that_answers_are_the_same(capsys):
    asked = ["--tokens", "40", "--rounds", "1", "--streams", "1", "--kinds", "list"]
    assert script("speculation").main(asked) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "list"
    assert float(row[5]) > 0
    assert re.fullmatch(r" \d+% of \d+ ", row[6])
    assert script("speculation").main(["--tokens", "20", "--answers", "2"]) == 0
    assert capsys.readouterr().out.endswith("differ: 0\n")
