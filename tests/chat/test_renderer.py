"""A template's process: an answer that does not come, or is too long, is never taken for that of another chat."""

import pytest

from atma.chat import renderer
from atma.chat.renderer import Renderer
from atma.chat.template import Template

SLOW = """{% if messages[0].content == 'slow' %}{% for i in range(99999) %}{% for j in range(60) %}{% endfor %}\
{% endfor %}{% endif %}<{{ messages[0].content }}>"""


def rendered(one: Renderer, content: str) -> str:
    return one.render([{"role": "user", "content": content}], prompted=False)


def test_after_an_answer_that_takes_too_long_the_next_chats_have_their_own(monkeypatch):
    with Renderer(Template(SLOW, "test", {}, ())) as one:
        assert rendered(one, "a") == "<a>"
        monkeypatch.setattr(renderer, "RENDER_SECONDS", 0.01)
        with pytest.raises(ValueError, match="does not render it: it takes too long"):
            rendered(one, "slow")
        monkeypatch.undo()
        assert [rendered(one, each) for each in "bcd"] == ["<b>", "<c>", "<d>"]


def test_after_an_answer_that_is_too_long_the_next_chats_have_their_own(monkeypatch):
    with Renderer(Template(SLOW, "test", {}, ())) as one:
        monkeypatch.setattr(renderer, "MOST_BYTES", 100)
        with pytest.raises(ValueError, match="does not render it: it is too long"):
            rendered(one, "x" * 200)
        assert [rendered(one, each) for each in "bcd"] == ["<b>", "<c>", "<d>"]


def interrupted(*_: object) -> bytes:
    raise KeyboardInterrupt


def test_after_an_interruption_the_next_chats_have_their_own(monkeypatch):
    with Renderer(Template(SLOW, "test", {}, ())) as one:
        monkeypatch.setattr(Renderer, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered(one, "a")
        monkeypatch.undo()
        assert [rendered(one, each) for each in "bcd"] == ["<b>", "<c>", "<d>"]


def test_an_interruption_while_it_begins_leaves_no_process(monkeypatch):
    with Renderer(Template(SLOW, "test", {}, ())) as one:
        one.close()
        monkeypatch.setattr(Renderer, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rendered(one, "a")
        assert one._process is None


def test_a_process_that_ended_is_begun_again():
    with Renderer(Template(SLOW, "test", {}, ())) as one:
        assert one._process is not None
        one._process.kill()
        with pytest.raises(ValueError, match="does not render it"):
            rendered(one, "a")
        assert rendered(one, "b") == "<b>"
