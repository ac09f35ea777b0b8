"""What an answer must be: JSON by a schema, a text of a regular expression or of a grammar, or one of several texts."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atma.strict import as_list

LONGEST = 256 << 10
"""Characters of a schema, a grammar, or of all choices together."""
LONGEST_REGEX = 16 << 10
MOST_CHOICES = 4096
KINDS = ("json", "regex", "grammar", "choice", "json_object")


@dataclass(frozen=True)
class Structure:
    """The form of an answer: exactly one of `json`, `regex`, `grammar`, `choice` and `json_object`.

        Structure(json={"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})

    ValueError: none or several are given, or one that is too long or of another type. Whether it can be compiled is
    found when it is asked for. Equal structures are compiled once.
    """

    json: Any = None
    """A JSON schema: a table, its text, or a pydantic model. What it refers to must be in it: nothing is fetched."""
    regex: str | None = None
    """A regular expression of the whole answer, without look-around and back-references."""
    grammar: str | None = None
    """A grammar: Lark's form with a rule `start`, or GBNF's with `root ::= …`."""
    choice: tuple[str, ...] | None = None
    """The texts that the answer is one of."""
    json_object: bool = False
    """Any JSON object."""
    compact: bool = False
    """No white space between the parts of JSON; else a space, or a line end with up to 24 spaces or tabs."""
    lenient: bool = False
    """Leave aside what of a schema cannot be held to, where it else could not be compiled."""
    parameter: str = field(default="structure", compare=False, repr=False)
    """What errors call it."""

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise self._wrong(
                f"must have exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none of them'}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", self._schema())
        elif self.choice is not None:
            object.__setattr__(self, "choice", self._choices())
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            most = LONGEST_REGEX if name == "regex" else LONGEST
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= most):
                raise self._wrong(f"'{name}' must be a text of 1 to {most:,} characters")

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    def _schema(self) -> str:
        schema = self.json.model_json_schema() if hasattr(self.json, "model_json_schema") else self.json
        try:
            found = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._wrong(f"'json' is no JSON schema: {error}") from None
        if not isinstance(found, Mapping | bool):
            raise self._wrong("'json' must be a JSON schema: an object, true or false")
        if len(text) > LONGEST:
            raise self._wrong(f"'json' is a schema of {len(text):,} characters, of at most {LONGEST:,}")
        return text

    def _choices(self) -> tuple[str, ...]:
        texts = as_list(self.choice)
        if not texts or len(texts) > MOST_CHOICES or not all(isinstance(text, str) for text in texts):
            raise self._wrong(f"'choice' must be a list of 1 to {MOST_CHOICES:,} texts")
        if sum(map(len, texts)) > LONGEST:
            raise self._wrong(f"'choice' has {sum(map(len, texts)):,} characters, of at most {LONGEST:,}")
        return tuple(texts)

    def _wrong(self, problem: str) -> ValueError:
        return ValueError(f"'{self.parameter}': {problem}")


def quoted(text: str) -> str:
    """A text as a Lark grammar spells it."""
    spelled = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", spelled)


__all__ = ["Structure", "quoted"]
