"""Everything public is on docs/reference.md, and has a docstring."""

import re

import pytest

pytest.importorskip("griffe", reason="the extra [docs] is not installed")

from tests.documents.public import PAGE, has_words, named, package, parts, told
from tests.documents.reading import EVERYTHING, Code

TOLD = told()
EVERY = dict(part for name, one in TOLD.items() for part in parts(name, one))


def test_every_public_name_has_a_docstring():
    missing = [name for name, one in EVERY.items() if not has_words(name, one, EVERY)]
    assert not missing, f"{len(missing)} of {len(EVERY)} public names have no docstring: {', '.join(missing)}"


def test_all_names_of_the_package_are_told():
    exported = {str(name) for name in package().exports or ()} - {"__version__"}
    assert exported <= {name.removeprefix("atma.") for name in TOLD if name.count(".") == 1}
    assert len(EVERY) > 500


def test_what_the_pages_import_is_told():
    known = {one.path for one in TOLD.values()}
    for code in (one for page in EVERYTHING.values() for one in page if isinstance(one, Code)):
        for module, names in re.findall(r"^from (atma[\w.]*) import (.+)$", code.text, re.M):
            for name in names.split(", "):
                assert named(f"{module}.{name}").path in known, f"{code}: {module}.{name} is not on {PAGE.name}"


def test_a_place_that_does_not_exist_is_told(tmp_path):
    page = tmp_path / "reference.md"
    page.write_text("::: atma.nothing\n")
    with pytest.raises(KeyError, match="nothing"):
        told(page)
