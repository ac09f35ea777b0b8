"""What `--help` says beside the options: the list of verbs, examples, how a model is named; as wide as the terminal.

Nothing heavy is imported here, so that `atma --help` is immediate.
"""

import shutil
import textwrap
from collections.abc import Callable, Mapping

from atma.commands.examples import EXAMPLES
from atma.model_argument import said

LEAST = 24
"""Columns below which nothing is wrapped any narrower."""


def columns() -> int:
    """Columns of the terminal, or as COLUMNS says; 80 where there is neither."""
    return max(LEAST, shutil.get_terminal_size().columns)


def overview(program: str, verbs: Mapping[str, tuple[str, str]], summary: str) -> str:
    """The verbs of a table, each with its summary."""
    width, named = columns(), max(map(len, verbs))
    lines = [f"usage: {program} VERB [options]", "", *textwrap.wrap(summary, width), ""]
    for verb, (_, about) in verbs.items():
        lines += textwrap.wrap(about, width, initial_indent=f"  {verb:{named}}  ", subsequent_indent=" " * (named + 4))
    lines += ["", *examples(program.partition(" ")[2]), ""]
    last = f"`{program} VERB --help` explains a verb; `atma --version` prints the version."
    return "\n".join([*lines, *textwrap.wrap(last, width)])


def fitted(text: str) -> str:
    """The text of a help, its lines that are too long wrapped: those of sentences, for boxes fit already."""
    lines = (line if len(line) <= columns() else textwrap.fill(line, columns()) for line in text.splitlines())
    return "\n".join(line.rstrip() for line in lines)


def ending(run: Callable[..., None], words: str) -> str:
    """What comes below the options of a verb, which its words name without `atma`."""
    told = said(run)
    return "\n".join([*textwrap.wrap(told, columns()), *[""] * bool(told), *examples(words)])


def examples(words: str) -> list[str]:
    """The examples of a verb, or of a table of verbs, each cut into lines that a shell reads as one."""
    found = EXAMPLES.get(words, ())
    return ["examples:", *(line for one in found for line in command_lines(one))] if found else []


def command_lines(command: str) -> list[str]:
    """A command as lines of at most so many columns, where it can be parted: between words, with a backslash."""
    lines, width = ["  "], columns()
    for part in _parts(command):
        if lines[-1].strip() and len(lines[-1]) + 1 + len(part) > width - 2:
            lines[-1] += " \\"
            lines.append("    ")
        lines[-1] += part if not lines[-1].strip() else f" {part}"
    return lines


def _parts(command: str) -> list[str]:
    """The words of a command as they are written, quotes and all, an option with its first value."""
    words: list[str] = []
    for word in command.split(" "):
        last = words[-1] if words else ""
        valued = last.startswith("--") and " " not in last and not word.startswith("-")
        if last.count("'") % 2 or valued:
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words
