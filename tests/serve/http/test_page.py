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

    def settings(self, **values: object) -> None:
        if not self.view.locator("details[open]").count():
            self.view.click("summary")
        for name, value in values.items():
            self.view.fill(f"#{name}", str(value))

    def mode(self, name: str) -> None:
        self.settings()
        self.view.check(f"#{name}")

    def answers(self, *made: str, reason: str = "stop") -> list[dict]:
        """Have the server say these, an answer a request; what is asked of it."""
        asked: list[dict] = []
        texts = iter(made)

        def say(route) -> None:
            asked.append(json.loads(route.request.post_data))
            one, chat = next(texts), "chat" in route.request.url
            said = [{"delta": {"content": part}} if chat else {"text": part} for part in (one[:7], one[7:])]
            events = [{"choices": [{**part, "finish_reason": None}]} for part in said]
            events += [{"choices": [{"delta": {}, "text": "", "finish_reason": reason}]}]
            usage = {"prompt_tokens": 9, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 6}}
            events += [{"choices": [], "usage": usage}]
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            route.fulfill(body=body, headers={"content-type": "text/event-stream"})

        self.view.route("**/completions", say)
        return asked

    def told(self) -> list[str]:
        """The texts of all turns."""
        return self.view.locator("article .text").all_inner_texts()

    def press(self, name: str, turn: int = -1) -> None:
        articles = self.view.locator("article")
        place = turn if turn >= 0 else articles.count() + turn
        articles.nth(place).get_by_role("button", name=name, exact=True).click()

    def answered(self, count: int) -> str:
        """The text of the so-manieth answer, once it has ended."""
        self.until(f"document.querySelectorAll('article.assistant').length >= {count}")
        self.until("document.getElementById('stop').hidden")
        return self.view.locator("article.assistant .text").nth(count - 1).inner_text()


@pytest.fixture
def page(browser, live: Live) -> Iterator[Page]:
    """In the mode of chats, though the model has no chat template."""
    opened = Page(browser, live)
    opened.until("document.getElementById('state').textContent == 'ready'")
    opened.mode("chat")
    opened.view.click("summary")
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
    assert page.view.inner_text("h1") == "tiny"
    assert "parameters" in page.view.inner_text("#about")
    page.settings(temperature=0, max_tokens=30, seed=1, system="Be brief.")
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
    page.settings(max_tokens=20000)
    page.say("Go on and on")
    page.until("document.querySelector('article.assistant .text')?.textContent.length > 5")
    assert page.view.locator("article.error").all_inner_texts() == []
    page.view.click("#stop", timeout=120_000)
    page.answered(1)
    assert live.settled()
    assert page.view.locator("article.error").count() == 0
    assert page.complaints == []


def test_a_refusal_is_shown_and_the_message_kept(page: Page):
    page.settings(top_p=7)
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
        page.mode("chat")
        page.say("Hello")
        page.answered(1)
        assert page.view.locator("article.error").count() == 0
        page.view.close()
    finally:
        live.stop()


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_page_fits_phone_and_desk(browser, live: Live, width: int, scheme: str):
    page = Page(browser, live, width, scheme)
    page.until("document.getElementById('state').textContent == 'ready'")
    page.mode("chat")
    page.say("word" * 200)
    page.answered(1)
    page.answers("| a | b |\n| --- | --- |\n" + "| " + "long " * 60 + "| c |\n\n```\n" + "x" * 400 + "\n```")
    page.press("Regenerate")
    page.until("document.querySelector('article pre') && document.getElementById('stop').hidden")
    assert page.view.evaluate("document.documentElement.scrollWidth") <= width
    assert page.view.evaluate("document.documentElement.scrollHeight") <= 800
    fields = "[...document.querySelectorAll('input, textarea, select')]"
    unnamed = f"{fields}.filter(e => !e.labels?.length && !e.ariaLabel).length"
    assert page.view.evaluate(unnamed) == 0
    page.view.close()


