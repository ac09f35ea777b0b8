"""The built site works from a folder: nothing is fetched, and search finds."""

import subprocess
import sys

import pytest

from tests.documents.reading import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the extra [docs] is not installed")
    out = tmp_path_factory.mktemp("site")
    built = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out]
    done = subprocess.run(built, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture
def page(browser):
    """A page that notes what it asks for and what goes wrong."""
    page = browser.new_page()
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    yield page
    page.close()


@pytest.mark.parametrize("name", ["index", "how-it-works", "reference", "results"])
def test_a_page_fetches_nothing_from_elsewhere(site, page, name):
    page.goto((site / f"{name}.html").as_uri(), wait_until="load")
    assert not [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))]
    assert not page.wrong


def test_search_finds_a_word_without_a_server(site, page):
    page.goto((site / "index.html").as_uri(), wait_until="load")
    page.locator("[data-md-component=search-query]").click()
    page.locator("[data-md-component=search-query]").press_sequentially("passkey")
    page.locator(".md-search-result__item").first.wait_for(timeout=30_000)
    assert page.locator(".md-search-result__item").count() >= 2


@pytest.mark.parametrize("name", ["index", "how-it-works", "choosing", "recipe", "reference"])
def test_no_page_is_wider_than_a_narrow_screen(site, page, name):
    page.set_viewport_size({"width": 400, "height": 800})
    page.goto((site / f"{name}.html").as_uri(), wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
