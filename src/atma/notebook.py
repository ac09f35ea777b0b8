"""Progress in a notebook: one line that changes in its place, with nothing to install and nothing left behind.

IPython is asked only where it already runs.
"""

import sys
import time
from collections.abc import Callable
from html import escape
from typing import Any

SECONDS = 0.25
"""Between two changes of the line."""


def active() -> bool:
    """Whether this code runs in a notebook's kernel, not in a terminal or script."""
    shell = sys.modules.get("IPython")
    current = None if shell is None else shell.get_ipython()
    return current is not None and getattr(current, "kernel", None) is not None


class Line:
    """A line of an output, with a bar where a share is known."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, float("-inf")
        self._display: Any = None

    def show(self, text: str, share: float | None = None) -> None:
        """Show a text, and how much is done from 0 to 1; four times a second at the most."""
        if self._now() - self._last >= SECONDS:
            self._last = self._now()
            bar = "" if share is None else f'<progress value="{min(1.0, share):.4f}" max="1"></progress> {share:.0%} '
            self._write(f'<span style="font-size:90%">{bar}{escape(text)}</span>')

    def end(self, text: str = "") -> None:
        """The last text, or nothing."""
        if text or self._display is not None:
            self._write(f'<span style="font-size:90%">{escape(text)}</span>' if text else "")

    def _write(self, html: str) -> None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        if self._display is None:
            self._display = display(HTML(html), display_id=True)
        else:
            self._display.update(HTML(html))
