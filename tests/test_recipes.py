"""Every recipe that comes with the library reads, its model can be built, and a stack has the size of its name."""

from pathlib import Path

import pytest

from atma.compare.entrants import parameters
from atma.config import load_recipe
from atma.sweep.cells import load_sweep

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
STACKS = sorted(FOLDER.glob("stacks/*.toml"))
SINGLE = sorted(path for path in FOLDER.glob("*.toml") if not path.stem.startswith("sweep"))
SIZES = {"nano": (2.0e6, 3.6e6), "small": (60e6, 90e6)}
"""Parameters between which a stack of that size lies."""


@pytest.mark.parametrize("path", SINGLE, ids=lambda path: path.stem)
def test_a_recipe_reads_and_its_model_can_be_built(path):
    assert parameters(load_recipe(path).model) > 0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("sweep*.toml")), ids=lambda path: path.stem)
def test_a_sweep_reads_and_has_cells(path):
    assert load_sweep(path).cells


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_a_published_stack_has_whole_periods_of_its_pattern_and_the_size_of_its_name(path):
    recipe = load_recipe(path)
    low, high = SIZES[path.stem.rpartition("-")[2]]
    assert recipe.name == path.stem
    assert recipe.model.depth % len(recipe.model.pattern) == 0
    assert low < parameters(recipe.model) < high
