"""The TOML of pages is TOML, and what is a recipe there is read as one."""

import tomllib

import pytest

from atma.config import recipe_of
from tests.documents.reading import FENCE, PAGES, ROOT

READER = ("fade", "my_mixer")
"""Mixers that a page has its reader write."""
TABLES = {"name", "model", "data", "train", "evaluation", "lora"}
BLOCKS = [
    pytest.param(block[3], id=f"{page.relative_to(ROOT)}:{page.read_text().count(chr(10), 0, block.start(3)) + 1}")
    for page in PAGES
    for block in FENCE.finditer(page.read_text(encoding="utf-8"))
    if block[2] == "toml"
]


@pytest.mark.parametrize("text", BLOCKS)
def test_a_recipe_of_a_page_is_read(text):
    values = tomllib.loads(text)
    if set(values) <= TABLES and "model" in values:
        pattern = values["model"].get("pattern", [])
        values["model"]["pattern"] = ["gated_conv" if name in READER else name for name in pattern] or ["local"]
        values["model"].pop("fade_heads", None)
        assert recipe_of(values).model.depth >= 1


def test_the_pages_have_recipes():
    assert len(BLOCKS) > 5
