"""The chat page in a real browser: it streams, counts, stops, asks for a key, and asks nobody else for anything."""

import dataclasses
import json
from collections.abc import Iterator

import pytest

from tests.serve.http.conftest import OPTIONS, Live


class Page:
    """The page of a server, with what it complained of and asked for."""

    def __init__(self, browser, live: Live, width: int = 1000, scheme: str = "light") -> None:
        self.view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        kinds = ("error", "warning")
        self.view.on("console", lambda m: self.complaints.append(m.text) if m.type in kinds else None)
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.goto(live.url + "/")

    def say(self, text: str) -> None:
        self.view.fill("#input", text)
        self.view.press("#input", "Enter")

    def until(self, holds: str) -> None:
        """Wait for an expression, from outside: the page's policy lets nothing be evaluated in it."""
        for _ in range(15_000):
            if self.view.evaluate(holds):
                return
            self.view.wait_for_timeout(20)
        raise AssertionError(f"never: {holds}")

    def answered(self, count: int) -> str:
        """The text of the so-manieth answer, once it has ended."""
        self.until(f"document.querySelectorAll('article.assistant').length >= {count}")
        self.until("document.getElementById('stop').hidden")
        return self.view.locator("article.assistant").nth(count - 1).inner_text()


@pytest.fixture
def page(browser, live: Live) -> Iterator[Page]:
    opened = Page(browser, live)
    yield opened
    opened.view.close()


def test_the_page_is_one_file_that_may_ask_only_its_own_server(live: Live):
    told = live.ask("GET", "/")
    policy = told.headers["content-security-policy"]
    assert told.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert b"http://" not in told.body
    assert b"https://" not in told.body


def test_a_conversation_streams_and_tells_its_length_and_what_was_saved(page: Page, live: Live):
    page.until("document.getElementById('state').textContent == 'ready'")
    assert page.view.inner_text("h1") == "tiny"
    page.view.click("summary")
    for name, value in {"temperature": "0", "max_tokens": "30", "seed": "1", "system": "Be brief."}.items():
        page.view.fill(f"#{name}", value)
    page.say("Hello there")
    page.answered(1)
    context = int(page.view.inner_text("#context").replace(",", ""))
    assert context >= len("\0System: Be brief.\nUser: Hello there\nAssistant:")
    page.say("And more")
    page.answered(2)
    assert int(page.view.inner_text("#context").replace(",", "")) > context
    assert int(page.view.inner_text("#saved").replace(",", "")) > 40
    assert "%" in page.view.inner_text("#share")
    assert page.view.inner_text("#first").endswith(" s")
    assert page.complaints == []
    assert all(url.startswith((live.url, "data:")) for url in page.requests)
    page.view.click("#fresh")
    assert page.view.locator("article").count() == 0
    assert page.view.inner_text("#context") == "0"


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(page: Page, live: Live):
    def endless(route) -> None:
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True}))

    page.view.route("**/v1/chat/completions", endless)
    page.view.click("summary")
    page.view.fill("#max_tokens", "20000")
    page.say("Go on and on")
    page.until("document.querySelector('article.assistant')?.textContent.length > 5")
    assert page.view.locator("article.error").all_inner_texts() == []
    page.view.click("#stop", timeout=120_000)
    page.answered(1)
    assert live.settled()
    assert page.view.locator("article.error").count() == 0
    assert page.complaints == []


def test_a_refusal_is_shown_and_the_message_kept(page: Page):
    page.view.click("summary")
    page.view.fill("#top_p", "7")
    page.say("Hello")
    page.view.wait_for_selector("article.error")
    assert "top_p" in page.view.inner_text("article.error")
    assert page.view.input_value("#input") == "Hello"


def test_text_is_never_taken_for_markup(page: Page):
    page.say("<img src=x onerror=alert(1)><script>alert(1)</script>")
    page.answered(1)
    assert page.view.locator("main img, main script").count() == 0
    assert page.complaints == []


def test_the_page_asks_for_the_key_where_there_is_one(browser, folder):
    live = Live(folder, dataclasses.replace(OPTIONS, api_key="secret"))
    try:
        page = Page(browser, live)
        page.view.wait_for_selector("#key", state="visible")
        page.view.fill("#key", "secret")
        page.view.press("#key", "Tab")
        page.until("document.getElementById('state').textContent == 'ready'")
        page.say("Hello")
        page.answered(1)
        assert page.view.locator("article.error").count() == 0
        page.view.close()
    finally:
        live.stop()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_page_fits_phone_and_desk(browser, live: Live, width: int, scheme: str):
    page = Page(browser, live, width, scheme)
    page.view.click("summary")
    page.say("word" * 200)
    page.answered(1)
    assert page.view.evaluate("document.documentElement.scrollWidth") <= width
    assert page.view.evaluate("document.documentElement.scrollHeight") <= 800
    unnamed = "[...document.querySelectorAll('input, textarea')].filter(e => !e.labels?.length && !e.ariaLabel).length"
    assert page.view.evaluate(unnamed) == 0
    page.view.close()
