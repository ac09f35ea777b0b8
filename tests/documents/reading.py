"""The commands and Python of a Markdown page: those of fenced blocks, and those that stand in a sentence.

A fenced block without a language, or of a shell, holds commands if any of its lines begins with a known program; then
each of its lines must. Where lines begin with "$ ", only those are commands and the rest is what they print. In a
sentence, a code span that begins with `atma`, `python` or `make` is a command.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SHELLS = ("", "sh", "bash", "shell", "console")
OURS = ("atma", "python", "python3", "make", "pip")
"""Programs that stand for something of this repository, wherever they are named."""
OTHERS = ("cd", "curl", "export", "git", "hf", "serve", "source", ".", "uv", "sudo", "apt-get", "brew", "torchrun")
FENCE = re.compile(r"^ *(```+|~~~+) *([\w-]*)[^\n]*\n(.*?)^ *\1 *$", re.M | re.S)
SPAN = re.compile(r"`((?:\w+=\S+ )*(?:atma|python3?|make)(?:\s[^`]+)?)`")


class Command(NamedTuple):
    """One call of a program. `words` are without the environment before them and without what stands after `>`."""

    page: str
    line: int
    words: tuple[str, ...]
    environment: dict[str, str]
    into: str | None
    fenced: bool

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text}"


class Code(NamedTuple):
    """A block of Python."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} python"


def read(path: Path, page: str) -> list[Command | Code]:
    """Everything on a page that can be run, in its order. ValueError for a line among commands that is none."""
    text = path.read_text(encoding="utf-8")
    found: list[Command | Code] = []
    for block in FENCE.finditer(text):
        line = text.count("\n", 0, block.start(3)) + 1
        if block[2] == "python":
            found.append(Code(page, line, block[3]))
        elif block[2] in SHELLS:
            found += commands(block[3], page, line)
    sentences = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in SPAN.finditer(sentences):
        line = sentences.count("\n", 0, span.start()) + 1
        found += calls(" ".join(span[1].split()), page, line, fenced=False)
    return sorted(found, key=lambda one: one.line)


def commands(block: str, page: str, first: int) -> list[Command]:
    """The commands of a fenced block; none if it is of another kind."""
    lines, prompt = [], any(line.startswith("$ ") for line in block.splitlines())
    for number, line in enumerate(block.splitlines(), first):
        if prompt and not line.startswith("$ ") and not (lines and lines[-1][1].endswith("\\")):
            continue
        line = line.removeprefix("$ ").rstrip()
        if lines and lines[-1][1].endswith("\\"):
            lines[-1] = (lines[-1][0], lines[-1][1][:-1] + line.strip())
        elif line.strip() and not line.lstrip().startswith("#"):
            lines.append((number, line))
    try:
        made = [call for number, line in lines for call in calls(line, page, number)]
    except ValueError:  # no shell's quotes: what a program prints, or a text
        return []
    known = [call for call in made if call.words and call.words[0] in (*OURS, *OTHERS)]
    strange = [call for call in made if call not in known and call.words]
    if known and strange:
        raise ValueError(f"{strange[0]}: no command that tests/documents knows; mark the block as `text`, or add it")
    return known


def calls(line: str, page: str, number: int, fenced: bool = True) -> list[Command]:
    """The commands of a line, which &&, ;, | or & part."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    made, words = [], []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("&;|"):
            made += [call(words, page, number, fenced)] if words else []
            words = []
        else:
            words.append(word)
    return made


def call(words: list[str], page: str, number: int, fenced: bool) -> Command:
    environment = {}
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        name, _, value = words[0].partition("=")
        environment[name], words = value, words[1:]
    into = words[words.index(">") + 1] if ">" in words[:-1] else None
    words = words[: words.index(">")] if ">" in words else words
    return Command(page, number, tuple(words), environment, into, fenced)


EVERYTHING = {path.relative_to(ROOT).as_posix(): read(path, path.relative_to(ROOT).as_posix()) for path in PAGES}
