import errno
import os
import shutil
from pathlib import Path

import pytest
from test_loop import losses, same, weights
from tiny_run import rows, tiny_model, tiny_recipe, tiny_source

from atma import folders, replacing
from atma.train.loop import fit
from atma.train.record import read_record
from atma.weights import load_tensors


class Killed(Exception):
    """Stands for a stop at any moment."""


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def stopping(at: int):
    def make(step: int):
        if step == at:
            raise Killed
        return rows(step)

    return tiny_source(make)


def optimiser(run: Path) -> dict:
    return load_tensors(sorted((run / "checkpoints").iterdir())[-1] / "optimizer.safetensors")


@pytest.mark.parametrize("stops", [[4], [9, 9, 11], *(pytest.param([n], marks=pytest.mark.slow) for n in (1, 5))])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, run, stops):
    recipe = tiny_recipe(regulariser="weak", distractor_weight=0.01, accumulation=2)
    fit(recipe, tmp_path / "whole", tiny_source())
    for turn, at in enumerate(stops):
        with pytest.raises(Killed):
            fit(recipe, run, stopping(at), resume=turn > 0)
    fit(recipe, run, tiny_source(), resume=True)
    assert same(weights(run / "final"), weights(tmp_path / "whole" / "final"))
    assert same(optimiser(run), optimiser(tmp_path / "whole"))
    for kind in ("train", "validation"):
        assert losses(run, kind) == losses(tmp_path / "whole", kind)


def test_the_record_says_where_it_was_resumed(run):
    with pytest.raises(Killed):
        fit(tiny_recipe(), run, stopping(6))
    fit(tiny_recipe(), run, tiny_source(), resume=True)
    events = [row for row in read_record(run) if row["kind"] == "event"]
    assert [(row["step"], row["event"]) for row in events] == [(4, "resumed at step 4")]


def test_a_finished_run_is_only_given_its_final_model_again(run):
    fit(tiny_recipe(), run, tiny_source())
    before, record = weights(run / "final"), (run / "metrics.jsonl").read_bytes()
    (run / "final").rename(run / "elsewhere")
    assert same(weights(fit(tiny_recipe(), run, tiny_source(), resume=True)), before)
    assert (run / "metrics.jsonl").read_bytes() == record


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(tmp_path, run):
    fit(tiny_recipe(), tmp_path / "whole", tiny_source())
    with pytest.raises(Killed):
        fit(tiny_recipe(), run, stopping(10))
    path = run / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    fit(tiny_recipe(), run, tiny_source(), resume=True)
    events = [row["event"] for row in read_record(run) if row["kind"] == "event"]
    assert "passed over a damaged checkpoint" in events[0] and "optimizer.safetensors: contents differ" in events[0]
    assert events[1] == "resumed at step 4"
    assert same(weights(run / "final"), weights(tmp_path / "whole" / "final"))
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_when_every_checkpoint_is_damaged_the_first_reason_is_given(run, name):
    with pytest.raises(Killed):
        fit(tiny_recipe(), run, stopping(5))
    path = run / "checkpoints" / "step-00000004" / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"no good checkpoint to resume from: .*step-00000004/{name}: "):
        fit(tiny_recipe(), run, tiny_source(), resume=True)


def test_nothing_to_resume_is_said(run):
    with pytest.raises(ValueError, match=r"run: nothing to resume: no recipe.toml there; start the run without"):
        fit(tiny_recipe(), run, tiny_source(), resume=True)
    assert not run.exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (tiny_recipe(seed=7), r"'train.seed' is 0 there and 7 here"),
        (tiny_recipe(tiny_model(core="nope")), r"'model.core' is 'polar' there and 'nope' here"),
    ],
)
def test_another_recipe_is_refused_by_the_key_that_differs(run, other, named):
    fit(tiny_recipe(tokens=64 * 12), run, tiny_source())
    with pytest.raises(ValueError, match=rf"recipe.toml: another recipe: {named}; choose another folder"):
        fit(other, run, tiny_source(), resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, run):
    fit(tiny_recipe(), run, tiny_source())
    fit(tiny_recipe(tiny_model(core="nope")), tmp_path / "other", tiny_source())
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", run / "checkpoints")
    with pytest.raises(ValueError, match=r"config.json: another model than the recipe's"):
        fit(tiny_recipe(), run, tiny_source(), resume=True)


def test_other_data_is_refused(run):
    fit(tiny_recipe(), run, tiny_source())
    with pytest.raises(ValueError, match=r"made with data counting, now it is other; resume with the data"):
        fit(tiny_recipe(), run, tiny_source(data="other"), resume=True)


def test_a_damaged_recipe_is_named(run):
    fit(tiny_recipe(), run, tiny_source())
    (run / "recipe.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"recipe.toml: not a TOML recipe"):
        fit(tiny_recipe(), run, tiny_source(), resume=True)


def test_a_full_disk_stops_the_run_and_loses_no_checkpoint(tmp_path, run, monkeypatch):
    fit(tiny_recipe(), tmp_path / "whole", tiny_source())
    written = []
    sync = folders.sync

    def full(path: Path) -> None:
        written.append(path)
        if ".step-00000008.staging" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    monkeypatch.setattr(folders, "sync", full)
    with pytest.raises(OSError, match="No space left on device"):
        fit(tiny_recipe(), run, tiny_source())
    monkeypatch.undo()
    assert written and [entry.name for entry in (run / "checkpoints").iterdir()] == ["step-00000004"]
    fit(tiny_recipe(), run, tiny_source(), resume=True)
    assert same(weights(run / "final"), weights(tmp_path / "whole" / "final"))


def test_old_checkpoints_go_only_after_the_new_one_is_on_disk(run, monkeypatch):
    seen = []
    sync = folders.sync

    def watch(path: Path) -> None:
        seen.append(sorted(entry.name for entry in run.glob("checkpoints/step-*")))
        sync(path)

    monkeypatch.setattr(folders, "sync", watch)
    monkeypatch.setattr(replacing, "sync", watch)
    fit(tiny_recipe(keep_checkpoints=1), run, tiny_source())
    first = next(number for number, names in enumerate(seen) if names)
    assert ["step-00000004", "step-00000008"] in seen and all(names for names in seen[first:])
    assert [entry.name for entry in run.glob("checkpoints/step-*")] == ["step-00000012"]
