"""The tables of docs/recipe.md: every key of a recipe with its kind, default and meaning, from the classes themselves.

`python -m tests.documents.recipe_page --write` puts them between the two marks of the page; without `--write` it says
whether they are up to date.
"""

import ast
import dataclasses
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import torch

from atma.config import PRESETS, DataConfig, EvaluationConfig, LoraConfig, ModelConfig, Recipe, TrainConfig, preset
from atma.mixers.table import CORES, MEMORIES, MIXERS, find
from atma.model import Model
from tests.documents.reading import ROOT

PAGE = ROOT / "docs" / "recipe.md"
BEGIN, END = "<!-- written by tests/documents/recipe_page.py -->", "<!-- end of what is written -->"
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
LEFT_OUT = ("mixers", "options")
"""Fields of a model that are tables of their own."""
HEAD = "| key | kind | default | meaning |\n| --- | --- | --- | --- |\n"


def meanings(cls: type) -> dict[str, str]:
    """The text below each field of a class, or of the class that it has it from, on one line."""
    if cls is object:
        return {}
    found = meanings(cls.__base__)
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return found


def kind(hint: Any) -> str:
    """A type in words."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(kind(one) for one in arguments if one is not type(None))
    if origin is tuple:
        return f"list of {kind(arguments[0])}s".replace("texts", "text")
    return WORDS[hint]


def value(default: Any) -> str:
    """A default as TOML has it."""
    if default is None:
        return "left out"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, str):
        return f'`"{default}"`'
    if isinstance(default, tuple):
        return "`[" + ", ".join(value(one).strip("`") for one in default) + "]`"
    if isinstance(default, int):
        return f"`{default:_}`"
    return f"`{default}`" if math.isfinite(default) else "`inf`"


def table(cls: type, names: list[str] | None = None) -> str:
    """The keys of a class as a table. KeyError: one has no meaning written below it."""
    told, hints = meanings(cls), typing.get_type_hints(cls)
    fields = {one.name: one for one in dataclasses.fields(cls)}
    rows = []
    for name in names or [name for name in fields if name not in LEFT_OUT]:
        meaning = told[name].replace("|", "\\|")
        rows.append(f"| `{name}` | {kind(hints[name])} | {value(fields[name].default)} | {meaning} |\n")
    return HEAD + "".join(rows)


def presets() -> str:
    """The named models with their sizes."""
    rows = "| preset | parameters | what it sets |\n| --- | ---: | --- |\n"
    for name, settings in PRESETS.items():
        with torch.device("meta"):
            count = sum(one.numel() for one in Model(preset(name)).parameters())
        said = ", ".join(f"`{key} = {value(one).strip('`')}`" for key, one in settings.items())
        rows += f"| `{name}` | {count:,} | {said} |\n"
    return rows


def options() -> Iterator[str]:
    """A section for every class of options that something in the tables has, each key where it is declared."""
    owners: dict[type, list[str]] = {}
    for what, entries in (("mixer", MIXERS), ("core", CORES), ("memory", MEMORIES)):
        for name in entries:
            for cls in find(name, what).cls.Config.__mro__[:-1]:
                owners.setdefault(cls, []).append(
                    {"mixer": "", "core": "core ", "memory": "memory "}[what] + f"`{name}`"
                )
    for cls, names in owners.items():
        declared = [name for name in inspect.get_annotations(cls) if name in cls.__dataclass_fields__]
        if declared:
            yield f"### {cls.__name__}\n\nOf {', '.join(dict.fromkeys(names))}.\n\n{table(cls, declared)}"


def text() -> str:
    """All that stands between the marks."""
    parts = [
        "## The model, `[model]`\n\n" + table(ModelConfig),
        '## Presets, `preset = "…"` in `[model]`\n\n' + presets(),
        "## The data, `[data]`\n\n" + table(DataConfig),
        "## The training, `[train]`\n\n" + table(TrainConfig),
        "## The evaluation at the end, `[evaluation]`\n\n" + table(EvaluationConfig),
        "## Adapters, `[lora]`\n\n" + table(LoraConfig),
        "## Options of mixers\n\nIn `[model]` for all mixers that have them, or in `[model.mixers.NAME]` for one.\n",
        *options(),
    ]
    assert {one.name for one in dataclasses.fields(Recipe)} == {"name", "model", "data", "train", "evaluation", "lora"}
    return "\n" + "\n".join(parts)


def written(page: str, tables: str) -> str:
    """A page with what is between its marks replaced. ValueError: it has not both marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE}: the marks {BEGIN!r} and {END!r} are gone; put them back")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    made = written(page, text())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    print("up to date" if made == page else f"{PAGE} is out of date: run `make docs`")
    return int(made != page)


if __name__ == "__main__":
    sys.exit(main())
