"""`atma generate`: text to the terminal as it is written."""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atma.commands.machine import Machine
from atma.commands.reading import Reading
from atma.disk import destination
from atma.settings import Settings

if TYPE_CHECKING:
    from atma.generation import Generation


def run(
    prompt: str | None = None,
    /,
    model: str = "nano",
    file: Path | None = None,
    save_state: Path | None = None,
    continue_from: Path | None = None,
    reading: Annotated[Reading, tyro.conf.OmitArgPrefixes] = Reading(),  # noqa: B008
    settings: Annotated[Settings, tyro.conf.OmitArgPrefixes] = Settings(),  # noqa: B008
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),  # noqa: B008
) -> None:
    """Continue a prompt, streaming the text to the terminal.

    The prompt may be of any length, and generation may go on without end. With --save-state, Ctrl-C ends the text and
    saves it too.

    Args:
        prompt: The text to continue; `--file -` reads it from standard input.
        model: A packaged model (see `atma info`), a model folder or a run folder.
        file: Read the prompt from this UTF-8 file.
        save_state: Afterwards write everything needed to go on later to this file.
        continue_from: Go on from a saved state; a prompt is then appended, if there is one.
        reading: How the model is read.
        settings: How the next token is chosen.
        machine: Where to compute.
    """
    text = _prompt(prompt, file)
    if text is None and continue_from is None:
        raise ValueError("no prompt; give one, or --file FILE, or --continue-from STATE")
    if save_state:
        require_writable(save_state)
    generation = begin(model, settings, continue_from, machine, reading)
    if text is not None:
        generation.feed(text)
    before, began = len(generation.tokens), time.perf_counter()
    for piece in _until_interrupted(generation.write()) if save_state else generation.write():
        print(piece, end="", flush=True)
    print()
    if sys.stderr.isatty():
        count, seconds = len(generation.tokens) - before, time.perf_counter() - began
        print(f"[{count} tokens, {count / seconds:.0f} a second]", file=sys.stderr)
    if save_state:
        generation.save(save_state)
        print(f"[saved: {save_state}]", file=sys.stderr)


def begin(
    model: str,
    settings: Settings,
    continue_from: Path | None = None,
    machine: Machine | None = None,
    reading: Reading | None = None,
) -> "Generation":
    """A new or a saved text of a named model. ValueError: it has no tokenizer."""
    from atma.generation import Generation
    from atma.loading import load
    from atma.stop_tokens import declared

    machine, read = machine or Machine("cpu"), reading or Reading()
    machine.take()
    loaded = load(model, select=read.select, weights=read.weights)
    loaded.model.to(machine.of(loaded.model))
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.path}: no tokenizer.json; put the one that the model was trained with there")
    if not settings.ignore_end:
        ends = declared(loaded.base, loaded.tokenizer)
        settings = dataclasses.replace(settings, stop_tokens=(*settings.stop_tokens, *ends))
    if continue_from is None:
        return Generation(loaded.model, loaded.tokenizer, settings)
    return Generation.resume(continue_from, loaded.model, loaded.tokenizer, settings)


def require_writable(path: Path) -> None:
    """ValueError, before a text is written that could not be kept, unless a file can be at `path`."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file for the state")
    folder = destination(path).parent
    if not folder.is_dir():
        raise ValueError(
            f"{path}: no folder {folder if path.is_symlink() else path.parent} to write the state to; make it first"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: its folder cannot be written; name another file for the state")


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    if prompt is not None and file is not None:
        raise ValueError("two prompts; give either one or --file")
    if file is None:
        return None if prompt is None else _argument(prompt)
    data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start:,}); a prompt must be text") from None


def _argument(prompt: str) -> str:
    """A prompt as its bytes spell it, where the locale could not: then they stand in it as lone surrogates."""
    try:
        prompt.encode()
        return prompt
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(prompt).decode("utf-8")
    except UnicodeError:
        raise ValueError("the prompt is not UTF-8 text; give a text, or a file by --file FILE") from None


def _until_interrupted(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces up to the first Ctrl-C, which ends them between two tokens, so that the state is whole."""
    interrupts: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        for piece in pieces:
            yield piece
            if interrupts:
                return
    finally:
        signal.signal(signal.SIGINT, previous)
