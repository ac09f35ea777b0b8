"""What a caller holds of a submitted request: its events so far, and its answers put together."""

from dataclasses import dataclass, field

from torch import Tensor

from atma.serve.request import Event, Finish, Logprob, RequestError, Usage


@dataclass
class Output:
    """One choice's answer, whole once `finish_reason` is set; with echo it begins with the prompt.

    `index` is the choice, from 0; `text`, `tokens` and `logprobs` grow with every event. `usage` comes with the end,
    and `error` where it could not go on, `embedding` (D,) float32 where that was asked for.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: Finish | None = None
    usage: Usage | None = None
    error: RequestError | None = None
    embedding: Tensor | None = None


class Handle:
    """A request under way. `outputs` grow with every step of the engine; without `keep` they only tell their ends."""

    def __init__(self, identity: str, n: int, keep: bool = True) -> None:
        self.id, self.keep = identity, keep
        self.outputs = [Output(index) for index in range(n)]

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    def take(self, event: Event) -> None:
        """Add what a step brought."""
        output = self.outputs[event.index]
        if self.keep:
            output.text += event.text
            output.tokens += event.tokens
            output.logprobs += event.logprobs or ()
        if event.finish_reason is not None:
            output.finish_reason, output.usage, output.error = event.finish_reason, event.usage, event.error
            output.embedding = event.embedding
