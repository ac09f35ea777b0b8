"""One writer in a run folder, and what may change when a run goes on."""

import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from test_loop import losses, same, weights
from test_resume import Killed, optimiser, stopping
from tiny_run import rows, tiny_recipe, tiny_source

from atma.checkpoint import load_info
from atma.config import DataConfig, EvaluationConfig, identity, load_recipe
from atma.train.folder import changes, claimed
from atma.train.loop import fit
from atma.train.record import read_record
from atma.train.schedule import rate_multiplier


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def events(run) -> list[str]:
    return [row["event"] for row in read_record(run) if row["kind"] == "event"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_writer_is_refused_while_the_first_lives(run, resume):
    inside = []

    def make(step: int):
        if step == 5:
            before = (run / "metrics.jsonl").read_bytes()
            with pytest.raises(ValueError) as refused:
                fit(tiny_recipe(), run, tiny_source(), resume=resume)
            inside.append(str(refused.value))
            assert (run / "metrics.jsonl").read_bytes() == before
        return rows(step)

    fit(tiny_recipe(), run, tiny_source(make))
    if resume:
        assert f"run: process {os.getpid()} on " in inside[0] and "is training in it" in inside[0]
    assert len(inside) == 1 and len(losses(run)) == tiny_recipe().train.steps


def test_two_that_begin_at_once_are_one(run):
    with claimed(tiny_recipe(), run, False):
        (run / "recipe.toml").unlink()  # as it is before the first has written it
        with pytest.raises(ValueError, match="is training in it"), claimed(tiny_recipe(), run, False):
            pass


def test_the_lock_of_a_dead_process_is_passed_over(run):
    killed = (
        "import os, signal, sys; sys.path.insert(0, 'tests/train'); from pathlib import Path\n"
        "from tiny_run import tiny_recipe; from atma.train.folder import claimed\n"
        f"with claimed(tiny_recipe(), Path({str(run)!r}), False): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -9
    assert (run / ".lock").exists()
    fit(tiny_recipe(), run, tiny_source(), resume=True)
    assert len(losses(run)) == tiny_recipe().train.steps


def test_a_disk_without_locks_is_told_and_trained_on(run, monkeypatch):
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    fit(tiny_recipe(), run, tiny_source())
    assert "this disk has no file locks" in events(run)[0]


def test_nothing_is_left_in_a_folder_that_is_refused(tmp_path):
    (tmp_path / "thing").write_text("")
    with pytest.raises(ValueError, match="not empty and not a run"):
        fit(tiny_recipe(), tmp_path, tiny_source())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_trained_in_where_it_points(tmp_path, run, there):
    if there:
        (tmp_path / "big").mkdir()
        (tmp_path / "big" / "lost+found").mkdir()
    run.symlink_to(tmp_path / "big")
    fit(tiny_recipe(), run, tiny_source())
    assert run.is_symlink() and (tmp_path / "big" / "final" / "model.safetensors").is_file()


FREE = [
    {"name": "other"},
    {"data": DataConfig(path="moved")},
    {"evaluation": EvaluationConfig(documents=3)},
    {"checkpoint_every": 3},
    {"keep_checkpoints": 1},
    {"evaluate_every": 0},
    {"evaluation_tokens": 64},
]


def changed(recipe, change):
    own = {key: value for key, value in change.items() if hasattr(recipe, key)}
    rest = {key: value for key, value in change.items() if key not in own}
    return replace(recipe, **own, train=replace(recipe.train, **rest))


@pytest.mark.parametrize("change", FREE, ids=lambda change: next(iter(change)))
def test_what_changes_no_step_may_change_and_is_told_and_kept(tmp_path, run, change):
    fit(tiny_recipe(), tmp_path / "whole", tiny_source())
    with pytest.raises(Killed):
        fit(tiny_recipe(), run, stopping(6))
    other = changed(tiny_recipe(), change)
    fit(other, run, tiny_source(), resume=True)
    assert same(weights(run / "final"), weights(tmp_path / "whole" / "final"))
    assert same(optimiser(run), optimiser(tmp_path / "whole"))
    assert losses(run) == losses(tmp_path / "whole")
    assert load_recipe(run / "recipe.toml") == other and "is now" in events(run)[0]
    assert load_info(run / "final")["extra"]["identity"] == identity(other)


def test_the_recipe_stays_as_it_was_where_the_data_are_others(run):
    fit(tiny_recipe(), run, tiny_source())
    before = (run / "recipe.toml").read_text()
    with pytest.raises(ValueError, match="made with data counting, now it is other"):
        fit(changed(tiny_recipe(), {"data": DataConfig(path="moved")}), run, tiny_source(data="other"), resume=True)
    assert (run / "recipe.toml").read_text() == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_goes_on_to_more_tokens_at_the_rates_of_the_new_total(run, finished):
    short, long = tiny_recipe(tokens=12 * 64), tiny_recipe(tokens=20 * 64)
    if finished:
        fit(short, run, tiny_source())
    else:
        with pytest.raises(Killed):
            fit(short, run, stopping(9))
    fit(long, run, tiny_source(), resume=True)
    kept = 12 if finished else 8
    found = [row["rate"] for row in read_record(run) if row["kind"] == "train"]
    expected = [rate_multiplier(step, (short if step < kept else long).train) for step in range(20)]
    assert found == expected and expected[kept] != rate_multiplier(kept, short.train)
    assert "goes on to 1,280 tokens instead of 768" in events(run)[0]
    assert load_info(run / "final")["extra"]["tokens"] == 1280
    assert load_recipe(run / "recipe.toml") == long


def test_fewer_tokens_are_refused_with_both_numbers(run):
    fit(tiny_recipe(tokens=12 * 64), run, tiny_source())
    with pytest.raises(ValueError, match=r"'train.tokens' is 768 there and 640 here"):
        fit(tiny_recipe(tokens=10 * 64), run, tiny_source(), resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_tokens", 128), ("accumulation", 2), ("muon_rate", 0.5), ("constant_share", 0.5), ("precision", "float32")],
)
def test_what_changes_steps_is_refused_by_its_name_and_both_values(run, key, value):
    before = getattr(tiny_recipe().train, key)
    with pytest.raises(
        ValueError, match=rf"'train.{key}' is {before!r} there and {value!r} here; choose another folder"
    ):
        changes(tiny_recipe(), tiny_recipe(**{key: value}), run)
