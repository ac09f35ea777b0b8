"""Links between pages lead somewhere on a code host, too; `mkdocs build --strict` (make check) says so of the site."""

import pytest

from tests.documents.links import EVERY, Link, anchors, broken, links
from tests.documents.reading import ROOT


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert not [str(link) for link in links(page) if broken(link)]


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.name)
def test_a_page_of_the_site_links_to_nothing_outside_its_folder(page):
    if page.parent == ROOT / "docs":
        assert not [str(link) for link in links(page) if link.target.startswith("..")]


def test_every_page_is_in_the_menu_of_the_site():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in EVERY if page.parent == ROOT / "docs" and f" {page.name}\n" not in menu]


def test_links_in_code_are_none(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` and c: d\n\n## Again\n\n## Again\n\n`x[0](y)` [a](other.md#top)\n\n```\n[b](c.md)\n```\n")
    assert [(link.line, link.target) for link in links(page)] == [(7, "other.md#top")]
    assert anchors(page) == {"a-b-and-c-d", "again", "again-1"}


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Here\n")
    assert not broken(Link(page, 1, "#here")) and not broken(Link(page, 1, "page.md"))
    assert broken(Link(page, 1, "#there")) and broken(Link(page, 1, "other.md")) and broken(Link(page, 1, "page.md#x"))
