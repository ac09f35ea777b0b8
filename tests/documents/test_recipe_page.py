"""The tables of recipe keys say what the classes say, and a key without a meaning is none."""

import dataclasses

import pytest

from tests.documents.recipe_page import PAGE, table, text, written


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page, text()), "run `make docs`, and commit docs/recipe.md"


def test_every_table_of_a_recipe_is_there_with_all_of_its_keys():
    page = PAGE.read_text(encoding="utf-8")
    for key in ("vocab_size", "recall_share", "batch_tokens", "needle_trials", "alpha", "count_limit", "qk_rank"):
        assert f"| `{key}` |" in page


@dataclasses.dataclass
class Untold:
    width: int = 1


def test_a_key_without_a_meaning_is_told():
    with pytest.raises(KeyError, match="width"):
        table(Untold)


def test_a_page_without_its_marks_is_told():
    with pytest.raises(ValueError, match="put them back"):
        written("# Title\n", "")
