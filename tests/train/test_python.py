"""`atma.train_model`: the run of `atma train` from Python, and what is held of it."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

import atma
from atma.cli import main
from atma.config import load_recipe
from atma.threads import Choice
from atma.train.python import recipe_from

RECIPE = {"name": "small", "model": {"preset": "nano-test"}, "data": {"path": "data"}, "train": {"length": 64}}
SET = {"train.tokens": 1024, "train.batch_tokens": 256, "train.evaluate_every": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    library = Path(sysconfig.get_paths()["stdlib"])
    (folder / "library").mkdir()
    for path in sorted(library.glob("s*.py")):
        shutil.copy(path, folder / "library" / path.name)
    atma.prepare(folder / "library", folder / "data")
    text = '[model]\npreset = "nano-test"\n[data]\npath = "data"\n[train]\nlength = 64\n'
    (folder / "small.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(place):
    return atma.train_model(RECIPE, "runs/dict", set=SET, threads=1)


def test_a_dict_a_file_and_a_recipe_are_the_same_run_as_the_commands(place, run) -> None:
    given = [word for key, value in SET.items() for word in ("--set", f"{key}={value}")]
    assert main(["train", "small.toml", "--out", "runs/command", "--threads", "1", *given]) == 0
    weights = (place / "runs/command/final/model.safetensors").read_bytes()
    assert (place / "runs/dict/final/model.safetensors").read_bytes() == weights
    assert recipe_from("small.toml", SET) == recipe_from(RECIPE, SET) == run.recipe
    assert recipe_from(load_recipe("small.toml"), SET) == run.recipe


def test_a_shipped_recipe_is_known_by_its_name(place) -> None:
    assert recipe_from("own-data", {"train.tokens": 4096}).train.tokens == 4096


def test_a_run_has_its_model_record_and_curve(run) -> None:
    assert run.model.config == run.recipe.model
    assert run.loaded.tokenizer is not None
    assert [row["step"] for row in run.record if row["kind"] == "train"] == [1, 2, 3, 4]
    assert len(run.curve().figures[0].data) == 2
    assert "<svg" in run.curve()._repr_html_()


def test_a_run_shows_what_became_of_it(run) -> None:
    assert "validation loss" in repr(run) and "runs/dict" in repr(run)
    assert "4 of 256 tokens" in repr(run)
    assert "<table" in run._repr_html_()


def test_a_finished_run_goes_on_and_a_folder_is_opened_again(run) -> None:
    longer = atma.train_model(RECIPE, "runs/dict", set=SET | {"train.tokens": 1280}, resume=True)
    assert longer.record[-1]["step"] == 5
    assert atma.TrainingRun("runs/dict").recipe.train.tokens == 1280


def test_threads_are_chosen_as_by_the_command_and_the_process_has_its_own_again(run, monkeypatch) -> None:
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr("atma.train.python.train", lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr("atma.train.python.recorded_threads", lambda _: before + 2)
    monkeypatch.setattr("atma.threads.measure", lambda _: Choice(before + 3, "measured"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    atma.train_model(RECIPE, run.folder, threads=before + 1)
    atma.train_model(RECIPE, run.folder, resume=True)
    atma.train_model(RECIPE, run.folder)
    assert seen == [before + 1, before + 2, before + 3]
    assert torch.get_num_threads() == before


def test_a_device_that_is_not_there_is_told_before_a_folder_is_taken(place) -> None:
    with pytest.raises(ValueError, match="device cuda:99: not on this machine"):
        atma.train_model(RECIPE, "runs/device", set=SET, device="cuda:99")
    assert not Path("runs/device").exists()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"recipe": None}, "'recipe' must be a shipped recipe's name.*not None"),
        ({"set": ["train.tokens"]}, "'set' must be a dict"),
        ({"threads": 0}, "'threads' must be at least 1, not 0"),
    ],
)
def test_arguments_of_another_kind_are_told(place, wrong, told) -> None:
    with pytest.raises(ValueError, match=told):
        atma.train_model(**{"recipe": RECIPE, "out": "runs/none"} | wrong)


def test_what_is_wrong_is_told(place) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'train.tokens'"):
        atma.train_model(RECIPE, "runs/none", set={"train.token": 5})
    with pytest.raises(ValueError, match=r"'train.tokens' must be a number"):
        atma.train_model(RECIPE, "runs/none", set={"train.tokens": None})
    with pytest.raises(ValueError, match="no such recipe"):
        atma.train_model("none.toml", "runs/none")
    with pytest.raises(ValueError, match="nothing to resume"):
        atma.TrainingRun("runs/none")
