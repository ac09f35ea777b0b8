"""What `atma.LLM` takes for a prompt, and how one is told from a list of them."""

import reprlib
from collections.abc import Sequence
from typing import Any

from atma.serve.request import RequestError
from atma.strict import as_list, whole_numbers

Prompt = str | Sequence[int]
"""A text, or token ids, which are read exactly as they are: a list; an array or tensor of them is understood too."""


def several(prompts: Prompt | Sequence[Prompt]) -> list[Any] | None:
    """A list's prompts; None where it is one: a text, or ids."""
    listed = as_list(prompts)
    return listed if listed == [] or (listed is not None and whole_numbers(listed) is None) else None


def checked(given: Prompt) -> Prompt:
    """A text, or ids as Python's own numbers. RequestError: it is neither."""
    prompt = given if isinstance(given, str) else whole_numbers(given)
    if prompt is None:
        told = f"a prompt must be a text or a list of token ids, not {reprlib.repr(given)}"
        raise RequestError("invalid", told, "prompt")
    return prompt
