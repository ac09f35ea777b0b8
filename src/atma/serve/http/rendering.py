"""How a request wants its messages rendered by a chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atma.chat.template import Specials

OWN = {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"}
OWN |= {"generation_begin", "generation_end", "raise_exception", "strftime_now"}
OWN |= {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "loop", "self", "caller", "varargs", "kwargs"}
"""Names that a template has already, besides the special tokens that its model names."""


class Rendering(NamedTuple):
    """`prompted`: with the beginning of an answer behind the messages. `continued`: the last message is left open, to
    be gone on with. `named`: what the template is given besides."""

    prompted: bool = True
    continued: bool = False
    named: Mapping[str, Any] = {}
    tools: Sequence[Mapping[str, Any]] | None = None
    """What the template is told of tools."""

    def check(self, names: Mapping[str, str]) -> None:
        """ValueError for a name that the template has already; `names`: those of its special tokens."""
        taken = next((name for name in self.named if name in OWN or name in names), None)
        if taken is not None:
            raise ValueError(f"the template has '{taken}' already; give it another way, or leave it out")

    @property
    def texts(self) -> list[str]:
        """All texts in what the template is given besides."""
        return texts_in([self.named, self.tools])

    def hidden(self, specials: Specials) -> dict[str, Any]:
        """What the template is given besides, in which nothing spells a special token."""
        return {name: hidden_in(value, specials) for name, value in self.named.items()}


def texts_in(value: Any) -> list[str]:
    """All texts in a value of JSON, keys of objects too."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    keys = [key for key in value if isinstance(key, str)] if isinstance(value, Mapping) else []
    return [*keys, *(text for part in parts for text in texts_in(part))]


def hidden_in(value: Any, specials: Specials) -> Any:
    """A value of JSON in which nothing spells a special token."""
    if isinstance(value, str):
        return specials.hidden(value)
    if isinstance(value, Mapping):
        return {specials.hidden(key): hidden_in(part, specials) for key, part in value.items()}
    return [hidden_in(part, specials) for part in value] if isinstance(value, list) else value
