"""What a model is called, and what is said of one that is not there."""

import shutil

import pytest

from atma.cli import main
from atma.eval.language_model import OwnModel
from atma.eval.provenance import model_provenance
from atma.info import model_facts
from atma.loading import called, load, model_folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run "mine"."""
    monkeypatch.chdir(tmp_path)
    final = tmp_path / "runs/mine/final"
    shutil.copytree(load("nano").path, final)
    (final.parent / "recipe.toml").write_text("")
    return final.parent


def test_what_lies_in_a_run_is_called_by_the_run(run, monkeypatch):
    names = {"final": "mine", "best": "mine-best", "adapters": "mine-adapters"}
    names |= {"checkpoints/step-00000200": "mine-step-00000200"}
    assert {place: called(run / place) for place in names} == names
    monkeypatch.chdir(run / "final")
    assert called(".") == "mine"


def test_other_folders_have_their_own_name(tmp_path):
    assert called(tmp_path / "nano") == "nano"
    assert called(tmp_path / "best") == "best"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert called(tmp_path / "link") == "link"


def test_a_run_has_its_name_wherever_its_model_is_loaded(run):
    pytest.importorskip("fastapi")
    from atma.serve.http.options import ServerOptions
    from atma.serve.http.service import Service

    for name in ("runs/mine", "runs/mine/final"):
        loaded = load(name)
        assert loaded.name == OwnModel(loaded).name == model_provenance(loaded)["model"] == "mine"
        assert Service(name, ServerOptions()).name == model_facts(name)["model"] == "mine"


def test_a_model_that_is_not_there_is_told_with_what_is_and_what_is_near(run, capsys):
    assert main(["info", "runs/mien"]) == 2
    told = capsys.readouterr().err
    assert "runs/mien: no such model folder; packaged models: nano, " in told
    assert told.endswith("; finished runs here: runs/mine; did you mean 'runs/mine'?\n")
    with pytest.raises(ValueError, match="did you mean 'runs/mine'"):
        model_folder("mine")
    with pytest.raises(ValueError, match="did you mean 'nano-rope'"):
        model_folder("nano_rope")
    with pytest.raises(ValueError, match=r"finished runs here: runs/mine$"):
        model_folder("zzzzzz")
