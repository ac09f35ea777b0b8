"""Which chat template a model has, and what becomes of special tokens in a chat.

A message cannot speak for the template: what spells a special token inside a message is encoded as ordinary characters,
and only what the template itself writes becomes special tokens.
"""

import functools
import re
from collections.abc import Collection, Iterable
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from atma.stop_tokens import read_settings, token_text
from atma.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("worker.py")
"""The script that renders templates in a process of its own."""
DEFAULT_STOP = ("\nUser:", "\nAssistant:", "\nSystem:")
TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
PLAIN = "plain dialogue"
"""The source of the template of a folder that has none."""
BUILT_IN = {
    "plain": "a line a turn, as `atma serve` shows a chat to a model without a template",
    "chatml": "<|im_start|>ROLE … <|im_end|>",
    "text": "the answer right behind the prompt",
}
"""Templates that come with the package, by name."""


class Template(NamedTuple):
    """A template's text, where it is from, what else it may name, the texts that end its answers, and whether a chat
    begins with end-of-text all the same. A template of a folder writes all tokens itself, as in transformers.
    `tool_use` is the text of the one for chats with tools, where there is a separate one."""

    text: str
    source: str
    names: dict[str, str]
    stop: tuple[str, ...]
    after_end: bool = False
    tool_use: str = ""

    @property
    def for_tools(self) -> str:
        """The text of what renders a chat with tools."""
        return self.tool_use or self.text


def find_template(folder: Path, chosen: Path | None = None) -> Template:
    """The chosen file, else the folder's own (chat_template.jinja, tokenizer_config.json), else the plain dialogue.

    A folder's own has a separate one for tools as transformers finds it: `tool_use` in the list of templates of
    tokenizer_config.json, or additional_chat_templates/tool_use.jinja.
    ValueError for a file that cannot be read.
    """
    settings = read_settings(folder / "tokenizer_config.json")
    names = {name: text for name in TOKEN_NAMES if (text := token_text(settings.get(name)))}
    for path in filter(None, (chosen, folder / "chat_template.jinja")):
        if path == chosen or path.is_file():
            other = folder / "additional_chat_templates" / "tool_use.jinja"
            tool_use = _text(other) if path != chosen and other.is_file() else ""
            return Template(_text(path), str(path), names, (), tool_use=tool_use)
    own = settings.get("chat_template")
    some = [one for one in own if isinstance(one, dict)] if isinstance(own, list) else []
    listed = {str(one.get("name")): one.get("template") for one in some}
    own, tool_use = listed.get("default", own), listed.get("tool_use")
    if isinstance(own, str):
        tool_use = tool_use if isinstance(tool_use, str) else ""
        return Template(own, str(folder / "tokenizer_config.json"), names, (), tool_use=tool_use)
    return built_in("plain")


def built_in(name: str) -> Template:
    """A template of `BUILT_IN`."""
    text = files("atma.chat").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    if name == "plain":
        return Template(text, PLAIN, {}, DEFAULT_STOP, after_end=True)
    return Template(text, name, {}, (), after_end=name == "text")


class Specials:
    """Special tokens as they are spelled, and a sign, in no text of a chat, that hides them in messages; `mark` is
    another character that is in none."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self._names, self._spelled = _spellings(tokenizer)
        used = set().union(*map(set, texts))
        free = (c for c in map(chr, range(0xE000, 0x10FFFE)) if c not in used)
        self._sign, self.mark = next(free), next(free)

    def hidden(self, text: str) -> str:
        """A message that spells no special token."""
        return self._spelled.sub(lambda found: f"{self._sign}{self._names.index(found[0])}{self._sign}", text)

    def tokens(self, text: str) -> list[int]:
        """Of a rendered text: special tokens where it spells them, what was hidden in ordinary characters again."""
        return self.placed(text)[0]

    def placed(self, text: str) -> tuple[list[int], list[int]]:
        """`tokens`, and at which character of the text each begins."""
        hidden = {f"{self._sign}{number}{self._sign}": name for number, name in enumerate(self._names)}
        return self.tokenizer.encode_rendered(text, hidden)

    def turn_end(self, text: str, start: int, end: int, ends: Collection[int]) -> int:
        """Where a turn that holds the characters from start to end ends: with the special token in it, or the one of
        `ends` (ids) behind it, white space behind that left out; else at `end`. Other special tokens behind it begin
        what comes next."""
        inner = list(self._spelled.finditer(text, start, end))
        if inner and not text[inner[-1].end() : end].strip():
            return inner[-1].end()
        blank = len(text) - len(text[end:].lstrip())
        behind = self._spelled.match(text, blank)
        return behind.end() if behind and self.tokenizer.backend.token_to_id(behind[0]) in ends else end


@functools.lru_cache(maxsize=8)
def _spellings(tokenizer: Tokenizer) -> tuple[list[str], re.Pattern[str]]:
    """The special tokens as they are spelled, longest first, and what finds any of them."""
    found = tokenizer.backend.get_added_tokens_decoder().items()
    names = sorted((token.content for _, token in found if token.special), key=len, reverse=True)
    return names, re.compile("|".join(map(re.escape, names)) or "(?!)")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
