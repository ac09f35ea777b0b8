"""Every command of a page is one that exists, with options that exist and with the files that it names."""

import contextlib
import functools
import importlib
import io
import re
import runpy
import sys
import tomllib

import pytest

from atma.cli import VERBS, main
from tests.documents.reading import EVERYTHING, OURS, ROOT, Code, Command

FOUND = [one for page in EVERYTHING.values() for one in page]
KEPT = re.compile(r"(?:recipes|benchmarks|docs|src|tests)/[\w./-]+")
"""Places of this repository; what else a command names is the reader's own."""


def of(program, found=FOUND):
    picked = [one for one in found if isinstance(one, Command) and one.words[0] in program]
    return pytest.mark.parametrize("command", picked, ids=str)


def verb_of(words):
    """The words that name a verb, and the module and function behind them; None for a table of verbs or no verb."""
    table, read, module = VERBS, [], "cli"
    for word in words:
        if word not in table:
            break
        read.append(word)
        module, _, function = table[word][0].partition(".")
        table = {} if function else getattr(importlib.import_module(f"atma.commands.{module}"), "VERBS", {})
        if not table:
            return read, module, function or "run"
    return read, module, None


def is_mention(command):
    """Whether a sentence only names a verb."""
    return not command.fenced and len(verb_of(command.words[1:])[0]) == len(command.words) - 1


def has_gap(command):
    """Whether something stands for what the reader fills in: an ellipsis, brackets."""
    return any("…" in word or "..." in word or word.startswith(("[", "<")) for word in command.words)


def parsed(words, monkeypatch):
    """Status and complaint of a command line that is read by the real parser, and then not carried out."""
    _, module, function = verb_of(words)
    if function is not None:
        target = importlib.import_module(f"atma.commands.{module}")
        real = getattr(target, function)
        monkeypatch.setattr(target, function, functools.wraps(real)(lambda *given, **named: None))
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(list(words))
        except SystemExit as ended:
            status = ended.code
    return status, told.getvalue()


def options(words):
    """The options in words, without the values that are written to them."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def helped(words, monkeypatch):
    told = io.StringIO()
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return told.getvalue()


@of(("atma",))
def test_a_command_is_read_by_the_parser(command, monkeypatch):
    verb = verb_of(command.words[1:])[0]
    rest = command.words[1 + len(verb) :]
    if is_mention(command) or has_gap(command):
        known = helped(verb, monkeypatch)
        assert "usage: atma" in known
        assert not [name for name in options(rest) if not re.search(rf"{re.escape(name)}\b", known)]
    else:
        assert parsed(command.words[1:], monkeypatch) == (0, "")


@of(OURS)
def test_the_places_of_the_repository_that_a_command_names_exist(command):
    named = [place for word in command.words for place in KEPT.findall(word)]
    assert not [place for place in named if not (ROOT / place).exists()]


@of(("make",))
def test_a_target_is_in_the_makefile(command):
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        name, assigns, _ = word.partition("=")
        assert re.search(rf"^{re.escape(name)} *[:?]?=" if assigns else rf"^{re.escape(name)}:", makefile, re.M)


@of(("pip",))
def test_an_extra_that_is_installed_exists(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, extras in re.findall(r"([\w.-]+)\[([\w,-]+)\]", command.text):
        assert name in (project["name"], ".", "") and set(extras.split(",")) <= set(project["optional-dependencies"])


@of(("python", "python3"))
def test_a_script_or_module_takes_the_options_that_it_is_given(command, monkeypatch):
    first, *rest = command.words[1:]
    if first == "-c":
        compile(rest[0], str(command), "exec")
    elif first == "-m":
        assert importlib.util.find_spec(rest[0].split(".")[0]) is None or importlib.util.find_spec(rest[0])
    elif KEPT.match(first):
        part = [word for word in rest[:1] if not word.startswith("-") and "/" not in word and "…" not in word]
        known = script_help(first, part, monkeypatch)
        assert not [name for name in options(rest) if not re.search(rf"{re.escape(name)}\b", known)]


def script_help(path, part, monkeypatch):
    """What a script of benchmarks/ says of itself, or of the part of it that the first word names."""
    if "add_argument" not in (text := (ROOT / path).read_text()) and "tyro" not in text:
        return ""
    if "import ray" in text:
        pytest.importorskip("ray", reason="the extra [ray] is not installed")
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    told = io.StringIO()
    for words in [part, []] if part else [[]]:
        monkeypatch.setattr(sys, "argv", [path, *words, "--help"])
        with contextlib.redirect_stdout(told), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        assert ended.value.code in (0, None)
    return told.getvalue()


@pytest.mark.parametrize("code", [one for one in FOUND if isinstance(one, Code)], ids=str)
def test_python_compiles_and_imports_what_exists(code):
    import ast

    compile(code.text, str(code), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for line in re.findall(r"^(?:from atma|import atma)\b.*$", code.text, re.M):
        exec(line, {})


def test_what_is_wrong_is_told(monkeypatch):
    def complaint(text):
        return parsed(text.split(), monkeypatch)

    assert complaint("eval lengths --modle nano")[0] == 2
    assert complaint("eval length --model nano")[0] == 2
    assert complaint("eval lengths --documents many")[0] == 2
    assert complaint("import")[0] == 2
    assert complaint("eval lengths --documents 1") == (0, "")
