"""A JSON object {"name": …, "arguments": {…}} read a character at a time: its name, then its arguments as they come."""

import json

BLANK = " \t\r\n"
KEYS = ("arguments", "parameters")


class CallScan:
    """One call. `named`: its name was told before, and the object is its arguments.

    After each `push` there are `name`, once it is known, and what `taken` has not given of the arguments yet, which
    have `begun`. It is `done` with the last brace, and `failed` where it is no such object.
    """

    def __init__(self, named: str | None = None) -> None:
        self.name = named
        self.done = self.failed = self.begun = False
        self._whole = self._open = named is not None
        self._all: list[str] = []
        self._new: list[str] = []
        """Of the arguments, what `taken` has not given; they come while they are `_open`."""
        self._key, self._awaits = "", "object"
        self._depth, self._start = 0, -1
        self._quoted = self._escaped = False

    def push(self, character: str) -> None:
        """The next character of the text."""
        if self.done or self.failed:
            return
        self._all.append(character)
        was_open = self._open
        self._read_on(character)
        if was_open or self._open:
            self._new.append(character)

    @property
    def size(self) -> int:
        """Characters that came."""
        return len(self._all)

    @property
    def text(self) -> str:
        """All that came."""
        return "".join(self._all)

    def taken(self) -> str:
        """The arguments that have come since the last call, as they were written."""
        if self.name is None:
            return ""
        some = "".join(self._new)
        self._new.clear()
        return some

    def _read_on(self, character: str) -> None:
        if self._quoted:
            self._in_quotes(character)
        elif character == '"':
            self._begin(("key", "value"))
            self._quoted = True
        elif character in "{[":
            self._begin(("value",) if self._depth else ("object",))
            if character == "{" and self._depth == 1 and self._awaits == "value" and self._key in KEYS:
                self._give()
                self._open = True
            self._depth += 1
            self._awaits = "key" if self._depth == 1 else self._awaits
        elif character in "}]":
            self._close()
        elif self._depth <= 1:
            self._between(character)

    def _give(self, text: str = "") -> None:
        """The arguments come, once."""
        self.failed |= self.begun
        self.begun = True
        self._new += [text] if text else []

    def _begin(self, awaited: tuple[str, ...]) -> None:
        """A text, an object or a list begins."""
        if self._depth > 1:
            return
        self.failed |= self._awaits not in awaited or (self._start >= 0 and self._awaits == "value")
        self._start = len(self._all) - 1

    def _in_quotes(self, character: str) -> None:
        self._quoted = self._escaped or character != '"'
        self._escaped = character == "\\" and not self._escaped
        if self._quoted or self._depth != 1:
            return
        if self._awaits == "key":
            self._key, self._awaits = str(self._read(len(self._all))), "colon"
        else:
            self._end(len(self._all))

    def _between(self, character: str) -> None:
        """Of the object itself: what separates its parts, and values that are numbers or words."""
        begun = self._awaits == "value" and self._start >= 0
        if character in BLANK or character == ",":
            if begun:
                self._end(len(self._all) - 1)
            self.failed |= character == "," and self._awaits != "comma"
            self._awaits = "key" if character == "," else self._awaits
        elif character == ":":
            self.failed |= self._awaits != "colon"
            self._awaits, self._start = "value", -1
        else:
            self.failed |= self._awaits != "value"
            self._start = self._start if begun else len(self._all) - 1

    def _close(self) -> None:
        """An object or a list ends."""
        if self._depth == 1 and self._awaits == "value" and self._start >= 0:
            self._end(len(self._all) - 1)
        self._depth -= 1
        if self._depth == 1:
            self._end(len(self._all))
        elif self._depth <= 0:
            self.failed |= self.name is None or self._awaits not in ("key", "comma")
            self.done = not self.failed
            if self.done and not self.begun and not self._whole:
                self._new.append("{}")

    def _end(self, at: int) -> None:
        """A value of the object itself ends before that place."""
        self._awaits = "comma"
        if self._whole or self._key not in ("name", *KEYS):
            return
        if self._open and self.name is not None:  # told already, as they were written: right or wrong
            self._open = False
            return
        value, was_open = self._read(at), self._open
        self._open = False
        if self._key == "name":
            self.name = value if isinstance(value, str) and value else None
            self.failed |= self.name is None
        elif not was_open:
            self._give(value if isinstance(value, str) else "{}")
            self.failed |= not isinstance(value, str | None)

    def _read(self, at: int) -> object:
        try:
            return json.loads("".join(self._all[self._start : at]))
        except (ValueError, RecursionError):
            self.failed = True
            return None
