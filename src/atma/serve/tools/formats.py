"""How models write calls of tools: the signs around them, and which of these a chat template teaches."""

import re
from typing import NamedTuple


class Format(NamedTuple):
    """One way. Calls stand between `opening` and `closing`; a `bare` one may also begin the answer by itself."""

    name: str
    opening: str
    closing: str
    between: str
    """What stands between two calls."""
    arguments: str = "arguments"
    """What the arguments are called in a call's object."""
    listed: bool = False
    """Whether calls are the parts of a list."""
    python: bool = False
    """Whether calls are written as in Python: name(key=value)."""
    bare: bool = False
    short_ids: bool = False
    """Whether the template wants ids of nine letters and digits."""
    inner: tuple[str, ...] = ()
    """Signs within calls."""

    @property
    def signs(self) -> tuple[str, ...]:
        """What may stand in the text and is no part of names and arguments."""
        return tuple(filter(None, (self.opening.strip(), self.closing.strip(), *self.inner)))


HERMES = Format("hermes", "<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")
LLAMA3 = Format("llama3", "<|python_tag|>", "", "; ", "parameters", bare=True)
LFM2 = Format("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", ", ", listed=True, python=True)
MISTRAL = Format("mistral", "[TOOL_CALLS]", "", ", ", listed=True, short_ids=True, inner=("[CALL_ID]", "[ARGS]"))
FORMATS = (HERMES, LLAMA3, LFM2, MISTRAL)
NAMES = tuple(one.name for one in FORMATS)
SIGNS = {"<|tool_call_start|>": LFM2, "[TOOL_CALLS]": MISTRAL, "<tool_call>": HERMES, "<|python_tag|>": LLAMA3}


def knows_tools(template: str) -> bool:
    """Whether a chat template does something with tools."""
    return re.search(r"\btools\b", template) is not None


def format_of(template: str, name: str | None = None) -> Format | None:
    """The named format, or the one that a chat template teaches; None where it teaches none that is known here."""
    if name is not None:
        return next(one for one in FORMATS if one.name == name)
    if not knows_tools(template):
        return None
    found = next((one for sign, one in SIGNS.items() if sign in template), None)
    llama = found is None and "parameters" in template and "<|start_header_id|>" in template
    return LLAMA3 if llama else found
