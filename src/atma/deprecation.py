"""What is still understood but has another way now: told once a place, with what to write and since when.

    deprecated("LLM(path=...)", "LLM(model=...)", "0.1.0")

A name stays for at least one minor version after the one that says so. Python shows a `DeprecationWarning` where the
caller is `__main__`, a notebook's cell or a test.
"""

import warnings


def deprecated(old: str, instead: str, since: str, depth: int = 1) -> None:
    """Warn that `old` has gone out of use since version `since`, and say what to write.

    depth: calls between this one and the caller's line; 1 for a function that the caller calls itself.
    """
    text = f"{old} is deprecated since atma {since} and will go; write {instead}"
    warnings.warn(text, DeprecationWarning, stacklevel=depth + 2)
