"""What `atma.LLM` answers with: a text, with its tokens and why it ended."""

from dataclasses import dataclass
from html import escape

from atma.display import shortened
from atma.serve.handle import Output
from atma.serve.request import Finish, RequestError, Usage


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt. `str()` and `print` give its `text` alone."""

    text: str
    tokens: list[int]
    """Ids of the answer, the one that ended it included."""
    finish_reason: Finish
    """"length" (max_tokens), "stop" (end of text or turn, or a stop text), "abort" or "error"."""
    usage: Usage | None = None
    """Tokens of the prompt, how many of them came from a kept state, and tokens of the answer."""
    error: RequestError | None = None
    """Why it could not go on; only in a list, for one prompt alone it is raised."""

    @classmethod
    def of(cls, output: Output) -> "Completion":
        """That of one choice that has ended."""
        assert output.finish_reason is not None
        return cls(output.text, output.tokens, output.finish_reason, output.usage, output.error)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        told = f", error={str(self.error)!r}" if self.error else ""
        return f"Completion({shortened(self.text)}, {len(self.tokens)} tokens, {self.finish_reason!r}{told})"

    def _repr_html_(self) -> str:
        ended = f"{len(self.tokens)} tokens, ended by {self.finish_reason}"
        about = f"{ended}: {self.error}" if self.error else ended
        return (
            f'<pre style="white-space:pre-wrap;margin:0">{escape(self.text)}</pre>'
            f'<div style="opacity:.7;font-size:85%">{escape(about)}</div>'
        )
