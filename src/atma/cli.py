"""The command `atma`: a table of verbs, and how errors become one line and an exit status.

A verb is the function `run` of a module in `atma.commands`, or its table VERBS of further verbs, imported only when
asked for, so that `atma --help` is immediate; the signature and docstring of `run` are options and their help. A
ValueError or OSError is the user's to mend: one line on stderr and status 2. Ctrl-C is status 130.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import atma
from atma.arguments import joined
from atma.help_text import ending, fitted, overview
from atma.model_argument import placed
from atma.threads import wait_briefly

Verbs = dict[str, tuple[str, str]]
"""The name of each verb, its module in `atma.commands` (with a function, if it is not `run`), and a summary."""
SUMMARY = "Language models that train short and run long."
VERBS: Verbs = {
    "prepare": ("prepare", "turn text files, jsonl, parquet or a data set into token shards"),
    "train": ("train", "train the model that a recipe describes, or resume"),
    "plan": ("plan", "tell what a training costs before it: memory, speed, hours, and which mesh fits"),
    "eval": ("evaluate", "measure a model: losses and retrieval by length, recall, reasoning, tasks"),
    "diagnose": ("diagnose", "find out why a model fails at length: what each part does there and is worth"),
    "generate": ("generate", "continue a prompt of any length; save the state and go on later"),
    "chat": ("chat", "talk to a model in the terminal"),
    "serve": ("serve", "answer requests over HTTP in the words of OpenAI's API, with a chat page"),
    "batch": ("batch", "answer a file of requests in the form of OpenAI's batches, without a server"),
    "demo": ("demo", "ask for facts told 16,384 tokens ago, train small models, measure them all, report"),
    "sweep": ("sweep", "train and measure every combination of a recipe's factors, with many workers"),
    "compare": ("compare", "train any set of mixers alike, and put all of them on one table and page"),
    "bench": ("bench", "time operations and models beside their peers and the machine's floor"),
    "import": ("convert", "convert a checkpoint of transformers, or a published one, into a model folder"),
    "export": ("export", "write an imported model in the layout of its checkpoint again"),
    "merge": ("merge", "add adapters to the model they were trained on, into a model folder of its own"),
    "compress": ("compress", "narrow the keys that a trained model caches to what matters on your texts"),
    "narrow": ("narrow", "write a model with its large weights in 8 or 4 bits"),
    "extend": ("extend", "give a trained model length: attention that goes on beyond what it was trained on"),
    "compile": ("compile", "compile the CPU kernels ahead of time, for this processor or for images"),
    "runs": ("runs", "list run folders: how they stand, losses, times; and their curves beside each other"),
    "completion": ("completion", "print what makes TAB complete commands in bash, zsh or fish"),
    "info": ("info", "show versions, machine and packaged models, or what a model folder holds"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); returns 0, 2 (the user can mend it) or 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    wait_briefly()
    _substitute(sys.stdout)
    try:
        _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        print("; ".join(["atma: interrupted", *_besides(error)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, OSError) as error:
        if not getattr(error, "silent", False):  # of several processes one tells it
            print("; ".join([f"atma: error: {_one_line(error)}", *_besides(error)]), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"atma: error: out of memory: {_one_line(error)}", file=sys.stderr)
        return 2


def _besides(error: BaseException) -> list[str]:
    """What else went wrong, such as with a checkpoint that was being written."""
    return [" ".join(note.split()) for note in getattr(error, "__notes__", ())]


def _substitute(stream: object) -> None:
    """Write a substitute for what a terminal cannot show, whatever command writes it."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="replace")


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        print(f"atma {atma.__version__}")
    else:
        _verb("atma", VERBS, SUMMARY, arguments)


def _verb(program: str, verbs: Verbs, summary: str, arguments: list[str]) -> None:
    """The verb that the arguments begin with: a function, or a table of further verbs."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(overview(program, verbs, summary))
        return
    if verb not in verbs:
        raise ValueError(f"no verb '{verb}'; known: {', '.join(verbs)} (see {program} --help)")
    name, about = verbs[verb]
    module, _, function = name.partition(".")
    command = importlib.import_module(f"atma.commands.{module}")
    if not function and hasattr(command, "VERBS"):
        _verb(f"{program} {verb}", command.VERBS, f"{about[0].upper()}{about[1:]}.", rest)
    else:
        _parse(getattr(command, function or "run"), f"{program} {verb}", rest)()


def _parse(run: Callable[..., None], program: str, arguments: list[str]) -> Callable[[], None]:
    """The call of `run` that the arguments mean. ValueError says in one line what tyro tells in a box."""
    import tyro

    @functools.wraps(run)
    def later(*positional: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(run, *positional, **named)

    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
    told, shown = io.StringIO(), _Shown()
    given = joined(run, placed(run, arguments))
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(shown):
            return tyro.cli(later, prog=program, args=given, config=style)
    except SystemExit as ended:
        if ended.code in (0, None):
            print(f"{fitted(shown.getvalue().rstrip())}\n\n{ending(run, program.partition(' ')[2])}")
            raise
    raise ValueError(f"{_unboxed(told.getvalue())} (see {program} --help)")


class _Shown(io.StringIO):
    """What will be shown on stdout, in colours where that can show them and NO_COLOR is not set."""

    def __init__(self) -> None:
        super().__init__()
        self._colours = sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of stdout: boxes are drawn where it has their lines."""
        return getattr(sys.__stdout__, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        return self._colours


def _unboxed(box: str) -> str:
    """What a box of tyro says, without its title, its frame (blank where the output is not UTF-8) and quoted help."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        if re.fullmatch("[│╰╯─ -]*", line):
            parts.append([])
        elif not line[2:].startswith(" " * 8):
            parts[-1].append(line.strip("│ "))
    told = [" ".join(part) for part in parts if part and "helptext" not in part[0]]
    return "; ".join(told) or " ".join(box.split())


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