MARKDOWN = """# Title

Some **bold**, *italic* and `co_de` words, 2 * 3 * 4, snake_case_name, \\*no\\*.

1. one
2. two
   - inner

3. with code:

   ```python
   for x in y:

       pass
   ```

   and more

4. last

> said

```python
if a < b:

    print("<b>")
```

| name | value |
| --- | ---: |
| a | 1 |

[safe](https://example.org/a_b) [not](javascript:alert(1))
"""


def test_markdown_is_shown_with_code_lists_and_tables_and_nothing_of_it_is_run(page: Page):
    page.answers(MARKDOWN)
    page.say("Show me")
    page.answered(1)
    said = page.view.locator("article.assistant .text")
    assert said.locator("h1").inner_text() == "Title"
    assert said.locator("strong").all_inner_texts() == ["bold"]
    assert said.locator("em").all_inner_texts() == ["italic"]
    assert said.locator("p code").all_inner_texts() == ["co_de"]
    assert "2 * 3 * 4, snake_case_name, *no*." in said.inner_text()
    assert said.locator("ol").count() == 1 and said.locator("ol > li").count() == 4
    assert said.locator("ol ul li").inner_text() == "inner"
    assert said.locator("ol pre code").inner_text() == "for x in y:\n\n    pass"
    assert said.locator("ol > li").nth(2).locator("p").all_inner_texts() == ["with code:", "and more"]
    assert said.locator("blockquote").inner_text() == "said"
    assert said.locator(":scope > pre code").inner_text() == 'if a < b:\n\n    print("<b>")'
    assert said.locator("td").all_inner_texts() == ["a", "1"]
    assert said.locator("a").evaluate_all("all => all.map(one => one.href)") == ["https://example.org/a_b"]
    assert "javascript" not in said.inner_html()
    page.settings()
    page.view.uncheck("#formatted")
    assert page.answered(1).strip() == MARKDOWN.strip()
    assert page.complaints == []


def test_a_text_that_grows_is_shown_as_the_whole_is(page: Page):
    """Only the end of an answer is made anew as it comes: what is shown at last is what the whole text gives."""
    grown = """([from, text, step]) => {
        const place = document.createElement("div"), paint = shower(place, true);
        for (let i = from; i < text.length; i += step) paint(text.slice(0, i));
        paint(text);
        const whole = document.createElement("div");
        whole.append(...blocks(text));
        return [place.innerHTML, whole.innerHTML];
    }"""
    for start in (1, 2, 3):
        for step in (1, 5, 17):
            one, other = page.view.evaluate(grown, [start, MARKDOWN, step])
            assert one == other


def test_what_is_edited_or_answered_again_stands_beside_what_was(page: Page):
    asked = page.answers("first", "second", "third", "fourth")
    page.say("Question")
    page.answered(1)
    page.press("Regenerate")
    page.until("document.querySelector('article.assistant .text')?.innerText == 'second'")
    page.answered(1)
    assert asked[1]["messages"] == asked[0]["messages"] == [{"role": "user", "content": "Question"}]
    assert "2 of 2" in page.view.locator("article.assistant .tools").inner_text()
    page.press("Version before")
    assert page.told() == ["Question", "first"]
    page.say("More")
    page.answered(2)
    assert [m["content"] for m in asked[2]["messages"]] == ["Question", "first", "More"]
    page.press("Edit", 0)
    page.view.fill("article textarea", "Another question")
    page.press("Save and send", 0)
    page.until("document.querySelector('article.assistant .text')?.innerText == 'fourth'")
    page.answered(1)
    assert page.told() == ["Another question", "fourth"]
    page.press("Version before", 0)
    assert page.told() == ["Question", "first", "More", "third"]
    page.view.reload()
    page.until("document.querySelectorAll('article').length == 4")
    assert page.told() == ["Question", "first", "More", "third"]
    assert page.complaints == []


