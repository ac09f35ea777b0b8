"""From the text of an answer, as it comes, to what is said and which tools are called.

What may be the beginning of a call is held back until it is known; a call is told by its name first, then its arguments
piece by piece. What turns out to be no call is said as it was written. The whole is the same however it was cut.
"""

import re
from typing import NamedTuple

from atma.serve.tools import pythonic
from atma.serve.tools.call_scan import CallScan
from atma.serve.tools.formats import Format

APART = " \t\r\n,;[]"
"""What may stand between calls."""
NAMED = re.compile(r"([A-Za-z_][\w.-]{0,255})(\[CALL_ID\]\w*)?(\[ARGS\])?\s*$")


class Piece(NamedTuple):
    """Some more of an answer: `content`, or of the call with this `index` (from 0) the `name` or more `arguments`."""

    content: str = ""
    index: int | None = None
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads one answer. `count` calls have begun."""

    def __init__(self, form: Format) -> None:
        self.form, self.count = form, 0
        self._opening, self._closing = form.opening.strip(), form.closing.strip()
        self._held = ""
        """Outside what may begin a call; inside what has come of one."""
        self._inside = self._told = self._spoken = self._called = False
        self._scan: CallScan | None = None
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What some more text tells."""
        for character in text:
            self._held += character
            if self._inside:
                self._in_calls(character)
            else:
                self._outside(character)
        return self._flushed()

    def finish(self) -> list[Piece]:
        """What is left at the end of the answer."""
        if self._inside and self.form.python and self._scan is None:
            self._python(self._held)
        elif not (self._inside and (self._told or not self._held.strip(APART))):
            self._say(self._held if not self._inside or self._scan is None else self._marked())
        self._held = ""
        return self._flushed()

    def _outside(self, character: str) -> None:
        held = self._held
        if held.endswith(self._opening):
            self._say(held[: -len(self._opening)])
            self._begin(self._opening)
        elif self.form.bare and not self._spoken and held.lstrip()[:1] == "{":
            self._begin("")
            self._held = held.lstrip()
            self._in_calls(character)
        elif not (self.form.bare and not self._spoken and held.isspace()):
            keep = next((n for n in range(min(len(held), len(self._opening) - 1), 0, -1) if self._begins(n)), 0)
            self._say(held[: len(held) - keep])
            self._held = held[len(held) - keep :]

    def _begins(self, count: int) -> bool:
        return self._opening.startswith(self._held[-count:])

    def _begin(self, mark: str) -> None:
        self._inside, self._told, self._scan, self._held = True, False, None, ""
        self._mark = mark

    def _in_calls(self, character: str) -> None:
        if self._scan is not None:
            self._scan.push(character)
            self._tell(self._scan)
        elif self._closing and self._held.endswith(self._closing):
            if self.form.python:
                self._python(self._held[: -len(self._closing)])
            self._leave()
        elif character == "{" and not self._pythonic(self._held[:-1]):
            self._open(self._held[:-1].lstrip(APART))
        elif not self._awaited(self._held.lstrip(APART)):
            self._give_up()

    def _pythonic(self, before: str) -> bool:
        """Whether what has come is a call as in Python, which is read when it is whole."""
        return self.form.python and bool(before.strip(APART))

    def _awaited(self, before: str) -> bool:
        """Whether what stands before a call may go on to be one."""
        if not before or self.form.python or (self._closing and self._closing.startswith(before)):
            return True
        return self.form.short_ids and NAMED.fullmatch(before.partition("[")[0]) is not None and len(before) < 400

    def _open(self, before: str) -> None:
        """An object begins, with the name of its tool before it in some forms."""
        named = NAMED.fullmatch(before) if before else None
        if before and (named is None or not self.form.short_ids):
            self._give_up()
            return
        self._scan, self._told = CallScan(named[1] if named else None), False
        self._scan.push("{")
        self._tell(self._scan)

    def _tell(self, scan: CallScan) -> None:
        if scan.name is not None and not scan.failed:
            if not self._told:
                self._pieces.append(Piece(index=self.count, name=scan.name))
                self._told, self.count = True, self.count + 1
            if some := scan.taken():
                self._pieces.append(Piece(index=self.count - 1, arguments=some))
        if scan.done:
            self._scan, self._held, self._mark, self._called = None, "", "", True
        elif scan.failed:
            self._give_up()

    def _python(self, text: str) -> None:
        if not text.strip(APART):
            return
        try:
            found = pythonic.calls(text)
        except ValueError:
            self._say(self._mark + text)
            return
        for name, arguments in found:
            self._pieces += [Piece(index=self.count, name=name), Piece(index=self.count, arguments=arguments)]
            self.count, self._called = self.count + 1, True

    def _give_up(self) -> None:
        """No call after all: what has not been told as one is said."""
        if not self._told:
            self._say(self._marked())
        self._leave()

    def _marked(self) -> str:
        return self._mark + self._held

    def _leave(self) -> None:
        self._inside, self._scan, self._held, self._told = False, None, "", False

    def _say(self, text: str) -> None:
        if self._called:  # white space behind calls says nothing
            text = text.lstrip()
            self._called = not text
        self._spoken = self._spoken or bool(text)
        if text:
            self._pieces.append(Piece(content=text))

    def _flushed(self) -> list[Piece]:
        """The pieces so far, neighbours of one kind as one."""
        found: list[Piece] = []
        for one in self._pieces:
            last = found[-1] if found else None
            if last is not None and last.index == one.index and one.name is None and last.name is None:
                found[-1] = Piece(last.content + one.content, one.index, None, last.arguments + one.arguments)
            else:
                found.append(one)
        self._pieces = []
        return found
