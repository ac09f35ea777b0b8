"""Recipes by name, what the package says of itself in several places, and the files a code host reads."""

import re
from pathlib import Path

import pytest

import atma
from atma.config import load_recipe
from atma.shipped import folder, recipe_names, recipe_path

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("word", ["nano", "recipes/nano.toml", "stacks/based-nano"])
def test_a_shipped_recipe_has_a_name_wherever_one_stands(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = word.removeprefix("recipes/").removesuffix(".toml")
    assert recipe_path(word) == folder("recipes") / f"{name}.toml" and name in recipe_names()


def test_a_file_that_is_there_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "nano.toml").write_text('[model]\npreset = "nano"\n[data]\npath = "own"\n')
    assert load_recipe("recipes/nano.toml").data.path == "own" and load_recipe("nano").data.path != "own"


def test_the_nearest_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"own_data: no such recipe; did you mean 'own-data'\?"):
        load_recipe("own_data")
    with pytest.raises(ValueError, match=r"nano.toml: no such recipe; did you mean 'nano'\?"):
        load_recipe("nano.toml")
    with pytest.raises(ValueError, match=r"none/of/these: no such recipe; shipped are .*nano, "):
        load_recipe("none/of/these")


def test_the_version_is_one():
    stated = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert stated == [atma.__version__] and newest in (atma.__version__, "Unreleased")


def test_what_a_code_host_reads_is_yaml():
    yaml = pytest.importorskip("yaml")
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]
    assert len(files) > 6 and all(isinstance(yaml.safe_load(file.read_text()), dict) for file in files)
