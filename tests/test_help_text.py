"""What `--help` says: examples that the real parser reads, and nothing wider than the terminal."""

import contextlib
import io
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest

from atma.cli import VERBS, main
from atma.commands.examples import EXAMPLES
from atma.help_text import command_lines
from tests.documents.test_commands import parsed
from tests.test_arguments import EVERY

COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7]|4[0-7])[;m]")


def helped(*words):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return told.getvalue()


def test_every_verb_has_two_to_four_examples_and_there_are_no_others():
    tables = {"", *(verb for verb in VERBS if any(words.startswith(f"{verb} ") for words in EVERY))}
    assert set(EXAMPLES) == {*EVERY, *tables}
    assert all(2 <= len(found) <= 4 for found in EXAMPLES.values())


@pytest.mark.parametrize("words", EXAMPLES)
def test_every_example_is_read_by_the_parser(words, monkeypatch):
    for example in EXAMPLES[words]:
        split = shlex.split(example.partition(" > ")[0])
        assert split[0] == "atma" and " ".join(split[1:]).startswith(words)
        assert parsed(split[1:], monkeypatch) == (0, ""), example


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("words", EXAMPLES)
def test_help_fits_the_terminal_but_for_what_is_one_long_word_and_ends_with_the_examples(words, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    said = helped(*words.split())
    assert not [line for line in said.splitlines() if len(line) > width and len(line.split()) > 2]
    joined = said.replace(" \\\n    ", " ")
    assert all(f"\n  {example}\n" in joined for example in EXAMPLES[words])


@pytest.mark.parametrize("width", [30, 40, 80])
def test_an_example_in_several_lines_is_the_same_command(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for example in (one for found in EXAMPLES.values() for one in found):
        assert shlex.split("\n".join(command_lines(example)).replace("\\\n", "")) == shlex.split(example)


def in_a_terminal(*arguments, width=40, **variables):
    """What a command shows on a terminal of so many columns."""
    lead, follow = pty.openpty()
    environment = os.environ | {"COLUMNS": str(width), "TERM": "xterm", "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "atma", *arguments]
    process = subprocess.Popen(command, stdin=follow, stdout=follow, stderr=follow, env=environment)
    os.close(follow)
    shown = b""
    with contextlib.suppress(OSError), open(lead, "rb", buffering=0) as terminal:
        while part := terminal.read(1 << 16):
            shown += part
    assert process.wait(timeout=60) == 0
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("words", ["info", "generate"])
def test_a_narrow_terminal_shows_help_in_lines_that_fit_and_in_colours_unless_told_not_to(words):
    shown = in_a_terminal(words, "--help", NO_COLOR="")
    assert "\x1b[" in shown
    plain = in_a_terminal(words, "--help", NO_COLOR="1")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 40
