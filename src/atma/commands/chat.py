"""`atma chat`: turns of a conversation, all in one state that is never read again."""

import dataclasses
import io
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import tyro

from atma.commands.generate import begin
from atma.commands.machine import Machine
from atma.commands.reading import Reading
from atma.settings import Settings

if TYPE_CHECKING:
    from atma.generation import Generation

YOU, MODEL = "User:", "Assistant:"


def run(
    model: str = "nano",
    /,
    reading: Annotated[Reading, tyro.conf.OmitArgPrefixes] = Reading(),  # noqa: B008
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes] = Settings(),  # noqa: B008
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),  # noqa: B008
) -> None:
    """Talk to a model in the terminal; Ctrl-D or an empty line ends.

    The model reads a plain dialogue of "User:" and "Assistant:" lines. It remembers the whole conversation, however
    long, and reads each turn only once. The packaged models were trained on Python code: do not expect conversation.

    Args:
        model: A packaged model (see `atma info`), a model folder or a run folder.
        reading: How the model is read.
        settings: How the next token is chosen; max-tokens counts for each turn.
        machine: Where to compute.
    """
    chosen = dataclasses.replace(settings, stop=(*settings.stop, f"\n{YOU}"))
    for piece in converse(begin(model, chosen, machine=machine, reading=reading), _typed()):
        print(piece, end="", flush=True)


def converse(generation: "Generation", messages: Iterable[str]) -> Iterator[str]:
    """The model's answers to the messages, in pieces, each answer ended by a line end."""
    for turn, message in enumerate(messages):
        asked = "" if generation.ended == "stop" else f"{YOU}" if turn == 0 else f"\n{YOU}"
        generation.feed(f"{asked} {message}\n{MODEL}")
        yield MODEL
        yield from generation.write()
        yield "\n"


def _typed() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            message = input(f"{YOU} ").strip()
        except EOFError:
            print()
            return
        if not message:
            return
        yield message
