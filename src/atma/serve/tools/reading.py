"""From the text of an answer, as it comes, to what is said and which tools are called.

What may be the beginning of a call is held back until it is known; a call is told by its name first, then its arguments
piece by piece. What turns out to be no call is said as it was written; of a call that breaks off when its name has been
told, the rest is dropped, up to the closing sign or the end. The whole is the same however it was cut.
"""

import re
from collections.abc import Callable, Collection
from itertools import groupby
from typing import NamedTuple

from atma.serve.tools import pythonic
from atma.serve.tools.call_scan import CallScan
from atma.serve.tools.formats import Format

APART = " \t\r\n,;[]"
"""What may stand between calls."""
HEAD = '{"name": "'
"""How an object that is held to being a call begins."""
NAMED = re.compile(r"([A-Za-z_][\w.-]{0,255})(\[CALL_ID\]\w*)?(\[ARGS\])?\s*$")


class Piece(NamedTuple):
    """Some more of an answer: `content`, or of the call with this `index` (from 0) the `name` or more `arguments`."""

    content: str = ""
    index: int | None = None
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads one answer. `count` calls have begun.

    `names`: those of the tools. An object that nothing marks as a call is one only if it is of these, and where the
    answer may be JSON of another form only if it `fits` as a whole, of which nothing is told before.
    """

    def __init__(
        self, form: Format, names: Collection[str] | None = None, fits: Callable[[str], bool] | None = None
    ) -> None:
        self.form, self.count, self._names, self._fits = form, 0, names, fits
        self._opening, self._closing = form.opening.strip(), form.closing.strip()
        self._gap: list[str] = []
        """What says nothing by itself before what is `_held`; a call as in Python."""
        self._held = ""
        """Outside what may be an opening sign; inside what may be a name or a closing sign."""
        self._inside = self._spoken = self._called = False
        self._leave()
        self._pieces: list[Piece] = []

    def push(self, text: str) -> list[Piece]:
        """What some more text tells."""
        for character in text:
            if self._scan is not None:
                self._scan.push(character)
                self._tell(self._scan)
            elif self._inside:
                self._in_calls(character)
            else:
                self._outside(character)
        self._take()
        return self._flushed()

    def finish(self) -> list[Piece]:
        """What is left at the end of the answer."""
        rest = "".join([*self._gap, self._held])
        if not self._inside:
            self._say(rest)
        elif self._scan is not None:
            self._say("" if self._told else self._marked())
        elif self._broken or not rest.strip(APART) or (self._follows and self._closing.startswith(rest.strip(APART))):
            pass
        elif self.form.python:
            self._python(rest)
        else:
            self._say(self._marked())
        self._gap, self._held = [], ""
        return self._flushed()

    def _outside(self, character: str) -> None:
        bare = self.form.bare and not self._spoken and not self._held
        if bare and character.isspace():
            self._gap.append(character)
            return
        if bare and character == "{":
            self._begin("".join(self._gap), True)
            self._in_calls(character)
            return
        self._say("".join(self._gap))
        self._gap = []
        held = self._held = self._held + character
        if held.endswith(self._opening):
            self._say(held[: -len(self._opening)])
            self._begin(self._opening, False)
        else:
            keep = next((n for n in range(min(len(held), len(self._opening) - 1), 0, -1) if self._begins(n)), 0)
            self._say(held[: len(held) - keep])
            self._held = held[len(held) - keep :]

    def _begins(self, count: int) -> bool:
        return self._opening.startswith(self._held[-count:])

    def _begin(self, mark: str, bare: bool) -> None:
        self._leave()
        self._inside, self._mark, self._bare = True, mark, bare

    def _in_calls(self, character: str) -> None:
        """Between calls, in one as in Python, or behind one that broke off."""
        if self._broken:
            self._held = (self._held + character)[-len(self._closing) :] if self._closing else ""
        elif self._python_begun or (self.form.python and character not in APART + "{"):
            self._in_python(character)
            return
        elif character == "{":
            self._open(self._held)
            return
        elif not self._held and character in APART:
            self._gap.append(character)
            return
        else:
            self._held += character
        if self._closing and self._held == self._closing:
            self._leave()
        elif not self._broken and not self._awaited(self._held):
            self._give_up()

    def _in_python(self, character: str) -> None:
        """In a call as in Python, which is read when it is whole."""
        self._python_begun, size = True, len(self._closing)
        self._gap.append(character)
        if character == self._closing[-1] and "".join(self._gap[-size:]) == self._closing:
            self._python("".join(self._gap[:-size]))
            self._leave()

    def _awaited(self, before: str) -> bool:
        """Whether what stands before a call may go on to be one."""
        if self._closing and self._closing.startswith(before):
            return True
        return self.form.short_ids and NAMED.fullmatch(before.partition("[")[0]) is not None and len(before) < 400

    def _open(self, before: str) -> None:
        """An object begins, with the name of its tool before it in some forms."""
        named = NAMED.fullmatch(before) if before else None
        unknown = named is not None and self._follows and self._names is not None and named[1] not in self._names
        if before and (named is None or unknown or not self.form.short_ids):
            self._held += "{"
            self._give_up()
            return
        self._scan, self._told = CallScan(named[1] if named else None), False
        self._scan.push("{")
        self._tell(self._scan)

    def _is_other(self, scan: CallScan) -> bool:
        """Whether an object that may be an answer is no call."""
        if scan.size <= len(HEAD):
            return not HEAD.startswith(scan.text)
        return scan.done and self._fits is not None and not self._fits(scan.text)

    def _tell(self, scan: CallScan) -> None:
        if self._bare and self._fits is not None:
            if self._is_other(scan):
                self._give_up()
                return
            if not (scan.done or scan.failed):
                return
        if scan.name is not None and not scan.failed and not self._told:
            unknown = self._bare and self._names is not None and scan.name not in self._names
            if unknown or (self._bare and scan.done and not scan.begun):
                self._give_up()
                return
            if scan.begun or not self._bare:
                self._pieces.append(Piece(index=self.count, name=scan.name))
                self._told, self.count = True, self.count + 1
        if scan.done:
            self._take()
            self._scan, self._gap, self._held, self._mark = None, [], "", ""
            self._told, self._called, self._follows = False, True, True
        elif scan.failed:
            self._give_up()

    def _take(self) -> None:
        """What has come of the arguments of the call that is told."""
        if self._scan is not None and self._told and (some := self._scan.taken()):
            self._pieces.append(Piece(index=self.count - 1, arguments=some))

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
        """No call after all, and it is said; or one that was told and is wrong, and its rest belongs to nobody."""
        if self._told:
            self._take()
            self._scan, self._gap, self._held, self._broken, self._called = None, [], "", True, True
            return
        self._say(self._marked())
        self._leave()

    def _marked(self) -> str:
        """What was held of what is no call."""
        held = "".join([*self._gap, self._held]) + ("" if self._scan is None else self._scan.text)
        ended = self._follows and self.form.listed
        return self._mark + (held.lstrip().removeprefix("]") if ended else held)

    def _leave(self) -> None:
        self._inside = self._told = self._follows = self._broken = self._bare = self._python_begun = False
        self._scan: CallScan | None = None
        self._mark, self._held, self._gap = "", "", []

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
        for (index, named), some in groupby(self._pieces, lambda one: (one.index, one.name)):
            if named is not None:
                found += some
                continue
            parts = list(some)
            found.append(Piece("".join(p.content for p in parts), index, None, "".join(p.arguments for p in parts)))
        self._pieces = []
        return found
