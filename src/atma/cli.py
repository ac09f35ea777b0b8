"""The command `atma`: a table of verbs, and how errors become one line and an exit status.

A verb is the function `run` of a module in `atma.commands`, imported only when asked for, so that `atma --help` is
immediate; its signature and docstring are its options and their help. A module with a table `VERBS` of its own has
verbs under its verb. A ValueError or OSError is the user's to mend: one line on stderr and status 2. Ctrl-C is status
130.
"""

import contextlib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import atma

VERBS = {
    "prepare": ("prepare", "turn text files, jsonl, parquet or a data set into token shards"),
    "train": ("train", "train the model that a recipe describes, or resume"),
    "eval": ("evaluate", "measure loss and needle recall at many context lengths"),
    "generate": ("generate", "continue a prompt of any length; save the state and go on later"),
    "chat": ("chat", "talk to a model in the terminal"),
    "serve": ("serve", "answer requests over HTTP in the words of OpenAI's API, with a chat page"),
    "demo": ("demo", "train a small pair, evaluate it far beyond its length, write a report"),
    "sweep": ("sweep", "train and measure every combination of a recipe's factors, with many workers"),
    "bench": ("bench", "time operations and models beside their peers and the machine's floor"),
    "import": ("convert", "convert a published checkpoint into a model folder"),
    "info": ("info", "show versions, machine and packaged models, or what a model folder holds"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); returns 0, 2 (the user can mend it) or 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("atma: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, OSError) as error:
        print(f"atma: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"atma: error: out of memory: {_one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> None:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_overview(VERBS, "atma", "Language models that train short and run long."))
    elif verb == "--version":
        print(f"atma {atma.__version__}")
    elif verb not in VERBS:
        raise ValueError(f"no verb '{verb}'; known: {', '.join(VERBS)} (see atma --help)")
    else:
        _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> None:
    module = importlib.import_module(f"atma.commands.{VERBS[verb][0]}")
    if hasattr(module, "VERBS"):
        run, program, arguments = _choose_part(module, f"atma {verb}", arguments)
        _parse(run, program, arguments)()
    else:
        _parse(module.run, f"atma {verb}", arguments)()


def _choose_part(module: ModuleType, program: str, arguments: list[str]) -> tuple[Callable[..., None], str, list[str]]:
    """Of a verb with verbs of its own: the function, its name on the command line, and what is left for it."""
    part, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if part in ("-h", "--help", "help"):
        print(_overview(module.VERBS, program, (module.__doc__ or "").split("\n")[0]))
        raise SystemExit(0)
    if part not in module.VERBS:
        raise ValueError(f"{program} has no '{part}'; known: {', '.join(module.VERBS)} (see {program} --help)")
    holder = importlib.import_module(f"atma.commands.{module.VERBS[part][0]}")
    return getattr(holder, part), f"{program} {part}", rest


def _parse(run: Callable[..., None], program: str, arguments: list[str]) -> Callable[[], None]:
    """The call of `run` that the arguments mean. ValueError says in one line what tyro tells in a box."""
    import tyro

    @functools.wraps(run)
    def later(*positional: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(run, *positional, **named)

    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(later, prog=program, args=arguments, config=style)
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
    raise ValueError(f"{_unboxed(told.getvalue())} (see {program} --help)")


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


def _overview(verbs: Mapping[str, tuple[Any, str]], program: str, what: str) -> str:
    width = max(map(len, verbs))
    lines = [f"  {verb:{width}}  {summary}" for verb, (_, summary) in verbs.items()]
    head = f"usage: {program} VERB [options]\n\n{what}\n"
    return "\n".join([head, *lines, f"\n`{program} VERB --help` explains a verb; `atma --version` prints the version."])


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
