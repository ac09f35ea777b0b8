"""The last line of a training run, and what `atma train` does with trackers and early stopping."""

import re

import pytest

from atma.cli import main
from tests.test_cli import RECIPE
from tests.test_cli import data as data  # the fixture


@pytest.fixture
def train(data, tmp_path, monkeypatch, capsys):
    """Runs `atma train` on a little text; its status and what it said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE.format(data=data) + "evaluation_tokens = 64\n")

    def call(*arguments):
        status = main(["train", "r.toml", "--device", "cpu", "--out", "runs/mine", *arguments])
        told = capsys.readouterr()
        return status, told.out.splitlines(), told.err

    return call


def test_the_last_line_says_what_the_run_came_to(train):
    status, lines, _ = train("--set", "train.evaluate_every=1")
    assert status == 0
    pattern = (
        r"trained: mine: loss \d\.\d{4}, validation \d\.\d{4}, 128 tokens in \d:\d\d \([\d,]+ tokens/s\), "
        r"model in runs/mine/final"
    )
    assert re.fullmatch(pattern, lines[-1])
    assert main(["runs"]) == 0


def test_a_run_that_was_never_validated_says_nothing_of_it(train):
    assert re.fullmatch(r"trained: mine: loss \d\.\d{4}, 128 tokens in .*", train()[1][-1])


def test_early_stopping_ends_a_run_through_the_command(train):
    settings = ("train.tokens=3200", "train.evaluate_every=1", "train.early_stopping=2", "train.muon_rate=5.0")
    status, lines, _ = train("--set", *settings, "train.adamw_rate=5.0", "train.embedding_rate=5.0")
    assert status == 0
    assert any("stopped early, 2 validations without a lower loss; lowest validation loss" in line for line in lines)
    assert int(re.search(r"([\d,]+) tokens in", lines[-1])[1].replace(",", "")) < 3200


def test_samples_are_shown_and_kept(train, tmp_path):
    status, lines, _ = train("--set", "train.sample_every=1", "train.sample_tokens=4", 'train.sample_prompts=["Doc"]')
    assert status == 0
    assert [line for line in lines if "a sample:" in line] and [line for line in lines if "Doc⟩" in line]
    assert len((tmp_path / "runs/mine/samples.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_is_not_there_is_one_line_and_the_run_ends(train, monkeypatch):
    monkeypatch.setattr("atma.train.tracker_backends.importlib.util.find_spec", lambda name: None)
    status, lines, told = train("--track", "trackio")
    assert status == 0 and lines[-1].startswith("trained: mine: ")
    assert told == "atma: trackio: not installed (pip install 'atma-lm[trackio]'); the run goes on without it\n"


def test_a_sweep_is_told_the_command_that_runs_it(capsys):
    assert main(["train", "sweep-nano"]) == 2
    said = "atma: error: sweep-nano: a sweep, which is run by: atma sweep run sweep-nano\n"
    assert capsys.readouterr().err == said


def test_a_finished_run_is_given_to_tensorboard_when_it_is_asked_for_later(train, tmp_path):
    pytest.importorskip("tensorboard")
    assert train()[0] == 0
    assert train("--resume", "--track", "tensorboard")[0] == 0
    assert list((tmp_path / "runs/mine/tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_is_live_and_its_old_option_means_it(train, tmp_path):
    pytest.importorskip("tensorboard")
    assert train("--tensorboard")[0] == 0
    assert list((tmp_path / "runs/mine/tensorboard").glob("events.out.tfevents.*"))
