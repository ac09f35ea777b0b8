"""A run that is told to stop: a checkpoint, a status, a line that says how to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import same, weights
from tiny_run import VOCABULARY, rows, tiny_recipe, tiny_source

from atma.cli import main
from atma.config import dump_toml
from atma.signals import SIGNALS, noticing
from atma.train.loop import Stopped, fit
from atma.train.record import read_record
from atma.train.source import Source


def told_at(step: int, *numbers: int):
    """A source that has this process told to stop while it makes the batch of a step."""

    def make(at: int):
        if at == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return rows(at)

    return tiny_source(make)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `atma train` on tiny batches; returns its status."""
    (tmp_path / "tiny.toml").write_text(dump_toml(tiny_recipe()))
    monkeypatch.chdir(tmp_path)
    ours = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests ignore it, and so would the command

    def call(source, *arguments: str) -> int:
        monkeypatch.setattr("atma.train.loop.open_source", lambda recipe, ranks: source)
        return main(["train", "--device", "cpu", *arguments])

    yield call
    for number, handler in ours.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_writes_a_checkpoint_and_ends_as_signals_do(tmp_path, command, capfd, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(SystemExit) as ended:
        command(told_at(5, number), "tiny.toml", "--out", "my run")
    assert ended.value.code == 128 + number
    assert [entry.name for entry in Path("my run/checkpoints").iterdir()] == ["step-00000004", "step-00000006"]
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == ("atma: stopped at step 6 of 12; go on with: atma train --resume --out 'my run'")
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert command(tiny_source(), "--resume", "--out", "my run") == 0
    fit(tiny_recipe(), tmp_path / "whole", tiny_source())
    assert same(weights(Path("my run/final")), weights(tmp_path / "whole" / "final"))


def test_a_step_that_has_its_checkpoint_is_not_saved_twice(command, monkeypatch):
    from atma.train.saving import Saver

    saved, real = [], Saver.begin
    monkeypatch.setattr(Saver, "begin", lambda self, step, *rest: saved.append(step) or real(self, step, *rest))
    with pytest.raises(SystemExit):
        command(told_at(7, signal.SIGTERM), "tiny.toml", "--out", "run")
    assert saved == [4, 8]


def test_a_signal_in_the_last_step_lets_the_run_end(command):
    assert command(told_at(11, signal.SIGTERM), "tiny.toml", "--out", "run") == 0
    assert Path("run/final").is_dir()


def test_a_run_goes_on_longer_from_its_folder_alone(command):
    assert command(tiny_source(), "tiny.toml", "--out", "run") == 0
    assert command(tiny_source(), "--resume", "--out", "run", "--set", "train.tokens=1024") == 0
    assert read_record(Path("run"))[-1]["step"] == 16


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a recipe"),
        (["--out", "run"], "name a recipe"),
        (["--resume"], "name a recipe"),
        (["--resume", "--out", "run"], "run: nothing to resume"),
    ],
)
def test_a_recipe_may_be_left_out_only_to_resume_a_folder(command, capfd, arguments, said):
    assert command(tiny_source(), *arguments) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("step", [3, 6])
def test_a_validation_does_not_keep_a_checkpoint_waiting(tmp_path, step):
    """Told to stop within the validation of a step, at the second of its batches; made again when the run goes on."""
    recipe, seen = tiny_recipe(), []

    def validation(i: int):
        seen.append(i)
        return rows(10_000 + i)

    source = Source(rows, validation, 3, "counting", VOCABULARY)
    stop = lambda: len(seen) == step - 2  # noqa: E731
    with pytest.raises(Stopped, match=f"step {step} of 12"):
        fit(recipe, tmp_path / "run", source, stop=stop)
    assert len(seen) == step - 2
    made = [row["step"] for row in read_record(tmp_path / "run") if row["kind"] == "validation"]
    assert made == list(range(3, step, 3)) and (tmp_path / f"run/checkpoints/step-{step:08}").is_dir()
    for _ in range(2):  # what goes on twice from one checkpoint has one validation too
        with pytest.raises(Stopped):
            fit(recipe, tmp_path / "run", source, resume=True, stop=lambda: True)
    fit(recipe, tmp_path / "run", source, resume=True)
    fit(recipe, tmp_path / "whole", source)

    def kept(run: Path):
        return [(row["kind"], row["step"], row["loss"]) for row in read_record(run) if row["kind"] != "event"]

    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
    assert same(weights(tmp_path / "run/final"), weights(tmp_path / "whole/final"))


TWICE = """
import sys
import time
from test_stopping import told_at
from tiny_run import tiny_recipe, tiny_source
from pathlib import Path
from atma.train.loop import fit
from atma.signals import noticing
run, told = Path(sys.argv[1]), told_at(5, *map(int, sys.argv[2:]))
def make(step):
    while step == 5 and not (run / "checkpoints" / "step-00000004").is_dir():
        time.sleep(0.01)
    return told.train(step)
with noticing() as asked:
    fit(tiny_recipe(), run, tiny_source(make), stop=asked)
"""


def twice(run, first: int, second: int, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TWICE, str(run), str(int(first)), str(int(second))]
    settings = os.environ | environment
    return subprocess.run(command, env=settings, cwd=Path(__file__).parent, capture_output=True, text=True)


def test_a_second_signal_ends_at_once(tmp_path):
    assert twice(tmp_path / "run", signal.SIGINT, signal.SIGTERM).returncode == -signal.SIGTERM
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    ended = twice(tmp_path / "other", signal.SIGTERM, signal.SIGINT)
    assert "KeyboardInterrupt" in ended.stderr and "Stopped" not in ended.stderr


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with noticing() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_a_launcher_repeated_signals_are_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with noticing() as asked:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert asked.status == 130
