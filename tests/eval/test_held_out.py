"""The text that a model is measured on where none is named, and what is said of text that is not the model's."""

import shutil
from pathlib import Path

import pytest

from atma.cli import main
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.eval.held_out import open_text
from atma.loading import load


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library, a cache of its own, and nothing in the folder that we are in."""
    (tmp_path / "lib").mkdir()
    for number in range(6):
        (tmp_path / "lib" / f"{number}.py").write_text(f"def number_{number}():\n    return {number}\n" * 80)
    monkeypatch.setattr("atma.data.sources.sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_a_packaged_model_is_measured_with_no_option_at_all(library, capsys):
    options = ["--documents", "1", "--lengths", "128", "256", "--needle-trials", "1", "--no-junk"]
    assert main(["eval", "lengths", "--model", "nano", *options]) == 0
    said = capsys.readouterr()
    assert "nano on standard library" in said.out and "│     256 │" in said.out
    assert "preparing the standard library" in said.err
    assert main(["eval", "lengths", *options]) == 0
    assert "preparing" not in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_where_the_cache_cannot_be_written_the_text_is_made_for_this_command(library, monkeypatch):
    (library / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(library / "file"))
    assert open_text(load("nano"), None).tokens > 100


def test_a_model_is_measured_on_the_text_that_its_training_held_out_where_that_is_here(library):
    loaded = load("nano")
    assert loaded.info["extra"]["recipe"]["data"]["path"] == "data/stdlib"
    tokenizer = Preparation(tokenizer=str(loaded.path / "tokenizer.json"))
    prepare(library / "lib" / "0.py", "data/stdlib", tokenizer)
    assert open_text(loaded, None).path == Path("data/stdlib")
    shutil.rmtree("data/stdlib")
    prepare(library / "lib" / "0.py", "data/stdlib", Preparation(tokenizer="bytes"))
    assert "cache" in str(open_text(loaded, None).path)


def test_data_of_another_tokenizer_say_which_option_mends_it(library, capsys):
    prepare(library / "lib" / "0.py", "bytes", Preparation(tokenizer="bytes"))
    for command in (["eval", "lengths", "--model", "nano"], ["diagnose", "nano"]):
        assert main([*command, "--data", "bytes"]) == 2
        said = capsys.readouterr().err
        assert "made with another tokenizer (bytes) than the model's" in said and said.count("\n") == 1
        assert "leave --data out" in said and "--tokenizer" in said
        assert main([*command, "--data", "none"]) == 2
        assert "none: no such data" in capsys.readouterr().err


def test_the_kept_text_is_that_of_the_tokenizer(library):
    nano = open_text(load("nano"), None)
    assert nano.tokenizer.hash() == load("nano").tokenizer.hash()
    assert TokenSet.open(nano.path, "validation", verify=True).tokens == nano.tokens
