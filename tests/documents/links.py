"""The links of Markdown pages, and the anchors that a code host gives to their headings."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.documents.reading import FENCE, PAGES, ROOT

EVERY = [*PAGES, ROOT / "CHANGELOG.md"]
"""The pages whose links are checked."""
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.M)


class Link(NamedTuple):
    """Where a page leads to."""

    page: Path
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} {self.target}"


def blanked(text: str) -> str:
    """A page without what stands in fenced blocks and code spans, its lines where they were."""
    text = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    return re.sub(r"`[^`\n]*`(?!\])", "", text)


def links(page: Path) -> list[Link]:
    """Every link of a page, in order."""
    text = blanked(page.read_text(encoding="utf-8"))
    return [Link(page, text.count("\n", 0, found.start()) + 1, found[1]) for found in LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """The names of a page's headings: lower case, no punctuation, spaces as hyphens; -1, -2 … where one comes again."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    made: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{name}-{made[name]}" if made[name] else name)
        made[name] += 1
    return found


def broken(link: Link) -> bool:
    """Whether a link within the repository leads to nothing. One to elsewhere is not looked at."""
    if re.match(r"[a-z]+:", link.target):
        return False
    place, _, anchor = link.target.partition("#")
    target = (link.page.parent / place).resolve() if place else link.page
    return not target.exists() or bool(anchor and anchor not in anchors(target))