def test_earlier_turns_are_taken_from_kept_states_when_an_answer_is_made_anew(page: Page):
    page.settings(max_tokens=20, temperature=1)
    page.say("A question of some length, so that there is something to keep")
    page.answered(1)
    page.press("Regenerate")
    page.until("Number(document.getElementById('saved').textContent) > 40 && document.getElementById('stop').hidden")


def test_a_model_without_a_chat_template_continues_texts_and_the_text_is_kept_to_the_letter(browser, live: Live):
    page = Page(browser, live)
    page.until("document.getElementById('text').checked")
    assert "beginning of a text" in page.view.inner_text("#hint")
    asked = page.answers("  said\n", "on", reason="length")
    page.view.fill("#input", "def f(x):\n ")
    page.view.press("#input", "Enter")
    page.view.press("#input", "Control+Enter")
    page.answered(1)
    assert asked[0]["prompt"] == "def f(x):\n \n"
    assert "messages" not in asked[0]
    assert "Cut at the longest answer" in page.view.inner_text("article.assistant .note")
    page.view.click("#send")
    page.answered(2)
    assert asked[1]["prompt"] == "def f(x):\n \n  said\n"
    page.mode("chat")
    assert page.view.locator("article").count() == 0
    assert "no chat template" in page.view.inner_text("#hint")
    page.mode("text")
    assert page.view.locator("article").count() == 3
    assert page.complaints == []
    page.view.close()


def test_an_answer_that_ends_at_once_says_so_and_the_talk_goes_on(page: Page):
    asked = page.answers("", "yes")
    page.say("Hello")
    page.answered(1)
    assert "ended here at once" in page.view.inner_text("article.assistant .note")
    page.say("Anybody?")
    page.answered(2)
    assert asked[1]["messages"] == [{"role": "user", "content": "Hello\n\nAnybody?"}]


def test_a_page_read_again_during_an_answer_has_the_question(page: Page):
    page.view.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.say("A question")
    page.until("document.querySelectorAll('article').length == 2")
    page.view.reload()
    page.until("document.querySelectorAll('article').length > 0")
    assert page.told()[0] == "A question"


def test_no_text_is_too_deep_to_show(page: Page):
    page.answers(">" * 20000 + " deep", "*" * 3000 + "_" * 3000)
    for i in range(2):
        page.say("Show me")
        page.answered(i + 1)
    assert page.complaints == []


def test_keys_edit_the_last_message_and_leave_an_edit(page: Page):
    page.answers("first")
    page.say("Question")
    page.answered(1)
    page.view.press("#input", "ArrowUp")
    assert page.view.input_value("article textarea") == "Question"
    page.view.press("article textarea", "Escape")
    assert page.told() == ["Question", "first"]
    assert page.view.inner_text("#spoken") == "first"


def test_an_edit_stays_open_when_something_is_sent(page: Page):
    page.answers("first", "second", "third")
    page.say("Question")
    page.answered(1)
    page.press("Edit", 0)
    page.view.fill("article textarea", "Half a question")
    page.say("More")
    page.answered(2)
    assert page.view.input_value("article textarea") == "Half a question"
    page.press("Save and send", 0)
    page.answered(1)
    assert page.told() == ["Half a question", "third"]
    assert page.complaints == []


def test_settings_are_remembered_and_the_colours_follow_them(page: Page):
    page.settings(temperature=0.3)
    page.view.select_option("#theme", "dark")
    dark = page.view.evaluate("getComputedStyle(document.body).backgroundColor")
    page.view.reload()
    page.until("document.getElementById('state').textContent == 'ready'")
    assert page.view.input_value("#temperature") == "0.3"
    assert page.view.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.settings()
    page.view.click("#defaults")
    assert page.view.input_value("#temperature") == "0.8"
    assert page.view.evaluate("getComputedStyle(document.body).backgroundColor") != dark
