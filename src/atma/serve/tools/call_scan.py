"""A JSON object {"name": …, "arguments": {…}} read a character at a time: its name, then its arguments as they come."""

import json

BLANK = " \t\r\n"
KEYS = ("arguments", "parameters")


class CallScan:
    """One call. `named`: its name was told before, and the object is its arguments.

    After each `push` there are `name`, once it is known, and what `taken` has not given of the arguments yet. It is
    `done` with the last brace, and `failed` where it is no such object.
    """

    def __init__(self, named: str | None = None) -> None:
        self.name = named
        self.done = self.failed = False
        self._whole = named is not None
        self._text, self._key, self._awaits = "", "", "object"
        self._depth, self._start, self._given = 0, -1, 0
        self._quoted = self._escaped = False
        self._arguments: str | None = None

    def push(self, character: str) -> None:
        """The next character of the text."""
        if self.done or self.failed:
            return
        self._text += character
        if self._quoted:
            self._in_quotes(character)
        elif character == '"':
            self._begin(("key", "value"))
            self._quoted = True
        elif character in "{[":
            self._begin(("value",) if self._depth else ("object",))
            self._depth += 1
            self._awaits = "key" if self._depth == 1 else self._awaits
        elif character in "}]":
            self._close()
        elif self._depth <= 1:
            self._between(character)

    def taken(self) -> str:
        """The arguments that have come since the last call, as they were written."""
        if self.name is None:
            return ""
        known = self._known()
        some, self._given = known[self._given :], len(known)
        return some

    def _known(self) -> str:
        """The arguments so far. Those that are written as a text are known when that is whole."""
        if self._arguments is not None:
            return self._arguments
        if self._whole:
            return self._text
        begun = self._key in KEYS and self._awaits == "value" and self._text[self._start : self._start + 1] == "{"
        return self._text[self._start :] if begun and self._start >= 0 else ""

    def _begin(self, awaited: tuple[str, ...]) -> None:
        """A text, an object or a list begins."""
        if self._depth > 1:
            return
        self.failed |= self._awaits not in awaited or (self._start >= 0 and self._awaits == "value")
        self._start = len(self._text) - 1

    def _in_quotes(self, character: str) -> None:
        self._quoted = self._escaped or character != '"'
        self._escaped = character == "\\" and not self._escaped
        if self._quoted or self._depth != 1:
            return
        if self._awaits == "key":
            self._key, self._awaits = str(self._read(len(self._text))), "colon"
        else:
            self._end(len(self._text))

    def _between(self, character: str) -> None:
        """Of the object itself: what separates its parts, and values that are numbers or words."""
        begun = self._awaits == "value" and self._start >= 0
        if character in BLANK or character == ",":
            if begun:
                self._end(len(self._text) - 1)
            self.failed |= character == "," and self._awaits != "comma"
            self._awaits = "key" if character == "," else self._awaits
        elif character == ":":
            self.failed |= self._awaits != "colon"
            self._awaits, self._start = "value", -1
        else:
            self.failed |= self._awaits != "value"
            self._start = self._start if begun else len(self._text) - 1

    def _close(self) -> None:
        """An object or a list ends."""
        if self._depth == 1 and self._awaits == "value" and self._start >= 0:
            self._end(len(self._text) - 1)
        self._depth -= 1
        if self._depth == 1:
            self._end(len(self._text))
        elif self._depth <= 0:
            self.failed |= self.name is None or self._awaits not in ("key", "comma")
            self.done = not self.failed
            self._arguments = self._text if self._whole else self._arguments or "{}"

    def _end(self, at: int) -> None:
        """A value of the object itself ends before that place."""
        self._awaits = "comma"
        if self._whole or self._key not in ("name", *KEYS):
            return
        value = self._read(at)
        if self._key == "name":
            self.name = value if isinstance(value, str) and value else None
            self.failed |= self.name is None
        elif isinstance(value, dict):
            self._arguments = self._text[self._start : at]
        else:
            self._arguments = value if isinstance(value, str) else "{}"
            self.failed |= not isinstance(value, str | None)

    def _read(self, at: int) -> object:
        try:
            return json.loads(self._text[self._start : at])
        except (ValueError, RecursionError):
            self.failed = True
            return None
